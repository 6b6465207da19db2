"""One linear layer per expert over rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, reference


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y = x @ weight[e].T for the rows of each group e.

    Args:
        x: [R, I], sorted by group.
        weight: [E, O, I].
        offsets: [E] int32, where the rows of each group end; groups may be empty, and the last offset is R.

    Returns:
        [R, O], in autocast's dtype where autocast is on.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return _GroupedLinear.apply(x, weight, offsets) if _runs(x, weight) else reference.grouped_linear(x, weight, offsets)


def _runs(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for these. torch's grouped_mm takes no fp64, no empty matrix, and only rows of whole 16 bytes."""
    if cpu.multiplies(weight.shape, x, weight):
        return True
    aligned = all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0 and aligned


class _GroupedLinear(torch.autograd.Function):
    # torch's grouped_mm has a backward of its own, which refuses gradients that are not contiguous.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, offsets)
        if cpu.multiplies(weight.shape, x, weight):
            return cpu.grouped_product(x, weight, offsets, transposed=True)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight, offsets), grad = ctx.saved_tensors, grad.contiguous()
        grad_x = _input_gradient(grad, weight, offsets) if ctx.needs_input_grad[0] else None
        return grad_x, _weight_gradient(grad, x, weight, offsets) if ctx.needs_input_grad[1] else None, None


def _input_gradient(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if cpu.multiplies(weight.shape, grad, weight):
        return cpu.grouped_product(grad, weight, offsets, transposed=False)
    return F.grouped_mm(grad, weight, offs=offsets)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return cpu.grouped_outer(grad, x, offsets) if cpu.multiplies(weight.shape, grad, x) else F.grouped_mm(grad.T, x, offs=offsets)


def grouped_linear_gradients(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x [R, I]` and `weight [E, O, I]` from that of `grouped_linear`'s result, `grad [R, O]`; all in one dtype."""
    if _runs(x, weight):
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
        return _input_gradient(grad, weight, offsets), _weight_gradient(grad, x, weight, offsets)
    with torch.enable_grad():
        inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
        grad_x, grad_weight = torch.autograd.grad(reference.grouped_linear(*inputs, offsets), inputs, grad)
    return grad_x, grad_weight
