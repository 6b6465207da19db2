"""Loss against FLOPs of every arm, and how many times an arm's FLOPs the first arm pays for the same loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..efficiency.runs import Run
from ..pictures import new_figure, save
from .studies import Study

COLOURS = ("#7a7f87", "#e2734f", "#35a7c9", "#7c5cc4")


def draw(study: Study, runs: Sequence[Run], result: dict[str, Any], path: Path) -> None:
    """Write the picture. Raises `UserError` where matplotlib is missing or the file cannot be written."""
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    for (arm, label), colour in zip(study.labels.items(), COLOURS[: len(study.labels)], strict=True):
        mine = [run for run in runs if run.side == arm]
        left.plot([run.flops for run in mine], [run.bpb for run in mine], "o", ms=4, alpha=0.5, color=colour)
        means = [
            (fmean(run.flops for run in mine if run.budget == budget), fmean(run.bpb for run in mine if run.budget == budget))
            for budget in sorted({run.budget for run in mine})
        ]
        left.plot(*zip(*means, strict=True), color=colour, lw=1.5, label=label)
        if arm == study.reference:
            right.axhline(1, color=colour, lw=1.5)
        elif points := result[f"{arm}_trend"]:
            right.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, lw=1.5)
    left.legend(frameon=False)
    left.set_ylabel("held-out bits per byte")
    right.set_title(f"FLOPs that '{study.labels[study.reference]}'\nneeds for the same loss", fontsize=10)
    right.yaxis.set_major_formatter("{x:g}x")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs")
        axes.grid(alpha=0.25, which="both")
    right.set_xlim(left.get_xlim())
    save(figure, path)
