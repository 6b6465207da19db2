"""Rotary position embedding and its extensions to longer contexts.

RoPE: 2104.09864. YaRN: 2309.00071, as used by DeepSeek-V2 (2405.04434, section 3.1.4) and V3 (2412.19437, section 4.3),
which turn only the decoupled rotary channels. The llama3 scaling is the one of Llama 3.1 (2407.21783).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's temperature correction 0.1 mscale ln(factor) + 1; 1 where the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor on query-key products: 1/sqrt(head width), times YaRN's squared magnitude for MLA models that set `mscale_all_dim`."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling or {}
    if config.uses_mla and scaling_kind(scaling) == "yarn" and scaling.get("mscale_all_dim"):
        scale *= yarn_magnitude(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def scaling_kind(scaling: dict[str, Any]) -> str:
    return scaling.get("type") or scaling.get("rope_type") or "default"


def yarn_beyond(config: ModelConfig, trained: int) -> dict[str, Any]:
    """`rope_scaling` for a model that has seen rows of `trained` tokens and is to see `max_position_embeddings`.

    YaRN (2309.00071) with the constants of DeepSeek-V3 (2412.19437, section 4.3): positions beyond the rows turn the slow pairs of
    channels no further than the rows did.
    """
    scaling = {
        "type": "yarn", "factor": config.max_position_embeddings / trained, "original_max_position_embeddings": trained,
        "beta_fast": 32, "beta_slow": 1,
    }  # fmt: skip
    # MLA's softmax is sharpened through its scale, that of others through cosines and sines, where files do not say otherwise.
    return scaling | {"mscale": 1.0, "mscale_all_dim": 1.0} if config.uses_mla else scaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of every channel pair, `[rope_dim / 2]`, fp32."""
    dim, theta = config.rope_dim, config.rope_theta
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    scaling = config.rope_scaling or {}
    if scaling_kind(scaling) == "yarn":
        return _yarn_frequencies(plain, scaling, dim, theta, config.max_position_embeddings)
    if scaling_kind(scaling) == "llama3":
        return _llama3_frequencies(plain, scaling)
    return plain


def table_magnitude(config: ModelConfig) -> float:
    """Factor on cosines and sines; 1 except for YaRN with different `mscale` and `mscale_all_dim` (or neither)."""
    scaling = config.rope_scaling or {}
    if scaling_kind(scaling) != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    factor, mscale, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return yarn_magnitude(factor, 1.0)


def _yarn_frequencies(plain: Tensor, scaling: dict[str, Any], dim: int, theta: float, max_positions: int) -> Tensor:
    original = scaling.get("original_max_position_embeddings") or max_positions

    def channel(rotations: float) -> float:
        """Pair index that turns `rotations` times over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(channel(scaling.get("beta_slow") or 1)), dim - 1)
    # Fast pairs keep their frequency, slow ones are interpolated by `factor`, with a linear ramp between.
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return plain / scaling["factor"] * slow + plain * (1 - slow)


def _llama3_frequencies(plain: Tensor, scaling: dict[str, Any]) -> Tensor:
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - keep) + plain * keep


def rotary_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions [..., T]`, each `[..., T, rope_dim / 2]`, fp32."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies(config).to(positions.device)
    magnitude = table_magnitude(config)
    return angles.cos() * magnitude, angles.sin() * magnitude
