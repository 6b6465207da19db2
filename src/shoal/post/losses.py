"""What post-training differentiates: cross-entropy of packed rows, and log-probabilities token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.reference import IGNORED
from ..model import RoutingStats, Transformer
from .packing import Row

CHUNK = 1024
"""Tokens whose logits exist at a time."""


@dataclass
class RowLosses:
    """Sums over the learnt tokens of one row."""

    total: Tensor
    """What is differentiated: a share of the step's loss."""
    nats: Tensor
    mtp: Tensor
    """Mean nats per token over MTP depths, times the tokens learnt; 0 without MTP."""
    routing: list[RoutingStats]


def row_losses(model: Transformer, row: Row, learnt: int, mtp_weight: float, balance_weight: float) -> RowLosses:
    """A row's part of the loss of a step with `learnt` tokens to learn: cross-entropy per token, MTP and balance as in pretraining."""
    output = model(row.ids, mtp_ids=row.mtp_ids if mtp_weight else (), documents=row.documents)
    nats, _, count = model.cross_entropy(output.hidden, row.targets, output.keys)
    mtp = torch.zeros_like(nats)
    for hidden, targets in zip(output.mtp_hidden, row.mtp_targets, strict=False):
        ahead, _, ahead_count = model.cross_entropy(hidden, targets)
        mtp = mtp + ahead * (count / max(ahead_count, 1) / len(output.mtp_hidden))
    balance = torch.stack([stats.balance_loss for stats in output.routing]).sum() if output.routing else torch.zeros_like(nats)
    total = (nats + mtp_weight * mtp + balance_weight * balance * count) / max(learnt, 1)
    return RowLosses(total, nats.detach(), mtp.detach(), output.routing)


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of every target, with gradient, and the entropy of its prediction, without; `[M]` fp32 each.

    `hidden [M, D]`, `targets [M]`, `keys [M, K]` as in `Output`. Logits exist for `CHUNK` tokens at a time and are computed once more
    for the gradient.
    """

    def chunk(hidden: Tensor, targets: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        logprobs = model.logits(hidden, keys).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1), entropy

    chunks = hidden.split(CHUNK)
    chunks_of_keys = [None] * len(chunks) if keys is None else keys.split(CHUNK)
    parts = [
        checkpoint(chunk, *part, use_reentrant=False) if torch.is_grad_enabled() else chunk(*part)
        for part in zip(chunks, targets.split(CHUNK), chunks_of_keys, strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def row_logprobs(model: Transformer, row: Row) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the learnt tokens of a row, in its order, with the row's experts where it has some."""
    output = model(row.ids, documents=row.documents, chosen=row.experts)
    learnt = (row.targets != IGNORED).nonzero().squeeze(1)
    keys = None if output.keys is None else output.keys[0, learnt]
    return token_logprobs(model, output.hidden[0, learnt], row.targets[learnt], keys)
