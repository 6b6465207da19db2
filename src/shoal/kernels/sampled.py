"""Sampled softmax: the output head and its loss over a few candidates of every position instead of the whole vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, reference
from .cross_entropy import CrossEntropy


class Candidates(NamedTuple):
    """C tokens for each of N positions."""

    tokens: Tensor
    """`[N, C]` int64; the first is the target."""
    log_weights: Tensor
    """`[N, C]` fp32: the logarithm of how many tokens each stands for, 0 where it is there for certain; minus infinity for one that does
    not count."""
    shares: Tensor
    """`[N, C]` fp32: what each has in what is learnt, 0 for one that does not count."""
    probabilities: Tensor | None = None
    """`[N, C]` fp32: how likely counts hold each; 0 for one that does not count."""
    lengths: Tensor | None = None
    """`[N]` int64: the longest context that was counted."""

    def from_position(self, first: int, length: int) -> Candidates:
        """Those of the positions from `first` on in every row of `length`."""

        def later(part: Tensor) -> Tensor:
            return part.unflatten(0, (-1, length))[:, first:].flatten(0, 1)

        beside = (None if part is None else later(part) for part in (self.probabilities, self.lengths))
        return Candidates(later(self.tokens), later(self.log_weights), later(self.shares), *beside)


def sampled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    candidates: Candidates,
    more: Tensor | None = None,
    chunk: int = 512,
) -> CrossEntropy:
    """Sum of the cross-entropies of `hidden @ weight.T + more` over candidates (Bengio & Senecal, 2008).

    The denominator of the softmax is the sum over candidates of weight times exp(logit): with the weights of importance sampling its
    mean is the sum over the vocabulary. As in `linear_cross_entropy` gradients are computed together with the loss.

    Args:
        hidden: [N, D].
        weight: [V, D].
        candidates: of every row of hidden.
        more: [N, C] fp32, added to the logits; has a gradient.
        chunk: rows at a time where plain torch computes: it copies the candidates' weights.
    """
    loss, nats = _SampledCrossEntropy.apply(hidden, weight, more, candidates, chunk)
    return CrossEntropy(loss, nats.detach(), len(hidden))


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, more: Tensor | None, candidates: Candidates, chunk: int) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        # On a CPU rows are read where they lie: a copy in bf16 would cost more than its products save.
        casts = torch.is_autocast_enabled(device) and device != "cpu"
        dtype = torch.get_autocast_dtype(device) if casts else torch.promote_types(hidden.dtype, weight.dtype)
        math = torch.promote_types(dtype, torch.float32)
        tokens, log_weights, shares = candidates.tokens, candidates.log_weights.to(math), candidates.shares.to(math)
        with torch.autocast(device, enabled=False):
            given, hidden, rows = hidden.dtype, hidden.to(dtype), weight.to(dtype).contiguous()
            more = None if more is None else more.to(math)
            grad_weight = torch.zeros_like(rows, dtype=math)
            if cpu.runs(hidden, rows, log_weights, shares, more):
                losses, nats, grad_logits, grad_hidden = cpu.sampled_cross_entropy(hidden, rows, tokens, log_weights, shares, more)
                cpu.add_to_rows(grad_logits, tokens, hidden, grad_weight)
            else:
                parts = []
                for at in range(0, len(hidden), chunk):
                    part = slice(at, at + chunk)
                    parts.append(
                        reference.sampled_cross_entropy(
                            hidden[part], rows, tokens[part], log_weights[part], shares[part], None if more is None else more[part]
                        )
                    )
                    reference.add_to_rows(parts[-1][2], tokens[part], hidden[part], grad_weight)
                losses, nats, grad_logits, grad_hidden = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(grad_hidden.to(given), grad_weight.to(weight.dtype), None if more is None else grad_logits)
        nats = nats.sum()
        ctx.mark_non_differentiable(nats)
        return losses.sum(), nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None)
