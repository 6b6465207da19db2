"""Forward and backward passes of one optimizer step, the way a layout makes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..parallel import micro_batch
from ..runtime import Machine
from .balance import StepRouting
from .loss import Losses, compute_losses
from .state import TrainState


class Passes(Protocol):
    """Leaves this process's share of the gradients in the parameters."""

    def __call__(self, batch: Tensor, mtp_weight: float) -> tuple[Tensor, StepRouting]:
        """Of `batch [B, T + 1 + depth]`, this process's rows of a step.

        Returns the means `[4]` of total, main, MTP and balance loss over these rows, and their routing.
        """
        ...


class PlainPasses:
    """One micro-batch after the other, each forward and then backward."""

    def __init__(self, state: TrainState, machine: Machine) -> None:
        self.state, self.machine, self.config = state, machine, state.config
        self.rows = micro_batch(state.config, state.team.layout.data)

    def __call__(self, batch: Tensor, mtp_weight: float) -> tuple[Tensor, StepRouting]:
        micro_batches = batch.split(self.rows)
        parts = len(micro_batches) * self.state.team.layout.data
        figures, routing = [], StepRouting()
        for rows in micro_batches:
            losses = self.forward_backward(rows, mtp_weight, parts)
            figures.append(torch.stack([losses.total.detach(), losses.main, losses.mtp, losses.balance]))
            routing.add(losses.routing)
            # What is left of its graph would lie between the large blocks that the next forward pass wants to use again.
            del losses
        return torch.stack(figures).mean(0), routing

    def forward_backward(self, rows: Tensor, mtp_weight: float, parts: int) -> Losses:
        """Losses of one of `parts` equal parts of a step."""
        with self.machine.autocast():
            losses = compute_losses(self.state.model, rows.to(self.machine.device), mtp_weight, self.config.balance.sequence_loss)
        (losses.total / parts).backward()
        return losses


def make_passes(state: TrainState, machine: Machine) -> Passes:
    """What `state.config.parallel` asks for."""
    return PlainPasses(state, machine)
