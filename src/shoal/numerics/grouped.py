"""Grouped integers: 4 or 8 bits per weight and one fp16 scale for a group of neighbouring columns.

A weight is `scale * (q - zero)` with zero 8 (int4) or 128 (int8); q is an unsigned integer. Scales are those that make the squared error
least, not those that just reach the largest weight. Scales may be negative: then the one more step that integers have below zero serves a
group whose largest weight is positive.

Shapes: O rows, I columns, G groups of a row (the last is padded with zeros), `...` leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Bits = Literal[4, 8]

FP16_MAX = 65504.0
STEPS = (8.0, 7.6, 7.2, 6.8, 6.4, 8.4, -7.0, -7.5)
"""Candidates for an int4 scale: the largest weight of a group divided by minus one of these."""
CHUNK = 1 << 18
"""Weights that are searched at once: few enough to stay in the cache."""


@dataclass(frozen=True)
class Grouped:
    """A quantized matrix `[..., O, I]`."""

    quants: Tensor
    """uint8 `[..., O, G * group]`."""
    scales: Tensor
    """fp16 `[..., O, G]`."""
    bits: Bits
    group: int
    columns: int
    """I."""


def quantize(weight: Tensor, bits: Bits, group: int = 32) -> Grouped:
    """`weight [..., O, I]` (finite) with the scales of `find_scales` and every number rounded to the nearest step."""
    scales = find_scales(weight, bits, group)
    return Grouped(round_to(weight, scales, bits, group), scales, bits, group, weight.shape[-1])


def dequantize(matrix: Grouped) -> Tensor:
    """The weights `[..., O, I]` that the integers stand for, fp32."""
    scales = matrix.scales.float()
    low = lowest(scales, matrix.bits)
    weight = matrix.quants.unflatten(-1, (-1, matrix.group)) * scales.unsqueeze(-1) + low.unsqueeze(-1)
    return weight.flatten(-2)[..., : matrix.columns]


def lowest(scales: Tensor, bits: Bits) -> Tensor:
    """What q = 0 stands for, fp32, in the shape of `scales`."""
    return scales.float() * -(1 << bits - 1)


def find_scales(weight: Tensor, bits: Bits, group: int = 32) -> Tensor:
    """Scales with which rounding `weight [..., O, I]` costs the least squared error, fp16 `[..., O, G]`.

    Every candidate is a first guess of the scale: rounding with it gives integers, and least squares gives the best scale for those
    integers.
    """
    groups = pad_columns(weight.float(), group).unflatten(-1, (-1, group))
    flat = groups.reshape(-1, group)
    step = max(1, CHUNK // group)
    # [group, n]: sums over a group then run along vectors.
    found = [_search(flat[i : i + step].T.contiguous(), bits) for i in range(0, len(flat), step)]
    shape = groups.shape[:-1]
    return torch.cat(found).view(shape) if found else groups.new_zeros(shape).half()


def round_to(weight: Tensor, scales: Tensor, bits: Bits, group: int) -> Tensor:
    """The nearest integers, uint8 `[..., O, G * group]`; a scale of 0 gives the integer for 0."""
    low = lowest(scales, bits).unsqueeze(-1)
    q = pad_columns(weight.float(), group).unflatten(-1, (-1, group)).sub(low)
    q.mul_(_inverse(scales.float()).unsqueeze(-1)).round_().clamp_(0, (1 << bits) - 1)
    return q.to(torch.uint8).flatten(-2)


def pad_columns(x: Tensor, group: int) -> Tensor:
    """`[..., I]` with zeros up to whole groups."""
    short = -x.shape[-1] % group
    return F.pad(x, (0, short)) if short else x


def _search(w: Tensor, bits: Bits) -> Tensor:
    """Best scales for groups `w [group, n]`: `[n]` fp16."""
    half = 1 << bits - 1
    low, high = w.amin(0), w.amax(0)
    largest = torch.where(high > -low, high, low)
    best, best_gain = _to_half(largest / -half), torch.full_like(largest, -torch.inf)
    q, product = torch.empty_like(w), torch.empty_like(w)
    for step in STEPS if bits == 4 else (128.0,):
        torch.mul(w, _inverse(largest / -step), out=q)
        q.round_().clamp_(-half, half - 1)
        wq = torch.mul(w, q, out=product).sum(0)
        qq = torch.mul(q, q, out=product).sum(0)
        scale = _to_half(wq * _inverse(qq))
        gain = (2 * wq - scale * qq) * scale  # how much the squared error is below that of all zeros
        better = gain > best_gain
        best = torch.where(better & (qq > 0), scale, best)
        best_gain = torch.where(better, gain, best_gain)
    return best.half()


def _to_half(x: Tensor) -> Tensor:
    """Rounded to what fp16 can hold, still fp32; where its steps are coarse (below 2^-14) away from zero, so that no weight is cut."""
    nearest = x.clamp(-FP16_MAX, FP16_MAX).half().float()
    return torch.where(x.abs() < 2**-14, (x.abs() * 2**24).ceil() * 2**-24 * x.sign(), nearest)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where that is not finite."""
    inverse = x.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0.0)
