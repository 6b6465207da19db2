"""Pipeline schedules: which pass every device runs, in which order.

A model is cut into `stages`; a device holds one or two of them (or more, interleaved). A schedule is a table with one row
of actions per device. An action is one pass of one micro-batch through one stage, or a forward and a backward pass that
run together and hide each other's communication (DualPipe). Passes: F forward, B full backward, I input gradient only,
W weight gradient only (2401.10241 splits B into I and W to fill bubbles). What the orders cost is simulated in
`timeline.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..config import UserError

Kind = Literal["F", "B", "I", "W"]


class Pass(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int


Action = tuple[Pass, ...]
"""One pass, or (forward, backward) overlapped."""


@dataclass(frozen=True)
class Schedule:
    name: str
    devices: int
    stages: int
    microbatches: int
    rows: tuple[tuple[Action, ...], ...]
    """Actions of every device, in the order in which it runs them."""
    replicas: int = 1
    """Copies of every stage's parameters over the pipeline: 2 for DualPipe."""


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """1F1B (PipeDream-flush): as many forwards as stages follow, then backward and forward in turns."""
    rows = []
    for device in range(devices):
        warmup = min(devices - 1 - device, microbatches)
        row = [Pass("F", device, m) for m in range(warmup)]
        for m in range(microbatches):
            if warmup + m < microbatches:
                row.append(Pass("F", device, warmup + m))
            row.append(Pass("B", device, m))
        rows.append(_single(row))
    return Schedule("1f1b", devices, devices, microbatches, tuple(rows))


