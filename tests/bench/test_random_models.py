"""Random models: the GGUF file and the quantized folder hold the same weights, and llama.cpp and the engine agree about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.bench.random_model import write_random_folder, write_random_gguf
from shoal.config import ModelConfig, UserError
from shoal.engine.weights import load_weights as opened
from shoal.engine.weights import quantized_scheme, to_transformer
from shoal.formats.gguf_layout import tensors
from shoal.kernels.packed import PackedMatrix, unpack

gguf = pytest.importorskip("gguf")

SMALL: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 2, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip
SHAPES = {
    "v3 with MTP": {**SMALL, "q_lora_rank": 32, "num_nextn_predict_layers": 1},
    "v2": {**SMALL, "model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
    "rows that are no blocks": {**SMALL, "hidden_size": 48, "kv_lora_rank": 24},
}
SCHEME = replace(quantized_scheme(4), head="int4", embedding="fp32")


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_hold_the_same_weights(shape: str, group: int, tmp_path: Path) -> None:
    config = ModelConfig(**SHAPES[shape])
    write_random_gguf(config, tmp_path / "model.gguf", group)
    write_random_folder(config, replace(SCHEME, group=group), tmp_path / "model")
    theirs = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    ours = opened(tmp_path / "model").parts
    assert len(ours) == len(theirs)
    blocks = [tensor for tensor in tensors(config) if not tensor.exact and tensor.shape[-1] % 32 == 0]
    assert len(blocks) > 5
    for tensor in blocks:
        wanted = torch.from_numpy(np.array(theirs[tensor.name])).view(tensor.shape)
        assert 0.5 < wanted.std() * tensor.shape[-1] ** 0.5 < 2
        assert any(torch.equal(plain(part), wanted) for part in ours.values() if shape_of(part) == tensor.shape), tensor.name


def plain(part: PackedMatrix | torch.Tensor) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else unpack(part)


def shape_of(part: PackedMatrix | torch.Tensor) -> tuple[int, ...]:
    return tuple(part.shape) if isinstance(part, torch.Tensor) else (*part.leading, part.rows, part.columns)


@pytest.mark.parametrize("shape", ["v3 with MTP", "v2"])
def test_llama_cpp_and_shoal_compute_the_same(shape: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    config = ModelConfig(**SHAPES[shape])
    write_random_gguf(config, tmp_path / "model.gguf", SCHEME.group)
    write_random_folder(config, SCHEME, tmp_path / "model")
    ids = torch.randint(200, (1, 40), generator=torch.Generator().manual_seed(0))
    model = to_transformer(opened(tmp_path / "model"))
    with torch.inference_mode():
        out = model(ids)
        wanted = model.logits(out.hidden)[0]
    assert 0.2 < wanted.std() < 5
    assert (out.routing[0].load > 0).sum() > 4, "tokens choose different experts"
    params = llama_cpp.llama_model_default_params()
    loaded = llama_cpp.llama_model_load_from_file(str(tmp_path / "model.gguf").encode(), params)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.type_k, settings.type_v, settings.flash_attn_type = 256, 0, 0, 0
    context = llama_cpp.llama_init_from_model(loaded, settings)
    batch = llama_cpp.llama_batch_init(40, 0, 1)
    batch.n_tokens = 40
    for i, token in enumerate(ids[0].tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (200,)).copy() for i in range(40)]
    error = (torch.tensor(np.stack(rows)) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.median() < 0.05, "llama.cpp rounds its activations to 8 bits, so not closer"


def test_a_shape_that_llama_cpp_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qk_norm"):
        write_random_gguf(ModelConfig(**SMALL, qk_norm=True), tmp_path / "model.gguf", 32)
