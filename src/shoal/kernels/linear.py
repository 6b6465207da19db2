"""A linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ weight [O, I].T + bias [O], `[..., O]`; in autocast's dtype where autocast is on."""
    if bias is not None or torch.is_autocast_enabled(x.device.type) or not cpu.multiplies(weight.shape, x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight)


def linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x [N, I]` and `weight [O, I]` from that of `linear`'s result, `grad [N, O]`; all in one dtype."""
    return _input_gradient(grad, weight), weight_gradient(grad, x)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [N, O].T @ x [N, I]: the gradient of a weight, `[O, I]`."""
    return cpu.outer(grad, x) if cpu.multiplies((grad.shape[1], x.shape[1]), grad, x) else grad.T @ x


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    if not cpu.multiplies(weight.shape, grad, weight):
        return grad @ weight
    return cpu.product(grad, weight.contiguous(), grad.new_empty(grad.shape[0], weight.shape[1]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        y = rows.new_empty(rows.shape[0], weight.shape[0])
        return cpu.product(rows, weight.contiguous().T, y).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), rows = ctx.saved_tensors, grad.reshape(-1, grad.shape[-1])
        grad_x = _input_gradient(rows, weight).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_x, weight_gradient(rows, x) if ctx.needs_input_grad[1] else None
