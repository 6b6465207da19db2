"""The output head and its loss in one function, so that logits never exist for more than one chunk of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import reference


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, chunk: int = 1024
) -> tuple[Tensor, int]:
    counted = int((targets != reference.IGNORED).sum())
    return _LinearCrossEntropy.apply(hidden, weight, targets, softcap, chunk, torch.is_grad_enabled()), counted


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int, grad_enabled: bool
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants_hidden, wants_weight = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:2])
        math = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=math) if wants_weight else None
        total = torch.zeros((), dtype=math, device=hidden.device)
        with torch.autocast(device, enabled=False):
            weight_VD = weight.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                hidden_ND = hidden[rows].to(dtype)
                logits_NV = (hidden_ND @ weight_VD.T).to(math)
                nats = reference.cross_entropy_rows(logits_NV, targets[rows], softcap, with_grad=wants_hidden or wants_weight)
                total += nats.sum()
                grad_NV = logits_NV.to(dtype)  # cross_entropy_rows has left the gradient in its place
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_NV @ weight_VD
                if grad_weight is not None:
                    grad_weight += grad_NV.T @ hidden_ND
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None, None
