"""A model's weights as the C++ decoder takes them."""

from __future__ import annotations

import torch

from shoal.kernels.packed import PackedMatrix, pack_floats
from shoal.model import Transformer


def packed(model: Transformer, format: str = "fp32") -> dict[str, PackedMatrix | torch.Tensor]:
    """The model's weights under the names of `formats.parts`."""
    config, parts = model.config, {}
    for name, tensor in model.state_dict().items():
        short = name.removesuffix(".weight")
        if name.startswith(("model.counted.", "model.repeats.")):
            parts[name] = tensor.detach()
        elif name.endswith(("norm.weight", "mlp.gate.weight", "bias", "embedding.weight", "embed_tokens.weight")):
            parts[name] = tensor.detach().float()
        elif short.endswith("kv_b_proj"):
            key, value = tensor.unflatten(0, (config.num_attention_heads, -1)).split([config.qk_nope_head_dim, config.v_head_dim], 1)
            parts[short.replace("kv_b_proj", "k_up")] = pack_floats(key.mT, format)  # type: ignore[arg-type]
            parts[short.replace("kv_b_proj", "v_up")] = pack_floats(value, format)  # type: ignore[arg-type]
        else:
            parts[short] = pack_floats(tensor, format)  # type: ignore[arg-type]
    if config.tie_word_embeddings:
        parts["lm_head"] = pack_floats(model.lm_head.weight, format)  # type: ignore[arg-type]
    return parts
