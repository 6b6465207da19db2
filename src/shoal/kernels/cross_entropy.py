"""The output head and its loss in one function, so that logits never exist for more than one chunk of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, reference


class CrossEntropy(NamedTuple):
    """Sums over the targets that count."""

    loss: Tensor
    """What is learnt from, with gradient."""
    nats: Tensor
    """The same where the targets alone are learnt; without gradient."""
    counted: int


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    hint: tuple[Tensor, Tensor] | None = None,
    soft: tuple[Tensor, float] | None = None,
    chunk: int = 512,
) -> CrossEntropy:
    """Sum of the cross-entropy of `hidden @ weight.T` against `targets`.

    The gradients of hidden and weight are computed together with the loss, while a chunk's logits exist, and only scaled in
    the backward pass. Under autocast the products run in its dtype; softcap, softmax and sums are in fp32 always.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: [N] int64; -100 is not counted.
        softcap: logits become softcap * tanh(logits / softcap); None for plain logits. Not together with the next three.
        prior: [N, V] fp32 and factors [N]: their product is added to the logits; only the factors have a gradient.
        hint: a token [N] of every row, and what is added to its logit, [N].
        soft: [N, V] fp32 probabilities of a teacher, and the share that they have in what is learnt; the targets have the rest.
        chunk: tokens whose logits exist at a time.
    """
    counted = int((targets != reference.IGNORED).sum())
    extra = (*(prior or (None, None)), *(hint or (None, None)), *(soft or (None, 0.0)))
    loss, nats = _LinearCrossEntropy.apply(hidden, weight, targets, softcap, *extra, chunk, torch.is_grad_enabled())
    return CrossEntropy(loss, nats.detach(), counted)


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
        hinted: Tensor | None,
        bonus: Tensor | None,
        soft: Tensor | None,
        share: float,
        chunk: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        math = torch.promote_types(dtype, torch.float32)
        wants_hidden, wants_weight = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=math) if wants_weight else None
        grad_factors = torch.empty_like(factors) if factors is not None and grad_enabled and ctx.needs_input_grad[5] else None
        grad_bonus = torch.empty_like(bonus) if bonus is not None and grad_enabled and ctx.needs_input_grad[7] else None
        wants_any = wants_hidden or wants_weight or grad_factors is not None or grad_bonus is not None
        nats = torch.zeros((), dtype=math, device=hidden.device)
        more = torch.zeros_like(nats)  # what the teacher's probabilities add
        with torch.autocast(device, enabled=False):
            weight_VD = weight.to(dtype).contiguous()
            buffer = weight_VD.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
            products = cpu if cpu.multiplies(weight.shape, weight_VD) else reference
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                hidden_ND, rows_N = hidden[part].to(dtype), targets[part]
                logits_NV = products.product(hidden_ND, weight_VD.T, buffer[: len(rows_N)]).to(math)
                if prior is not None and factors is not None:
                    logits_NV.addcmul_(prior[part], factors[part, None])
                if hinted is not None and bonus is not None:
                    logits_NV.scatter_add_(1, hinted[part, None], bonus[part, None])
                if soft is not None:
                    counted_N, index_N1 = rows_N != reference.IGNORED, rows_N.clamp(min=0)[:, None]
                    surprise_N = logits_NV.gather(1, index_N1)[:, 0] - torch.linalg.vecdot(soft[part], logits_NV)
                    more += share * (surprise_N * counted_N).sum()
                rows = cpu if cpu.runs(logits_NV) else reference
                nats += rows.cross_entropy_rows(logits_NV, rows_N, softcap, with_grad=wants_any).sum()
                if not wants_any:
                    continue
                # cross_entropy_rows has put the gradient in the place of the logits.
                if soft is not None:
                    logits_NV.addcmul_(soft[part], counted_N[:, None].to(math), value=-share)
                    logits_NV.scatter_add_(1, index_N1, share * counted_N[:, None].to(math))
                if grad_factors is not None and prior is not None:
                    grad_factors[part] = torch.linalg.vecdot(logits_NV, prior[part])
                if grad_bonus is not None and hinted is not None:
                    grad_bonus[part] = logits_NV.gather(1, hinted[part, None])[:, 0]
                grad_NV = logits_NV.to(dtype)
                if grad_hidden is not None:
                    products.product(grad_NV, weight_VD, grad_hidden[part])
                if grad_weight is not None:
                    products.add_outer(grad_NV, hidden_ND, grad_weight)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), grad_factors, grad_bonus)
        ctx.mark_non_differentiable(nats)
        return nats + more, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_factors, grad_bonus = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None, grad_factors, None, grad_bonus, None, None, None, None
