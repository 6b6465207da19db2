"""Rounding that minds what a layer's inputs look like: the error of one weight is made up for by the weights that are rounded after it.

A layer `y = W x` whose inputs have the second moment H = E[x x'] changes its output by E|dy|^2 = sum of the rows' (w - v) H (w - v)'
when the weights W become V. GPTQ (2210.17323) rounds column by column and moves what is left of each column's error to the columns still to
come. Coordinate descent (QuantEase, 2309.01885) then visits the columns again, each time taking the step that is best given all others, and
scales are refitted to the integers they have got. Every step after the first lowers the error or leaves it.

Shapes: O rows, I columns, padded to G whole groups; `...` leading dimensions (experts, heads), each with an H of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .grouped import FP16_MAX, Bits, Grouped, dequantize, find_scales, lowest, pad_columns

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: what a finite sample has not seen may still come."""
BLOCK = 64
"""Columns that are rounded before their errors are carried over to all columns after them at once."""
SWEEPS = 2
"""Rounds of coordinate descent after the first rounding."""


def quantize_for_inputs(weight: Tensor, moment: Tensor, bits: Bits, group: int = 32, *, sweeps: int = SWEEPS) -> Grouped:
    """`weight [..., O, I]` quantized so that the layer's output changes least for inputs with second moment `moment [..., I, I]`.

    An H of zeros (no inputs seen) gives plain rounding with the scales of `find_scales`.
    """
    columns = weight.shape[-1]
    weight = pad_columns(weight.float(), group)
    short = weight.shape[-1] - columns
    h = damped(F.pad(moment.float(), (0, short, 0, short)))
    scales = find_scales(weight, bits, group)
    quants = _carry_errors(weight, h, scales, bits, group)
    best = Grouped(quants, scales, bits, group, weight.shape[-1])
    for _ in range(sweeps):
        best = _refit(weight, h, best)
        best = replace(best, quants=_descend(weight, h, best))
    return replace(best, columns=columns)


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor) -> Tensor:
    """E|dy|^2 as a share of E|y|^2, one number for each leading index; 0 where there is no output."""
    d = approximation - weight
    changed = ((d @ moment) * d).sum((-2, -1))
    whole = ((weight @ moment) * weight).sum((-2, -1))
    return torch.where(whole > 0, changed / whole, 0.0)


def damped(moment: Tensor) -> Tensor:
    """`moment [..., I, I]` made positive definite."""
    h = moment.clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, DAMPING * mean, 1.0)
    return h


def _carry_errors(weight: Tensor, h: Tensor, scales: Tensor, bits: Bits, group: int) -> Tensor:
    """GPTQ: uint8 `[..., O, I]`. Columns with large inputs go first, while most others are still free to make up for them."""
    order = h.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    back = order.argsort(-1)
    rest = weight.mT.take_along_dim(order.unsqueeze(-1), -2).contiguous()  # [..., I, O] in that order
    shuffled = h.take_along_dim(order.unsqueeze(-1), -2).take_along_dim(order.unsqueeze(-2), -1)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(shuffled)), upper=True)
    steps, floors = _by_column(scales, bits, group)
    steps, floors = (x.take_along_dim(order.unsqueeze(-1), -2) for x in (steps, floors))
    top = (1 << bits) - 1
    quants = torch.empty_like(rest)
    count = rest.shape[-2]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = torch.empty_like(rest[..., start:end, :])
        for i in range(start, end):
            w, step, floor = rest[..., i, :], steps[..., i, :], floors[..., i, :]
            q = _nearest(w, step, floor, top)
            quants[..., i, :] = q
            error = (w - (step * q + floor)) / upper[..., i, i].unsqueeze(-1)
            errors[..., i - start, :] = error
            if i + 1 < end:
                rest[..., i + 1 : end, :] -= upper[..., i, i + 1 : end].unsqueeze(-1) * error.unsqueeze(-2)
        if end < count:
            rest[..., end:, :] -= upper[..., start:end, end:].mT @ errors
    return quants.take_along_dim(back.unsqueeze(-1), -2).mT.to(torch.uint8).contiguous()


def _descend(weight: Tensor, h: Tensor, matrix: Grouped) -> Tensor:
    """One sweep of coordinate descent over the columns: uint8 `[..., O, I]`, no worse than those of `matrix`."""
    steps, floors = _by_column(matrix.scales, matrix.bits, matrix.group)
    quants = matrix.quants.mT.float().contiguous()  # [..., I, O]
    slope = h @ (weight.mT - (steps * quants + floors))  # half the negative gradient of the error by the approximation
    top = (1 << matrix.bits) - 1
    count = quants.shape[-2]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        moved = torch.empty_like(quants[..., start:end, :])
        for i in range(start, end):
            q, step, floor = quants[..., i, :], steps[..., i, :], floors[..., i, :]
            wanted = step * q + floor + slope[..., i, :] / h[..., i, i].unsqueeze(-1)
            better = _nearest(wanted, step, floor, top)
            moved[..., i - start, :] = delta = step * (better - q)
            quants[..., i, :] = better
            if i + 1 < end:
                slope[..., i + 1 : end, :] -= h[..., i + 1 : end, i].unsqueeze(-1) * delta.unsqueeze(-2)
        slope[..., end:, :] -= h[..., end:, start:end] @ moved
    return quants.mT.to(torch.uint8).contiguous()


def _refit(weight: Tensor, h: Tensor, matrix: Grouped) -> Grouped:
    """Scales that are best for the integers as they are, one group after the other."""
    group, scales = matrix.group, matrix.scales.clone()
    slope = (weight - dequantize(matrix)) @ h  # [..., O, I]
    q = matrix.quants.float() - (1 << matrix.bits - 1)
    for g in range(scales.shape[-1]):
        columns = slice(g * group, (g + 1) * group)
        across, inside = h[..., columns, :], h[..., columns, columns]
        direction, old = q[..., columns], scales[..., g].float()
        curvature = ((direction @ inside) * direction).sum(-1)
        wanted = old + (slope[..., columns] * direction).sum(-1) / curvature.clamp_min(1e-30)
        new = torch.where(curvature > 0, wanted, old).clamp(-FP16_MAX, FP16_MAX).half()
        slope -= ((new.float() - old).unsqueeze(-1) * direction) @ across
        scales[..., g] = new
    return replace(matrix, scales=scales)


def _by_column(scales: Tensor, bits: Bits, group: int) -> tuple[Tensor, Tensor]:
    """Step and lowest value of every weight, `[..., I, O]` fp32."""
    steps = scales.float()
    return tuple(x.mT.repeat_interleave(group, -2) for x in (steps, lowest(steps, bits)))  # type: ignore[return-value]


def _nearest(w: Tensor, step: Tensor, floor: Tensor, top: int) -> Tensor:
    q = ((w - floor) / step).round_().clamp_(0, top)
    return torch.where(step == 0, round_to_zero(floor, top), q)


def round_to_zero(floor: Tensor, top: int) -> Tensor:
    """The integer of groups whose step is 0: any stands for the same weight."""
    return torch.full_like(floor, (top + 1) // 2)
