"""The output head and its loss in one function, so that logits never exist for more than one chunk of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, reference


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    chunk: int = 512,
) -> tuple[Tensor, int]:
    """Sum of the cross-entropy of `hidden @ weight.T` against `targets`.

    The gradients of hidden and weight are computed together with the loss, while a chunk's logits exist, and only scaled in
    the backward pass. Under autocast the products run in its dtype; softcap, softmax and sums are in fp32 always.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: [N] int64; -100 is not counted.
        softcap: logits become softcap * tanh(logits / softcap); None for plain logits.
        prior: [N, V] fp32 and factors [N]: their product is added to the logits; only the factors have a gradient. Not with softcap.
        chunk: tokens whose logits exist at a time.

    Returns:
        The sum in nats (a scalar with gradient) and the number of targets that it counts.
    """
    counted = int((targets != reference.IGNORED).sum())
    return _LinearCrossEntropy.apply(hidden, weight, targets, softcap, *(prior or (None, None)), chunk, torch.is_grad_enabled()), counted


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        prior: Tensor | None,
        factors: Tensor | None,
        chunk: int,
        grad_enabled: bool,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        math = torch.promote_types(dtype, torch.float32)
        wants_hidden, wants_weight = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=math) if wants_weight else None
        grad_factors = torch.empty_like(factors) if factors is not None and grad_enabled and ctx.needs_input_grad[5] else None
        nats = torch.zeros((), dtype=math, device=hidden.device)
        with torch.autocast(device, enabled=False):
            weight_VD = weight.to(dtype)
            buffer = weight_VD.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
            for rows_ND, rows_N, start in zip(hidden.split(chunk), targets.split(chunk), range(0, hidden.shape[0], chunk), strict=True):
                hidden_ND = rows_ND.to(dtype)
                logits_NV = torch.mm(hidden_ND, weight_VD.T, out=buffer[: len(rows_N)]).to(math)
                if prior is not None and factors is not None:
                    prior_NV = prior[start : start + chunk]
                    logits_NV.addcmul_(prior_NV, factors[start : start + chunk, None])
                rows = cpu if cpu.runs(logits_NV) else reference
                nats += rows.cross_entropy_rows(logits_NV, rows_N, softcap, with_grad=wants_hidden or wants_weight).sum()
                if grad_factors is not None:
                    grad_factors[start : start + chunk] = (logits_NV * prior_NV).sum(-1)
                grad_NV = logits_NV.to(dtype)  # cross_entropy_rows has put the gradient in the place of the logits
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = grad_NV @ weight_VD
                if grad_weight is not None and dtype == math:
                    grad_weight.addmm_(grad_NV.T, hidden_ND)
                elif grad_weight is not None:
                    grad_weight += grad_NV.T @ hidden_ND
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), grad_factors)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_factors = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None, grad_factors, None, None
