"""A model cut into stages, which torch's pipeline schedules run.

The embedding lies on the first stage, head and multi-token prediction on the last. Modules of multi-token prediction embed tokens
too: where first and last stage are on different processes both hold the embedding, and its gradients are summed. Every stage gets the
batch's token ids besides the hidden states of the stage before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model import Context, Output, RoutingStats, Transformer, rotary_tables
from ..model.layers import Linear
from .layout import V_SHAPED, Layout
from .team import Team

Finish = Callable[[Output, Tensor], Tensor]
"""Turns the output of the last stage and the token ids of a micro-batch into what is differentiated."""
Surroundings = Callable[[], AbstractContextManager]
"""What a forward pass runs in: autocast."""


def stages_of(layout: Layout, process: int) -> list[int]:
    """The stages of a process of the pipeline."""
    if layout.schedule in V_SHAPED:
        return [process, layout.stages - 1 - process]
    return list(range(process, layout.stages, layout.pipeline))


def home_of(layout: Layout, stage: int) -> int:
    """The process of the pipeline that has a stage."""
    return next(process for process in range(layout.pipeline) if stage in stages_of(layout, process))


def layers_of(layers: int, stages: int, stage: int) -> range:
    """Layers of a stage: as many on each, the later ones with one more where they do not divide."""
    return range(stage * layers // stages, (stage + 1) * layers // stages)


def holds_embedding_twice(model: Transformer, layout: Layout) -> bool:
    """Whether first and last stage are on different processes and both need the embedding."""
    apart = layout.pipeline > 1 and home_of(layout, layout.stages - 1) != 0
    return apart and bool(model.config.num_nextn_predict_layers or model.config.tie_word_embeddings)


def keep_stages(model: Transformer, team: Team) -> None:
    """Drop the layers of the stages that other processes have."""
    layout = team.layout
    mine = stages_of(layout, team.stage)
    is_first, is_last = 0 in mine, layout.stages - 1 in mine
    count = model.config.num_hidden_layers
    kept = {layer for stage in mine for layer in layers_of(count, layout.stages, stage)}
    for i in range(len(model.model.layers)):
        if i not in kept and not (is_last and i >= count):
            model.model.layers[i] = nn.Identity()
    if not is_last:
        model.model.norm = nn.Identity()  # type: ignore[assignment]
        model.lm_head = nn.Identity()  # type: ignore[assignment]
    if not (is_first or (is_last and holds_embedding_twice(model, layout))):
        model.model.embed_tokens = nn.Identity()


@dataclass
class Seen:
    """What one stage did with one micro-batch."""

    layers: list[int]
    """Its mixtures of experts, by their number among all layers."""
    routing: list[RoutingStats]
    balance: Tensor
    """Sum of their balance losses, without gradient."""


class Stage(nn.Module):
    """Consecutive layers; the last stage returns the loss that `finish` makes of its output and the token ids."""

    def __init__(
        self,
        model: Transformer,
        number: int,
        stages: int,
        finish: Finish,
        context: Surroundings,
    ) -> None:
        super().__init__()
        self.context, self.finish = context, finish
        self.layers = layers_of(model.config.num_hidden_layers, stages, number)
        self.is_first, self.is_last = number == 0, number == stages - 1
        self._whole = (model,)  # not as a module: the other stages' parameters are none of this one's
        parts: list[nn.Module] = [model.model.layers[layer] for layer in self.layers]
        if self.is_first or (self.is_last and (model.mtp_modules or model.config.tie_word_embeddings)):
            parts.append(model.model.embed_tokens)
        if self.is_last:
            parts += [*model.mtp_modules, model.model.norm, model.lm_head]
        self.parts = nn.ModuleList(parts)
        self.mtp_depth = 0
        self.balance_share = 0.0
        """What the gradient of a micro-batch's balance losses counts, on a stage that is not the last."""
        self.seen: list[Seen] = []

    @property
    def model(self) -> Transformer:
        return self._whole[0]

    def hidden(self, x: Tensor, length: int, ids: Tensor) -> tuple[Tensor, list[RoutingStats]]:
        """`ids [B, L]` or hidden states `x [B, length, D]` through the layers."""
        if self.is_first:
            x = self.model.model.embed_tokens(ids[:, :length])
        context = self._context(length, x)
        routing = []
        for layer in self.layers:
            x, stats = self.model.model.layers[layer](x, context, None)
            if stats is not None:
                routing.append(stats)
        return x, routing

    def _context(self, length: int, x: Tensor) -> Context:
        positions = torch.arange(length, device=x.device).unsqueeze(0)
        return Context(positions, *rotary_tables(self.model.config, positions))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows `[B, T + 1 + depth]` of token ids, and for all but the first stage hidden states `x [B, T, D]`."""
        config = self.model.config
        length = rows.shape[1] - 1 - config.num_nextn_predict_layers
        with self.context():
            x, routing = self.hidden(x, length, rows)
            layers = [layer for layer in self.layers if config.is_moe_layer(layer)]
            if not self.is_last:
                return self._with_balance_loss(x, layers, routing)
            shifted = [rows[:, k : k + length] for k in range(1, self.mtp_depth + 1)]
            hidden, mtp_hidden, more = self.model.finish(x, self._context(length, x), shifted)
            layers += [layer for layer in range(config.num_hidden_layers, config.num_hidden_layers + self.mtp_depth) if more]
            self._note(layers, routing + more)
            return self.finish(Output(hidden, mtp_hidden, routing + more), rows)

    def _with_balance_loss(self, x: Tensor, layers: list[int], routing: list[RoutingStats]) -> Tensor:
        """Remember the routing; let the balance losses of this stage have their gradient, since no loss follows here."""
        self._note(layers, routing)
        if not routing:
            return x
        return _WithLoss.apply(x, torch.stack([stats.balance_loss for stats in routing]).sum() * self.balance_share)

    def _note(self, layers: list[int], routing: list[RoutingStats]) -> None:
        balance = torch.stack([stats.balance_loss.detach() for stats in routing]).sum() if routing else torch.zeros(())
        self.seen.append(Seen(layers, [RoutingStats(s.load, s.balance_loss.detach(), s.entropy, s.indices) for s in routing], balance))


class _WithLoss(torch.autograd.Function):
    """`x` itself; its backward pass also differentiates `loss`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.clone()  # not a view: torch detaches the outputs of stages in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


