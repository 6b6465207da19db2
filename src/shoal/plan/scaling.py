"""Larger models of the same kind."""

from __future__ import annotations

import math
from dataclasses import replace

from ..config import ModelConfig
from .cost import count_parameters


def scaled(model: ModelConfig, factor: float) -> ModelConfig:
    """The shape with `factor` times the parameters of `model`, as nearly as can be: wider in whole heads, and up to twice as deep."""
    heads, layers = model.num_attention_heads, model.num_hidden_layers

    def wider(count: int, deep: int) -> ModelConfig:
        def grow(value: int) -> int:
            return value * count // heads

        return replace(
            model,
            hidden_size=grow(model.hidden_size),
            intermediate_size=grow(model.intermediate_size),
            num_attention_heads=count,
            kv_lora_rank=grow(model.kv_lora_rank),
            moe_intermediate_size=grow(model.moe_intermediate_size),
            num_hidden_layers=deep,
        )

    wanted = factor * count_parameters(model).trained
    limit = heads * max(1, math.ceil(math.sqrt(factor)))
    shapes = [wider(count, deep) for count in range(heads, limit + 1) for deep in range(layers, 2 * layers + 1)]
    return min(shapes, key=lambda shape: abs(math.log(count_parameters(shape).trained / wanted)))
