"""Pictures of a plan: the pipeline's timeline, and the memory stack beside the time of a step and the cost curve."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..config import UserError
from .hardware import GIB
from .timeline import Timeline
from .training import Step

_COLOURS = {"F": "#4c78a8", "B": "#54a24b", "I": "#88d27a", "W": "#e8a838"}
_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def draw_timeline(timeline: Timeline, out: str) -> None:
    """One row per device, time to the right, micro-batch numbers in the boxes; overlapped pairs are stacked; lines are transfers.

    Raises `UserError` where the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    devices = len(timeline.compute)
    figure = Figure(figsize=(16, 1.5 + 0.45 * devices), layout="constrained")
    axes = figure.add_subplot()
    # a number needs about 4 points a digit of the figure's thousand and a bit; where most boxes are narrower, lines would hide them too
    wide = timeline.makespan / 1060 * 4
    for device, row in enumerate(timeline.compute):
        for event in row:
            height = 0.84 / len(event.passes)
            for i, p in enumerate(event.passes):
                bottom = device - 0.42 + i * height
                axes.broken_barh(
                    [(event.start, event.end - event.start)], (bottom, height), facecolor=_COLOURS[p.kind], edgecolor="white", linewidth=0.4
                )
                number, middle = str(p.microbatch), (event.start + event.end) / 2
                if event.end - event.start > wide * len(number):
                    size = 5 + 1.5 / len(event.passes)
                    axes.text(middle, bottom + height / 2, number, ha="center", va="center", fontsize=size, clip_on=True)
    if timeline.schedule.microbatches * devices <= 200:
        sends = [e for e in timeline.transfers if e.kind == "send"]
        receives = [e for e in timeline.transfers if e.kind == "receive"]
        for sent, received in zip(sends, receives, strict=True):
            axes.plot([sent.start, received.end], [sent.device, received.device], color="#555555", linewidth=0.25, alpha=0.5)
    axes.set(xlabel="seconds", ylabel="device", yticks=range(devices), xlim=(0, timeline.makespan), ylim=(devices - 0.4, -0.6))
    axes.set_title(
        loc="left",
        label=f"{timeline.schedule.name}: {devices} devices, {timeline.schedule.microbatches} micro-batches, "
        f"bubble of at most {timeline.bubble:.3g} s of {timeline.makespan:.3g} s",
    )
    kinds = {p.kind for row in timeline.compute for event in row for p in event.passes}
    axes.legend(
        handles=[Patch(color=_COLOURS[k], label=_NAMES[k]) for k in "FBIW" if k in kinds],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        fontsize=8,
        ncols=4,
        frameon=False,
    )
    _save(figure, out)


def draw_plan(step: Step, usable: float, price_per_hour: float, tokens: float, out: str) -> None:
    """Memory by part against what the device has, where the time of a step goes, and cost (or hours) against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    memory, time, cost = figure.subplots(1, 3)
    bottom = 0.0
    for part, value in asdict(step.memory).items():
        if value:
            memory.bar(["fullest device"], [value / GIB], bottom=bottom, width=0.5, label=part.replace("_", " "))
            bottom += value / GIB
    memory.axhline(usable / GIB, color="black", linestyle="--", label="usable")
    memory.set(ylabel="GiB", title="Memory", xlim=(-0.6, 1.4))
    memory.legend(fontsize=8)

    parts = {
        "computing": step.computing,
        "exposed communication": step.exposed,
        "bubble": step.bubble,
        "gradient exchange": step.gradient_exchange,
        "optimizer": step.optimizer,
    }
    time.barh(list(parts), list(parts.values()))
    time.invert_yaxis()
    time.set(xlabel="seconds", title=f"Step of {step.seconds:.3g} s")

    budgets = [tokens * share / 20 for share in range(1, 41)]
    hours = [step.device_hours(budget) for budget in budgets]
    cost.plot([budget / 1e9 for budget in budgets], [h * price_per_hour for h in hours] if price_per_hour else hours)
    cost.axvline(tokens / 1e9, color="black", linestyle="--", linewidth=0.8)
    cost.set(xlabel="billion tokens", ylabel="US dollars" if price_per_hour else "device hours", title="Cost", ylim=(0, None))
    cost.xaxis.set_major_formatter("{x:,.0f}")
    cost.yaxis.set_major_formatter("{x:,.0f}")
    _save(figure, out)


def _save(figure: object, out: str) -> None:
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    if not Path(out).parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {Path(out).parent}")
    figure.savefig(out, dpi=130)