@dataclass(frozen=True)
class Interval:
    """One pass of one micro-batch through one stage, as a trace has it; kinds as in a schedule's table."""

    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


class Pipeline:
    """The stages of this process, and the schedule that runs them with those of the others."""

    def __init__(
        self,
        model: Transformer,
        team: Team,
        finish: Finish,
        context: Surroundings,
        rows: tuple[int, int],
        micro_batches: int,
    ) -> None:
        """`rows` is the shape of one micro-batch of token ids; `finish` turns the last stage's output into what is differentiated."""
        # Only here: they bring torch's compiler with them, 150 MB.
        from torch.distributed.fsdp import FSDPModule, fully_shard
        from torch.distributed.tensor import DTensor

        from .traced import SCHEDULES, TracedStage

        self.model, self.team = model, team
        layout, config = team.layout, model.config
        if layout.schedule in V_SHAPED:
            for module in model.modules():  # only torch's own products can compute one gradient now and the other one later
                if type(module) is Linear:
                    module.__class__ = nn.Linear  # type: ignore[assignment]
        self.trace: list[Interval] = []
        """Of the last step, and how long that took."""
        self.seconds = 0.0
        device = next(model.parameters()).device
        group = team.group("pipeline")
        self.stages = {n: Stage(model, n, layout.stages, finish, context) for n in stages_of(layout, team.stage)}
        for stage in self.stages.values():
            if any(isinstance(part, FSDPModule) for part in stage.modules()):
                # As the root of its layers: torch's stages then leave their gradients alone until the last micro-batch is through.
                own = {p for p in stage.parameters() if not isinstance(p, DTensor)}
                fully_shard(stage, mesh=team.data_mesh, reshard_after_forward=False, ignored_params=own)
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        hidden = torch.empty(rows[0], rows[1] - 1 - config.num_nextn_predict_layers, config.hidden_size, device=device).requires_grad_()
        runners = []
        for number, stage in self.stages.items():
            output = torch.empty((), device=device).requires_grad_() if stage.is_last else hidden
            runner = TracedStage(stage, number, layout.stages, device, ids if stage.is_first else hidden, output, group=group)
            runner.trace = self.trace
            runners.append(runner)
        make: Any = SCHEDULES[layout.schedule]
        several = layout.schedule != "1f1b"
        self.schedule = make(runners if several else runners[0], micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False)

    def step(self, batch: Tensor, mtp_depth: int, balance_share: float) -> list[Seen]:
        """Forward and backward passes of `batch`, all micro-batches; what the stages of this process saw, stage by stage."""
        for stage in self.stages.values():
            stage.seen, stage.mtp_depth, stage.balance_share = [], mtp_depth, balance_share
        self.trace.clear()
        began = time.perf_counter()
        is_last = any(stage.is_last for stage in self.stages.values())
        args = (batch,) if 0 in self.stages else ()
        self.schedule.step(*args, rows=batch, return_outputs=False, **({"target": batch} if is_last else {}))
        self.seconds = time.perf_counter() - began
        return [seen for stage in self.stages.values() for seen in stage.seen]

    def hidden(self, ids: Tensor) -> Tensor | None:
        """Last hidden states of `ids [B, T]`, from stage to stage without overlap; None where another process has the last stage."""
        layout, group = self.team.layout, self.team.group("pipeline")
        x: Tensor | None = None
        for number in range(layout.stages):
            home = home_of(layout, number)
            if number and home != home_of(layout, number - 1):
                before = home_of(layout, number - 1)
                if self.team.stage == before:
                    assert x is not None
                    dist.send(x.contiguous(), group=group, group_dst=home)
                    x = None
                elif self.team.stage == home:
                    x = torch.empty(*ids.shape, self.model.config.hidden_size, device=ids.device)
                    dist.recv(x, group=group, group_src=before)
            if self.team.stage == home:
                x, _ = self.stages[number].hidden(ids if x is None else x, ids.shape[1], ids)
        return None if x is None else self.model.model.norm(x)
