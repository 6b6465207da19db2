"""Loss against FLOPs and against seconds: every run, and the frontier of every side."""

from __future__ import annotations

from pathlib import Path

from ..pictures import count_on_log_axis, new_figure, save
from .frontier import Ratio, lower_hull
from .runs import Run

COLOURS = {"baseline": "#7a7f87", "sampled": "#b9a27c", "exportable": "#35a7c9", "full": "#e2734f"}
LABELS = {
    "baseline": "Llama-style baseline",
    "sampled": "the same with sampled softmax",
    "exportable": "Shoal, exportable",
    "full": "Shoal, full",
}


def draw(runs: list[Run], ratios: dict[str, Ratio | None], path: Path) -> None:
    """Write the picture. `ratios` are the baseline's FLOPs over those of some sides, where there is such a ratio.

    Raises `UserError` where matplotlib is missing or the file cannot be written.
    """
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, cost, label in ((left, "flops", "training FLOPs"), (right, "seconds", "seconds of training")):
        for side in COLOURS:
            mine = [run for run in runs if run.side == side]
            if not mine:
                continue
            axes.plot([getattr(run, cost) for run in mine], [run.bpb for run in mine], "o", ms=4, alpha=0.5, color=COLOURS[side])
            for seed in sorted({run.seed for run in mine}):
                hull = lower_hull([(getattr(run, cost), run.bpb) for run in mine if run.seed == seed])
                name = LABELS[side] if seed == min(run.seed for run in mine) else None
                axes.plot([x for x, _ in hull], [y for _, y in hull], color=COLOURS[side], lw=1.5, label=name)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.25, which="both")
    count_on_log_axis(right)
    left.set_ylabel("held-out bits per byte")
    found = {side: ratio for side, ratio in ratios.items() if ratio is not None}
    for side, ratio in found.items():
        left.axhline(ratio.loss, color=COLOURS[side], lw=0.8, ls="--")
    if found:
        told = (f"{ratio.value:,.4g} times those of '{side}' at {ratio.loss:.3f} bits per byte" for side, ratio in found.items())
        figure.suptitle("The baseline's FLOPs are " + ", ".join(told), fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    save(figure, path)
