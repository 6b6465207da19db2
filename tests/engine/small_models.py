"""Small random models of every kind."""

from __future__ import annotations

from typing import Any

import torch

from shoal.config import ModelConfig
from shoal.model import Transformer, init_weights

COMMON: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
COMMON |= {"max_position_embeddings": 256, "initializer_range": 0.2}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "q_lora_rank": 12, "num_nextn_predict_layers": 1} | LATENT,
    "v2": {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False} | LATENT,
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
}


def make_model(kind: str, **changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**COMMON, **KINDS[kind], **changes}))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    for buffer in model.buffers():
        buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()
