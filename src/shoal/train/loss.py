"""What training minimises: next-token cross-entropy, multi-token prediction, balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import CrossEntropy
from ..model import Output, RoutingStats, Transformer
from .candidates import Sampler
from .counting import Teacher


@dataclass
class Losses:
    """Loss of one micro-batch; scalars are tensors so that nothing waits for the device."""

    total: Tensor
    """What is differentiated."""
    main: Tensor
    """Mean nats per next token; with candidates about so many."""
    mtp: Tensor
    """Mean nats per token over MTP depths; 0 without MTP."""
    balance: Tensor
    """Mean sequence-wise balance loss over MoE layers, unweighted; 0 without experts."""
    routing: list[RoutingStats]


def compute_losses(
    model: Transformer,
    rows: Tensor,
    mtp_weight: float,
    balance_weight: float,
    teacher: Teacher | None = None,
    before: Tensor | None = None,
    sampler: Sampler | None = None,
) -> Losses:
    """Losses of `rows [B, T + 1 + depth]` of token ids: position i predicts i + 1, MTP depth k predicts i + 1 + k.

    MTP loss: DeepSeek-V3 (2412.19437), equations 24-25. With `mtp_weight` 0 the MTP modules do not run. A `teacher` softens the targets of
    the next token; with a `sampler` the head gives logits of candidates alone, at all depths; `before` as for the model.
    """
    depth = model.config.num_nextn_predict_layers
    length = rows.shape[1] - 1 - depth
    shifted = [rows[:, k : k + length] for k in range(1, depth + 1)] if mtp_weight else []
    output = model(rows[:, :length], mtp_ids=shifted, before=before)
    return losses_of(output, model, rows, mtp_weight, balance_weight, teacher, sampler)


def losses_of(
    output: Output,
    model: Transformer,
    rows: Tensor,
    mtp_weight: float,
    balance_weight: float,
    teacher: Teacher | None = None,
    sampler: Sampler | None = None,
) -> Losses:
    """Losses of what the model made of `rows`."""
    length = output.hidden.shape[1]
    ids, targets = rows[:, :length], rows[:, 1 : 1 + length]
    candidates = None if sampler is None else sampler(ids, targets, output.keys)
    if candidates is not None:
        main = model.sampled_cross_entropy(output.hidden, candidates, output.keys)
    else:
        main = model.cross_entropy(output.hidden, targets, output.keys, None if teacher is None else teacher(ids))

    def ahead(hidden: Tensor, depth: int) -> CrossEntropy:
        if candidates is None:
            return model.cross_entropy(hidden, rows[:, 1 + depth : 1 + depth + length])
        # What is predicted here the main model predicts `depth` positions later: of the same candidates, which the last ones do not have.
        return model.sampled_cross_entropy(hidden[:, : length - depth], candidates.from_position(depth, length))

    zero = torch.zeros((), device=rows.device)
    mtp = mtp_nats = zero
    if output.mtp_hidden:
        depths = [ahead(hidden, depth) for depth, hidden in enumerate(output.mtp_hidden, 1)]
        mtp = torch.stack([found.loss / found.counted for found in depths]).mean()
        mtp_nats = torch.stack([found.nats / found.counted for found in depths]).mean()
    # Each layer's loss counts in full (V3 adds one per layer); the mean is what is shown.
    balance_sum = torch.stack([stats.balance_loss for stats in output.routing]).sum() if output.routing else zero
    total = main.loss / main.counted + mtp_weight * mtp + balance_weight * balance_sum
    balance = balance_sum.detach() / max(len(output.routing), 1)
    return Losses(total, main.nats / main.counted, mtp_nats, balance, output.routing)
