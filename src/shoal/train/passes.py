"""Forward and backward passes of one optimizer step, the way a layout makes them."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..model import Output
from ..parallel import Halves, Pipeline, TravellingDispatcher, micro_batch
from ..runtime import Machine
from .balance import StepRouting
from .loss import Losses, compute_losses, losses_of
from .state import TrainState


class Passes(Protocol):
    """Leaves this process's share of the gradients in the parameters."""

    def __call__(self, batch: Tensor, mtp_weight: float) -> tuple[Tensor, StepRouting]:
        """Of `batch [B, looks_back + T + 1 + depth]`, this process's rows of a step.

        Returns the means `[4]` of total, main, MTP and balance loss over these rows, and their routing.
        """
        ...

    def run(self, ids: Tensor, before: Tensor | None) -> Output | None:
        """What the main model makes of `ids [B, T]` behind `before`, without gradients; None where another process has it."""
        ...

    def figures(self) -> dict[str, float]:
        """What the last step showed of this process's waiting: `exposed_seconds` for tokens, `idle_share` of its place in a pipeline."""
        ...


class PlainPasses:
    """One micro-batch after the other, each forward and then backward."""

    def __init__(self, state: TrainState, machine: Machine) -> None:
        self.state, self.machine, self.config = state, machine, state.config
        self.rows = micro_batch(state.config, state.team.layout.data)
        self.halves = Halves()
        for moe in state.model.moe_layers:
            if isinstance(moe.dispatcher, TravellingDispatcher):
                moe.dispatcher.courier = self.halves

    def __call__(self, batch: Tensor, mtp_weight: float) -> tuple[Tensor, StepRouting]:
        self.halves.exposed_seconds = 0.0
        micro_batches = batch.split(self.rows)
        parts = len(micro_batches) * self.state.team.layout.data
        figures, routing = [], StepRouting()
        for rows in micro_batches:
            for losses in self.forward_backward(rows, mtp_weight, parts):
                figures.append(torch.stack([losses.total.detach(), losses.main, losses.mtp, losses.balance]))
                routing.add(losses.routing)
                # What is left of its graph would lie between the large blocks that the next forward pass wants to use again.
                del losses
        return torch.stack(figures).mean(0), routing

    def forward_backward(self, rows: Tensor, mtp_weight: float, parts: int) -> list[Losses]:
        """Losses of one of `parts` equal parts of a step."""
        with self.machine.autocast():
            alpha, state = self.config.balance.sequence_loss, self.state
            back, rows = self.config.model.looks_back, rows.to(self.machine.device)
            before = rows[:, :back] if back else None
            losses = compute_losses(state.model, rows[:, back:], mtp_weight, alpha, state.teacher, before, state.sampler)
        if not self.state.config.update_early or losses.total.detach().isfinite():  # nothing could be taken back
            (losses.total / parts).backward()
        return [losses]

    def run(self, ids: Tensor, before: Tensor | None) -> Output | None:
        output: Output = self.state.model(ids, before=before)
        return output

    def figures(self) -> dict[str, float]:
        return {"exposed_seconds": self.halves.exposed_seconds} if self.state.team.layout.expert > 1 else {}


class HalvedPasses(PlainPasses):
    """Two halves of every micro-batch in turns: one computes while the tokens of the other travel to experts."""

    def forward_backward(self, rows: Tensor, mtp_weight: float, parts: int) -> list[Losses]:
        first, second = (partial(super(HalvedPasses, self).forward_backward, half, mtp_weight, 2 * parts) for half in rows.chunk(2))
        return [losses for half in self.halves.run(first, second) for losses in half]


class PipelinePasses:
    """All micro-batches of a step through the stages of a pipeline."""

    def __init__(self, state: TrainState, machine: Machine) -> None:
        self.state, self.config, self.device = state, state.config, machine.device
        config, team = state.config, state.team
        rows = micro_batch(config, team.layout.data)
        self.count = config.batch_size // team.layout.data // rows
        self.parts = self.count * team.layout.data
        self.mtp_weight = 0.0
        self.losses: list[Losses] = []
        shape = (rows, config.sequence_length + 1 + config.model.num_nextn_predict_layers)
        self.pipeline = Pipeline(state.model, team, self._finish, machine.autocast, shape, self.count)

    def _finish(self, output: Output, rows: Tensor) -> Tensor:
        losses = losses_of(output, self.state.model, rows, self.mtp_weight, self.config.balance.sequence_loss)
        total = losses.total
        losses.total = total.detach()
        self.losses.append(losses)
        return total / self.parts

    def __call__(self, batch: Tensor, mtp_weight: float) -> tuple[Tensor, StepRouting]:
        model, alpha = self.config.model, self.config.balance.sequence_loss
        self.mtp_weight, self.losses = mtp_weight, []
        depth = model.num_nextn_predict_layers if mtp_weight else 0
        seen = self.pipeline.step(batch.to(self.device), depth, alpha / self.parts)
        mixtures = [i for i in range(model.num_hidden_layers + depth) if model.is_moe_layer(i)]
        passes = [([mixtures.index(i) for i in stage.layers], stage.routing) for stage in seen]
        routing = StepRouting.of_stages(passes, (len(mixtures), model.n_routed_experts or 0), self.count, self.device)
        zero = torch.zeros((), device=self.device)
        balance = sum((stage.balance for stage in seen), zero) / self.count
        main, mtp = (sum((getattr(loss, name) for loss in self.losses), zero) / self.count for name in ("main", "mtp"))
        # Each process adds its part of the total: the balance losses of its layers, and the last stage the others.
        total = main + mtp_weight * mtp + alpha * balance
        return torch.stack([total, main, mtp, balance / max(len(mixtures), 1)]), routing

    def run(self, ids: Tensor, before: Tensor | None) -> Output | None:
        assert before is None, "stages pass hidden states alone"
        hidden = self.pipeline.hidden(ids)
        return None if hidden is None else Output(hidden, [], [])

    def figures(self) -> dict[str, float]:
        trace = self.pipeline.trace
        return {"idle_share": 1 - sum(i.end - i.start for i in trace) / self.pipeline.seconds}


def make_passes(state: TrainState, machine: Machine) -> Passes:
    """What `state.config.parallel` asks for."""
    if state.team.layout.pipeline > 1:
        return PipelinePasses(state, machine)
    if state.config.parallel.overlap:
        return HalvedPasses(state, machine)
    return PlainPasses(state, machine)