def interleaved(devices: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B (2104.04473, section 2.2): device d holds stages d, d + P, ...; micro-batches advance P at a time."""
    if chunks < 2:
        raise UserError(f"interleaved 1F1B with {chunks} stage(s) per device is 1F1B: ask for at least 2")
    total = chunks * microbatches
    rows = []
    for device in range(devices):

        def forward(k: int, device: int = device) -> Pass:
            round_, within = divmod(k, devices * chunks)
            chunk, offset = divmod(within, devices)
            return Pass("F", chunk * devices + device, round_ * devices + offset)

        def backward(k: int, device: int = device) -> Pass:
            round_, within = divmod(k, devices * chunks)
            chunk, offset = divmod(within, devices)
            return Pass("B", (chunks - 1 - chunk) * devices + device, round_ * devices + offset)

        warmup = min(2 * (devices - 1 - device) + (chunks - 1) * devices, total)
        row = [forward(k) for k in range(warmup)]
        for k in range(total):
            if warmup + k < total:
                row.append(forward(warmup + k))
            row.append(backward(k))
        rows.append(_single(row))
    return Schedule("interleaved", devices, chunks * devices, microbatches, tuple(rows))


def zb1p(devices: int, microbatches: int) -> Schedule:
    """ZB-H1 (2401.10241, section 2.1): 1F1B whose weight gradients on device d lag d micro-batches and fill the last bubble.

    Device d starts d forwards fewer than the first one, so the lag costs no memory beyond 1F1B's.
    """
    rows = []
    for device in range(devices):
        warmup = min(devices - 1 - device, microbatches)
        row = [Pass("F", device, m) for m in range(warmup)]
        for m in range(microbatches):
            if warmup + m < microbatches:
                row.append(Pass("F", device, warmup + m))
            row.append(Pass("I", device, m))
            if m >= device:
                row.append(Pass("W", device, m - device))
        row += [Pass("W", device, m) for m in range(max(microbatches - device, 0), microbatches)]
        rows.append(_single(row))
    return Schedule("zb1p", devices, devices, microbatches, tuple(rows))


def zbv(devices: int, microbatches: int) -> Schedule:
    """ZB-V (2401.10241, section 6): device d holds stages d and 2P - 1 - d, so the first device also computes the loss.

    Down the V, devices fill up with forwards of their first stage; each then turns the two stages over in the rhythm
    F I W, F I W, and keeps weight gradients for the end to fill the drain.
    """
    last = 2 * devices - 1
    rows = []
    for device in range(devices):
        down, up = device, last - device
        row: list[Pass] = []
        issued: dict[tuple[Kind, int], int] = {}

        def run(kind: Kind, stage: int, row: list[Pass] = row, issued: dict[tuple[Kind, int], int] = issued) -> None:
            microbatch = issued.get((kind, stage), 0)
            if microbatch < microbatches:
                row.append(Pass(kind, stage, microbatch))
                issued[(kind, stage)] = microbatch + 1

        for _ in range(2 * (devices - device) - 1):
            run("F", down)
        for _ in range(device):
            run("F", up)
            run("F", down)
        for _ in range(devices - device):
            run("F", up)
            run("I", up)
            run("W", up)
        while issued.get(("F", up), 0) < microbatches:
            run("F", down)
            run("I", down)
            run("W", down)
            run("F", up)
            run("I", up)
            run("W", up)
        for _ in range(device):
            run("I", down)
            run("I", up)
        for _ in range(devices - device):
            run("I", down)
            run("W", down)
        for stage in (up, down):
            while issued.get(("W", stage), 0) < microbatches:
                run("W", stage)
        rows.append(_single(row))
    return Schedule("zbv", devices, 2 * devices, microbatches, tuple(rows))


def dualpipe(devices: int, microbatches: int) -> Schedule:
    """DualPipe (DeepSeek-V3, 2412.19437, section 3.2.1): half of the micro-batches enter at either end of the pipeline.

    Device d holds stage d for those that travel down and stage P - 1 - d for those that travel up, so parameters are kept
    twice. Orders follow the published reference schedule (github.com/deepseek-ai/DualPipe).
    """
    half = microbatches // 2
    rows = []
    for device in range(devices):
        mirrored = devices - 1 - device
        near, far = (0, half) if device < mirrored else (half, 0)
        # "near" micro-batches entered at this device's own end of the pipeline; both halves are mirror images
        lanes = _Lane(min(device, mirrored), near), _Lane(max(device, mirrored), far)
        rows.append(_two_way(lanes, devices // 2, min(device, mirrored), half))
    return Schedule("dualpipe", devices, devices, microbatches, tuple(rows), replicas=2)


def dualpipev(devices: int, microbatches: int) -> Schedule:
    """DualPipeV: DualPipe cut in half and folded, so that P devices carry 2P stages in a V, each stage once."""
    last = 2 * devices - 1
    rows = []
    for device in range(devices):
        lanes = _Lane(device, 0), _Lane(last - device, 0)
        rows.append(_two_way(lanes, devices, device, microbatches))
    return Schedule("dualpipev", devices, 2 * devices, microbatches, tuple(rows))


@dataclass
class _Lane:
    """One of the two streams of micro-batches through a device."""

    stage: int
    first: int
    forwards: int = 0
    backwards: int = 0


def _two_way(lanes: tuple[_Lane, _Lane], devices: int, device: int, microbatches: int) -> tuple[Action, ...]:
    """Row of a device, `device` steps from the outer end of `devices`, that serves two lanes of `microbatches` each."""
    row: list[Action] = []
    owed: deque[Pass] = deque()  # weight gradients still to be computed
    inner = devices - device - 1  # devices between this one and the turning point

    def forward(lane: int) -> Pass:
        it = lanes[lane]
        it.forwards += 1
        return Pass("F", it.stage, it.first + it.forwards - 1)

    def backward(lane: int, split: bool = False) -> Pass:
        it = lanes[lane]
        it.backwards += 1
        done = Pass("I" if split else "B", it.stage, it.first + it.backwards - 1)
        if split:
            owed.append(Pass("W", done.stage, done.microbatch))
        return done

    for _ in range(2 * inner):  # fill with the near lane
        row.append((forward(0),))
    for _ in range(device + 1):  # the far lane arrives
        row.append((forward(0),))
        row.append((forward(1),))
    for _ in range(inner):  # its first gradients, split so that they pass on early
        row.append((backward(1, split=True),))
        row.append((owed.popleft(),))
        row.append((forward(1),))
    for turn in range(microbatches - 2 * devices + device + 1):  # steady state: everything overlaps
        if turn == 0 and inner == 0:
            row += [(forward(0),), (backward(1),)]  # both ends of the turn are on this device: nothing to overlap with yet
        else:
            row.append((forward(0), backward(1)))
        row.append((forward(1), backward(0)))
    for _ in range(inner):  # the near lane has no forwards left
        row.append((backward(1),))
        row.append((forward(1), backward(0)))
    for turn in range(device + 1):  # drain; the second half of it splits, to send gradients on as early as possible
        late = 2 * turn + 1
        row.append((backward(1, split=late > device + 1),))
        row.append((backward(0, split=late >= device + 1),))
    for _ in range(inner):
        row.append((owed.popleft(),))
        row.append((backward(0, split=True),))
    row += [(weights,) for weights in owed]
    return tuple(row)


def _single(passes: list[Pass]) -> tuple[Action, ...]:
    return tuple((each,) for each in passes)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "zbv": zbv,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def stages_of(name: str, devices: int, chunks: int = 2) -> int:
    """Number of stages that `name` cuts a model into."""
    per_device = {"interleaved": chunks, "zbv": 2, "dualpipev": 2}
    return devices * per_device.get(name, 1)


def smallest_microbatches(name: str, devices: int) -> int:
    """Fewest micro-batches that the schedule's order is defined for."""
    return {"interleaved": devices, "zbv": 2 * devices, "dualpipe": 2 * devices, "dualpipev": 2 * devices}.get(name, 1)


def undefined(name: str, devices: int, microbatches: int) -> str | None:
    """Why the schedule called `name` is not defined for these numbers, and the nearest for which it is; None if it is."""
    if name not in SCHEDULES:
        return f"there is no pipeline schedule {name!r}: use one of {', '.join(SCHEDULES)}"
    if devices < 1 or microbatches < 1:
        return f"a pipeline of {devices} devices and {microbatches} micro-batches cannot run: use at least 1 of each"
    if name == "dualpipe" and devices % 2:
        return f"DualPipe pairs devices from both ends, but there are {devices}: use PP {devices + 1}, or dualpipev"
    least = smallest_microbatches(name, devices)
    if microbatches < least:
        return f"{name} on {devices} devices needs at least {least} micro-batches, {least - microbatches} more than {microbatches}"
    if name == "dualpipe" and microbatches % 2:
        return f"DualPipe sends half of the micro-batches each way: use {microbatches + 1} instead of {microbatches}"
    if name == "interleaved" and microbatches % devices:
        nearest = devices * max(1, round(microbatches / devices))
        return f"interleaved 1F1B advances {devices} micro-batches at a time: use {nearest} instead of {microbatches}"
    return None


def build(name: str, devices: int, microbatches: int, chunks: int = 2) -> Schedule:
    """The schedule called `name`. Raises `UserError` where it is not defined."""
    wrong = undefined(name, devices, microbatches)
    if wrong:
        raise UserError(wrong)
    if name == "interleaved":
        return interleaved(devices, microbatches, chunks)
    return SCHEDULES[name](devices, microbatches)


def full_activations(name: str, devices: int, chunks: int = 2) -> int:
    """Activations, of one stage each, that the fullest device holds once there are enough micro-batches."""
    if name == "interleaved":
        return devices * chunks + devices - 1
    return {"zbv": 2 * devices, "dualpipe": devices + 1, "dualpipev": 2 * devices + 1}.get(name, devices)
