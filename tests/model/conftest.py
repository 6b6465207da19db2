from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.config import ModelConfig
from shoal.model import Transformer, init_weights


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(seed: int = 0, **changes: Any) -> Transformer:
        shape: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
        shape |= {"num_attention_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
        shape |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "initializer_range": 0.2}
        model = Transformer(ModelConfig(**{**shape, **changes}))
        init_weights(model, seed)
        return model.eval()

    return make
