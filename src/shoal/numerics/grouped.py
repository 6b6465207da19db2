"""Grouped integers: 4 or 8 bits per weight and one fp16 scale (and, where asked for, one fp16 minimum) for a group of neighbouring columns.

A weight is `scale * (q - zero)` with zero 8 (int4) or 128 (int8), or `scale * q + min`; q is an unsigned integer. Scales are those that
make the squared error least, not those that just reach the largest weight. Scales may be negative: then the one more step that integers
have below zero serves a group whose largest weight is positive.

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
SYMMETRIC_STEPS = (8.0, 7.6, 7.2, 6.8, 6.4, 8.4, -7.0, -7.5)
"""Candidates for an int4 scale without minimum: the largest weight of a group divided by minus one of these."""
RANGE_STEPS = (15.0, 14.3, 13.6, 12.9, 12.2, 15.7)
"""Candidates for an int4 scale with minimum: the range of a group divided by one of these."""
CHUNK = 1 << 18
"""Weights that are searched at once: few enough to stay in the cache."""


@dataclass(frozen=True)
class Grouped:
    """A quantized matrix `[..., O, I]`."""

    quants: Tensor
    """uint8 `[..., O, G * group]`."""
    scales: Tensor
    """fp16 `[..., O, G]`."""
    mins: Tensor | None
    """fp16 `[..., O, G]`, or None."""
    bits: Bits
    group: int
    columns: int
    """I."""


def quantize(weight: Tensor, bits: Bits, group: int = 32, *, mins: bool = False, importance: Tensor | None = None) -> Grouped:
    """`weight [..., O, I]` (finite) with the scales of `find_scales` and every number rounded to the nearest step."""
    scales, low = find_scales(weight, bits, group, mins=mins, importance=importance)
    return Grouped(round_to(weight, scales, low, bits, group), scales, low, bits, group, weight.shape[-1])


def dequantize(matrix: Grouped) -> Tensor:
    """The weights `[..., O, I]` that the integers stand for, fp32."""
    scales = matrix.scales.float()
    low = lowest(scales, matrix.mins, matrix.bits)
    weight = matrix.quants.unflatten(-1, (-1, matrix.group)) * scales.unsqueeze(-1) + low.unsqueeze(-1)
    return weight.flatten(-2)[..., : matrix.columns]


def lowest(scales: Tensor, mins: Tensor | None, bits: Bits) -> Tensor:
    """What q = 0 stands for, fp32, in the shape of `scales`."""
    return mins.float() if mins is not None else scales.float() * -(1 << bits - 1)


def find_scales(
    weight: Tensor, bits: Bits, group: int = 32, *, mins: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales (and minima) with which rounding `weight [..., O, I]` costs the least squared error, `[..., O, G]` fp16 each.

    Every candidate is a first guess of the scale: rounding with it gives integers, and least squares gives the best scale for those
    integers. `importance [..., I]` (not negative) weighs the squared error of every column.
    """
    groups = pad_columns(weight.float(), group).unflatten(-1, (-1, group))
    weights = None
    if importance is not None:
        weights = pad_columns(importance.float(), group).unflatten(-1, (-1, group)).unsqueeze(-3).expand(groups.shape)
        weights = weights.reshape(-1, group)
    flat = groups.reshape(-1, group)
    step = max(1, CHUNK // group)
    found = []
    for i in range(0, len(flat), step):
        w = flat[i : i + step].T.contiguous()  # [group, n]: sums over a group then run along vectors
        a = None if weights is None else weights[i : i + step].T.contiguous()
        found.append(_search_with_min(w, a, bits) if mins else (_search(w, a, bits), None))
    shape = groups.shape[:-1]
    scales = torch.cat([scale for scale, _ in found]).view(shape) if found else groups.new_zeros(shape).half()
    if not mins:
        return scales, None
    return scales, torch.cat([low for _, low in found if low is not None]).view(shape) if found else scales


def round_to(weight: Tensor, scales: Tensor, mins: Tensor | None, bits: Bits, group: int) -> Tensor:
    """The nearest integers, uint8 `[..., O, G * group]`; a scale of 0 gives the integer for 0 (0 where there are minima)."""
    low = lowest(scales, mins, bits).unsqueeze(-1)
    q = pad_columns(weight.float(), group).unflatten(-1, (-1, group)).sub(low)
    q.mul_(_inverse(scales.float()).unsqueeze(-1)).round_().clamp_(0, (1 << bits) - 1)
    return q.to(torch.uint8).flatten(-2)


def pad_columns(x: Tensor, group: int) -> Tensor:
    """`[..., I]` with zeros up to whole groups."""
    short = -x.shape[-1] % group
    return F.pad(x, (0, short)) if short else x


def _search(w: Tensor, a: Tensor | None, bits: Bits) -> Tensor:
    """Best scales without minimum for groups `w [group, n]` with weights `a` of the squared errors: `[n]` fp16."""
    half = 1 << bits - 1
    low, high = w.amin(0), w.amax(0)
    largest = torch.where(high > -low, high, low)
    best, best_gain = _to_half(largest / -half), torch.full_like(largest, -torch.inf)
    aw = w if a is None else a * w
    q, product = torch.empty_like(w), torch.empty_like(w)
    for step in SYMMETRIC_STEPS if bits == 4 else (128.0,):
        torch.mul(w, _inverse(largest / -step), out=q)
        q.round_().clamp_(-half, half - 1)
        wq = torch.mul(aw, q, out=product).sum(0)
        torch.mul(q, q, out=product)
        qq = (product if a is None else product.mul_(a)).sum(0)
        scale = _to_half(wq * _inverse(qq))
        gain = (2 * wq - scale * qq) * scale  # how much the squared error is below that of all zeros
        better = gain > best_gain
        best = torch.where(better & (qq > 0), scale, best)
        best_gain = torch.where(better, gain, best_gain)
    return best.half()


def _search_with_min(w: Tensor, a: Tensor | None, bits: Bits) -> tuple[Tensor, Tensor]:
    """Best scales and minima for groups `w [group, n]` with weights `a` of the squared errors: `[n]` fp16 each."""
    top = (1 << bits) - 1
    low, high = w.amin(0), w.amax(0)
    best = (_to_half((high - low) / top), _to_half(low))
    best_error = torch.full_like(low, torch.inf)
    ones = torch.ones_like(w) if a is None else a
    total, sw, sww = ones.sum(0), (ones * w).sum(0), (ones * w * w).sum(0)
    for step in RANGE_STEPS if bits == 4 else (float(top),):
        # The range shrinks around its middle.
        scale = (high - low) / step
        start = (high + low - top * scale) / 2
        q = ((w - start) * _inverse(scale)).round_().clamp_(0, top)
        aq = ones * q
        sq, sqq, swq = aq.sum(0), (aq * q).sum(0), (aq * w).sum(0)
        # Least squares for scale and minimum at once; the determinant is 0 where all q are equal.
        scale = (total * swq - sq * sw) * _inverse(total * sqq - sq * sq)
        start = (sw - scale * sq) * _inverse(total)
        scale, start = _to_half(scale), _to_half(start)
        error = sww + scale * (scale * sqq - 2 * swq) + start * (start * total + 2 * scale * sq - 2 * sw)
        better = error < best_error
        best = (torch.where(better, scale, best[0]), torch.where(better, start, best[1]))
        best_error = torch.where(better, error, best_error)
    return best[0].half(), best[1].half()


def _to_half(x: Tensor) -> Tensor:
    """Rounded to what fp16 can hold, still fp32; where its steps are coarse (below 2^-14) away from zero, so that no weight is cut."""
    nearest = x.clamp(-FP16_MAX, FP16_MAX).half().float()
    return torch.where(x.abs() < 2**-14, (x.abs() * 2**24).ceil() * 2**-24 * x.sign(), nearest)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where that is not finite."""
    inverse = x.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0.0)
