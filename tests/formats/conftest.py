from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config import ModelConfig
from shoal.model import Transformer, init_weights

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    """Builds a small random model; a router has a bias of its own, so that losing it would show."""

    def make(seed: int = 0, **changes: Any) -> Transformer:
        model = Transformer(ModelConfig(**{**SMALL, **changes}))
        init_weights(model, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, buffer in model.named_buffers():
            assert name.endswith("e_score_correction_bias")
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        return model.eval()

    return make


class BareTokenizer:
    """Stands in for a tokenizer where only its file matters."""

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """The shape of a small model."""
    return SMALL


@pytest.fixture(scope="session")
def tokenizer() -> BareTokenizer:
    return BareTokenizer()
