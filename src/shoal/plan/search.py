"""The best layout that fits, and the plan nearest to one that cannot work."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import log2
from typing import Any

from ..config import ModelConfig, UserError
from . import schedule as schedules
from .assumptions import Assumptions
from .hardware import GIB, Machine
from .layout import Layout, Stage, problem, stage_kinds, stage_parameters
from .memory import moments_per_parameter, stage_activation_bytes, state_memory, working_bytes
from .training import PassTime, Step, fits, layer_time, plan_step, usable_memory

_SCHEDULES = ("1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")
_RECOMPUTE = ("none", "selective", "full")


def candidates(model: ModelConfig, machine: Machine, like: Layout, batch: int, fixed: Collection[str] = ()) -> Iterator[Layout]:
    """Layouts on the devices of `like` that keep every constraint except perhaps memory; precision and optimizer stay, and the `fixed`
    fields of a layout."""

    def choices(field: str, some: Collection[Any]) -> Collection[Any]:
        return (getattr(like, field),) if field in fixed else some

    experts = (model.n_routed_experts or 1) if model.uses_mla else 1
    for pipeline in choices("pipeline", _divisors(like.devices, model.num_hidden_layers)):
        data = like.devices // pipeline
        for expert in choices("expert", [e for e in _divisors(data, experts) if experts % e == 0]):
            for schedule in choices("schedule", _SCHEDULES if pipeline > 1 else ("1f1b",)):
                for micro_batch in choices("micro_batch", sorted({1, 2, 4, like.micro_batch})):
                    layout = replace(like, pipeline=pipeline, expert=expert, schedule=schedule, micro_batch=micro_batch)
                    if problem(model, machine, layout, batch) is None:
                        for recompute in choices("recompute", _RECOMPUTE):
                            for zero in choices("zero", (1, 3)):
                                yield replace(layout, recompute=recompute, zero=zero)


def _divisors(number: int, limit: int) -> list[int]:
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def find_best(
    model: ModelConfig,
    machine: Machine,
    like: Layout,
    batch: int,
    sequence_length: int,
    assumptions: Assumptions,
    fixed: Collection[str] = (),
) -> Step:
    """The fastest layout that fits on the devices of `like`, with its `fixed` fields. Raises `UserError` with the nearest plan if none.

    All layouts are ranked by the published bubble formulas and average stages; the best of the ranking are simulated.
    """
    scout = _Scout(model, machine, batch, sequence_length, assumptions)
    possible = [layout for layout in candidates(model, machine, like, batch, fixed) if scout.may_fit(layout)]
    ranked = sorted(possible, key=scout.seconds)
    steps: list[tuple[float, int, Layout]] = []
    for layout in ranked:
        step = _short_step(model, machine, layout, batch, sequence_length, assumptions)
        if fits(step, machine, assumptions):
            steps.append((_full_seconds(step, batch), len(steps), layout))
        if len(steps) == 12:
            break
    if not steps:
        smallest = {field: value for field, value in (("zero", 3), ("recompute", "full")) if field not in fixed}
        raise UserError(explain(model, machine, replace(like, **smallest), batch, sequence_length, assumptions))  # type: ignore[arg-type]
    return plan_step(model, machine, min(steps)[2], batch, sequence_length, assumptions)


class _Scout:
    """Quick estimates of layouts of one job, for ranking only."""

    def __init__(self, model: ModelConfig, machine: Machine, batch: int, sequence_length: int, a: Assumptions) -> None:
        self.model, self.machine, self.batch, self.sequence_length, self.a = model, machine, batch, sequence_length, a
        modules = range(model.num_hidden_layers + model.num_nextn_predict_layers)
        self.whole = Stage(tuple(modules), embedding=True, head=True)
        self.kinds = stage_kinds(model, self.whole)
        self.parameters = stage_parameters(model, self.whole)
        self.moments = {optimizer: moments_per_parameter(model, self.whole, optimizer) for optimizer in ("adamw", "muon")}
        self.times: dict[tuple[object, ...], PassTime] = {}
        self.activations: dict[str, float] = {}

    def may_fit(self, layout: Layout) -> bool:
        """False where the average device alone needs more memory than there is."""
        replicas = 2 if layout.pipeline_schedule == "dualpipe" else 1
        share = replicas / layout.pipeline
        replicated, experts = (share * count for count in self.parameters)
        states = state_memory(replicated, experts, self.moments[layout.optimizer], layout, replicas)
        if layout.recompute not in self.activations:
            self.activations[layout.recompute] = stage_activation_bytes(self.model, self.whole, layout, 1)
        stages = schedules.stages_of(layout.pipeline_schedule, layout.pipeline, layout.chunks)
        held = schedules.full_activations(layout.pipeline_schedule, layout.pipeline, layout.chunks)
        held = min(held, layout.microbatches(self.batch) * stages // layout.pipeline)
        tokens = layout.micro_batch * self.sequence_length
        activations = held / stages * tokens * self.activations[layout.recompute]
        working = working_bytes(self.model, True in (moe for moe, _ in self.kinds), layout, tokens)
        return states.total + activations + working <= usable_memory(self.machine, self.a)

    def seconds(self, layout: Layout) -> float:
        """Seconds of a step of average stages, with the bubble of the published formula."""
        key = (layout.expert, layout.micro_batch, layout.recompute, layout.zero, layout.zero == 3 and layout.data)
        if key not in self.times:
            tokens, context = layout.micro_batch * self.sequence_length, (self.sequence_length + 1) / 2
            total = PassTime()
            for (moe, module), layers in self.kinds.items():
                one = layer_time(self.model, moe, module, self.machine, layout, tokens, context, self.a)
                total = sum((one for _ in range(layers)), total)
            self.times[key] = total
        pipeline, name = layout.pipeline, layout.pipeline_schedule
        cost = self.times[key].stage_cost(name.startswith("dualpipe"), self.a.communication_sm_share)
        forward, backward, weights, pair = cost.forward, cost.backward, cost.weight_gradient, cost.pair
        bubble = {
            "1f1b": (pipeline - 1) * (forward + backward),
            "interleaved": (pipeline - 1) * (forward + backward) / layout.chunks,
            "zb1p": (pipeline - 1) * (forward + backward - 2 * weights),
            "zbv": (pipeline - 1) * forward / 2,
            "dualpipe": (pipeline / 2 - 1) * (pair + backward - 3 * weights),
            "dualpipev": (pipeline - 1) / 2 * (pair + backward - 3 * weights),
        }[name]
        return (layout.microbatches(self.batch) * pair + bubble) / pipeline


def _short_step(model: ModelConfig, machine: Machine, layout: Layout, batch: int, sequence_length: int, a: Assumptions) -> Step:
    unit = layout.data * layout.micro_batch
    least = max(schedules.smallest_microbatches(layout.pipeline_schedule, layout.pipeline), layout.pipeline)
    return plan_step(model, machine, layout, min(batch, unit * least), sequence_length, a)


def _full_seconds(step: Step, batch: int) -> float:
    """Seconds of a step of `batch` sequences, from a shorter one: the bubble stays, the work grows."""
    work = step.timeline.makespan - step.bubble
    return step.seconds + work * (batch / step.batch - 1)


def explain(model: ModelConfig, machine: Machine, layout: Layout, batch: int, sequence_length: int, assumptions: Assumptions) -> str | None:
    """Why the plan cannot work, by how much, and the nearest one that does, in one line; None if it works."""
    reason = problem(model, machine, layout, batch)
    if reason is None:
        step = plan_step(model, machine, layout, batch, sequence_length, assumptions)
        usable = usable_memory(machine, assumptions)
        over = step.memory.total - usable
        if over <= 0:
            return None
        reason = (
            f"does not fit: {step.memory.total / GIB:.1f} GiB per device, {over / GIB:.1f} GiB more than the "
            f"{usable / GIB:.1f} GiB that {machine.name} leaves"
        )
    found = nearest_plan(model, machine, layout, batch, sequence_length, assumptions)
    if found is None:
        return f"{reason}; no plan with up to 64 times the devices works: use a smaller model or a machine with more memory"
    nearest, its_batch = found
    change = f", batch {its_batch}" if its_batch != batch else ""
    return f"{reason}. Nearest plan that works: {nearest.describe()}{change}"


def nearest_plan(
    model: ModelConfig, machine: Machine, layout: Layout, batch: int, sequence_length: int, assumptions: Assumptions
) -> tuple[Layout, int] | None:
    """The layout with the fewest and smallest changes that works, and its batch: same devices first, then more."""
    for factor in (1, 2, 4, 8, 16, 32, 64):
        devices = layout.devices * factor
        if devices > machine.devices_per_node:
            devices = _round_up(devices, machine.devices_per_node)
        wanted = replace(layout, devices=devices)
        ranked: list[tuple[float, int, Layout, int]] = []
        for its_batch in sorted({batch, _round_up(batch, devices), _round_up(batch, 4 * devices)}):
            scout = _Scout(model, machine, its_batch, sequence_length, assumptions)
            for other in candidates(model, machine, wanted, its_batch):
                if scout.may_fit(other):
                    ranked.append((_distance(layout, other) + 2 * (its_batch != batch), len(ranked), other, its_batch))
        for _, _, other, its_batch in sorted(ranked, key=lambda item: item[:2]):
            step = _short_step(model, machine, other, its_batch, sequence_length, assumptions)
            if fits(step, machine, assumptions):
                return other, its_batch
    return None


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _distance(wanted: Layout, other: Layout) -> float:
    """Doublings of PP, EP, devices and micro-batch, and one for every other choice that changes."""
    doublings = sum(abs(log2(getattr(wanted, name) / getattr(other, name))) for name in ("pipeline", "expert", "devices", "micro_batch"))
    schedule = wanted.schedule != other.schedule and other.pipeline > 1
    recompute = abs(_RECOMPUTE.index(wanted.recompute) - _RECOMPUTE.index(other.recompute))
    return doublings + schedule + recompute / 2 + (wanted.zero != other.zero) / 2
