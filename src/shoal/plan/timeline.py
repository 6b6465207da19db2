"""Simulation of a pipeline schedule: when every pass, send and receive starts and ends, and what stays idle.

Devices run their row in order; a pass starts as soon as its device is free and what it needs has arrived. Transfers run
beside the computation. Activations are counted from the start of a forward pass to the end of the last backward pass that
needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import UserError
from .schedule import Action, Pass, Schedule


@dataclass(frozen=True)
class StageCost:
    """Seconds (or any unit) of the passes of one micro-batch through one stage, run alone."""

    forward: float
    input_gradient: float
    weight_gradient: float
    overlapped: float | None = None
    """A forward and a full backward pass of two micro-batches that hide each other's communication; None: their sum."""

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    @property
    def pair(self) -> float:
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    @property
    def saved_by_overlap(self) -> float:
        return self.forward + self.backward - self.pair

    def alone(self, kind: str) -> float:
        return {"F": self.forward, "B": self.backward, "I": self.input_gradient, "W": self.weight_gradient}[kind]


@dataclass(frozen=True)
class Event:
    """An action on a device, or one end of a transfer (`kind` send or receive) between two devices."""

    device: int
    kind: str
    passes: Action
    start: float
    end: float


@dataclass
class Timeline:
    schedule: Schedule
    compute: list[list[Event]] = field(default_factory=list)
    """Per device, in order."""
    transfers: list[Event] = field(default_factory=list)

    @property
    def makespan(self) -> float:
        return max(row[-1].end for row in self.compute)

    def busy(self, device: int) -> float:
        return sum(event.end - event.start for event in self.compute[device])

    @property
    def bubble(self) -> float:
        """Idle time, from start to end of the whole pipeline, of the device that idles most: what the published formulas give."""
        return max(self.makespan - self.busy(device) for device in range(len(self.compute)))

    def peak_activations(self, device: int) -> int:
        """Most micro-batch activations, each of one stage, that the device holds at a time."""
        held = peak = 0
        for event in self.compute[device]:
            held += sum(p.kind == "F" for p in event.passes)
            peak = max(peak, held)
            held -= sum(p.kind in "BW" for p in event.passes)
        return peak


def simulate(schedule: Schedule, costs: StageCost | Sequence[StageCost], transfer: float = 0.0) -> Timeline:
    """Run `schedule` with the given cost of every stage (or one for all) and `transfer` time between devices.

    Raises `UserError` if the order deadlocks: some pass waits for another that comes after it.
    """
    per_stage = [costs] * schedule.stages if isinstance(costs, StageCost) else list(costs)
    if len(per_stage) != schedule.stages:
        raise UserError(f"{schedule.name} has {schedule.stages} stages, but costs of {len(per_stage)} are given")
    home = {p: device for device, row in enumerate(schedule.rows) for action in row for p in action}
    finished: dict[Pass, float] = {}
    timeline = Timeline(schedule, [[] for _ in schedule.rows])
    clock = [0.0] * schedule.devices
    position = [0] * schedule.devices
    last_stage = schedule.stages - 1

    def needs(p: Pass) -> list[Pass]:
        """What must be finished before `p`; gradients come from I or B, whichever the next stage ran."""
        if p.kind == "F":
            return [] if p.stage == 0 else [Pass("F", p.stage - 1, p.microbatch)]
        if p.kind == "W":
            return [Pass("I", p.stage, p.microbatch)]
        needed = [Pass("F", p.stage, p.microbatch)]
        if p.stage < last_stage:
            split = Pass("I", p.stage + 1, p.microbatch)
            needed.append(split if split in home else Pass("B", p.stage + 1, p.microbatch))
        return needed

    running = True
    while running:
        running = False
        for device, row in enumerate(schedule.rows):
            while position[device] < len(row):
                action = row[position[device]]
                inputs = [(p, source) for p in action for source in needs(p)]
                if not all(source in finished for _, source in inputs):
                    break
                start = clock[device]
                for p, source in inputs:
                    arrival = finished[source]
                    if home[source] != device:
                        arrival += transfer
                        timeline.transfers.append(Event(home[source], "send", (source,), finished[source], arrival))
                        timeline.transfers.append(Event(device, "receive", (p,), finished[source], arrival))
                    start = max(start, arrival)
                length = sum(per_stage[p.stage].alone(p.kind) for p in action)
                if len(action) == 2:
                    length -= sum(per_stage[p.stage].saved_by_overlap for p in action) / 2
                clock[device] = start + length
                finished.update((p, clock[device]) for p in action)
                kind = "".join(p.kind for p in action)
                timeline.compute[device].append(Event(device, kind, action, start, clock[device]))
                position[device] += 1
                running = True
    stuck = [device for device, row in enumerate(schedule.rows) if position[device] < len(row)]
    if stuck:
        raise UserError(f"{schedule.name} deadlocks: device {stuck[0]} waits at its action {position[stuck[0]]} for ever")
    return timeline
