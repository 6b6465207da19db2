"""A linear layer without a bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] @ weight [O, I].T, `[..., O]`; in autocast's dtype where autocast is on."""
    if torch.is_autocast_enabled(x.device.type) or not cpu.multiplies(x, weight):
        return F.linear(x, weight)
    return _Linear.apply(x, weight)


def linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x [N, I]` and `weight [O, I]` from that of `linear`'s result, `grad [N, O]`; all in one dtype."""
    if not (cpu.runs(grad) and cpu.multiplies(x, weight)):
        return grad @ weight, grad.T @ x
    return cpu.product(grad, weight.contiguous(), torch.empty_like(x)), cpu.outer(grad, x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        y = rows.new_empty(rows.shape[0], weight.shape[0])
        return cpu.product(rows, weight.contiguous().T, y).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_weight = linear_gradients(grad.reshape(-1, grad.shape[-1]), *ctx.saved_tensors)
        return grad_x.view(*grad.shape[:-1], -1), grad_weight
