"""`shoal bench ablation`: all runs of a study, the table, the picture, the JSON object."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from ...config import BenchAblationCommand, CorpusConfig
from ...data import open_corpus
from ..efficiency.frontier import best_ratio, figures
from ..efficiency.runs import Run, Trainer, curves, only_the_end, open_runs
from ..efficiency.trend import trend
from ..pictures import require_picture
from .picture import draw
from .studies import Study

QUICK = 0.01


def run_bench(command: BenchAblationCommand, trainer: Trainer | None = None) -> dict[str, Any]:
    """Make the runs that are missing, print the table, draw the picture, return the JSON object. `trainer`: see `Runs`."""
    command.validate()
    study, folder = Study.load(command.study), Path(command.out).expanduser()
    picture = folder / f"{study.name}.png"
    made = []
    with open_runs(folder, open_corpus(command.data, CorpusConfig()).fingerprint, trainer) as runs:
        require_picture(picture)
        for seed in range(command.seeds or (1 if command.quick else 3)):
            for arm, budgets in study.budgets.items():
                for budget in budgets:
                    flops = budget * (QUICK if command.quick else 1)
                    config = only_the_end(study.config(arm, flops), command.data, seed, command.threads, "cpu")
                    made.append(run := runs.get(arm, flops, config))
                    print(f"{arm} {flops:.1e} seed {seed}: {run.bpb:.4f} bits per byte ({run.tokens:,} tokens)", file=sys.stderr)
    result = summarize(study, made)
    _print(study, made, result)
    draw(study, made, result, picture)
    print(f"picture: {picture}")
    return result


def summarize(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """The JSON object. Ratios say how many times an arm's cost the first arm pays for the same loss; null where they do not overlap."""
    result: dict[str, Any] = {"study": study.name, "reference": study.reference, "seeds": len({run.seed for run in runs})}
    for arm in study.others:
        for cost in ("flops", "seconds"):
            result |= figures(f"{arm}_{cost}_ratio", best_ratio(curves(runs, study.reference, cost), curves(runs, arm, cost)))
        result[f"{arm}_trend"] = trend(runs, study.reference, arm)
    return result | {"runs": [asdict(run) for run in runs]}


def _print(study: Study, runs: Sequence[Run], result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=130)
    table = Table()
    for column in ("", "FLOPs", "seconds", "bits per byte", "tokens", "batch", "active", "parameters", "MaxVio", "skipped"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    for arm, label in study.labels.items():
        for budget in sorted({run.budget for run in runs if run.side == arm}):
            same = [run for run in runs if run.side == arm and run.budget == budget]
            first, losses = same[0], [run.bpb for run in same]
            spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(same) > 1 else ""
            violations = [run.max_vio for run in same if run.max_vio is not None]
            table.add_row(
                label, f"{fmean(run.flops for run in same):.2e}", f"{fmean(run.seconds for run in same):.1f}",
                f"{fmean(losses):.4f}{spread}", f"{first.tokens:,}", str(first.batch), f"{first.active:,}", f"{first.parameters:,}",
                f"{fmean(violations):.2f}" if violations else "", str(sum(run.skipped for run in same)),
            )  # fmt: skip
    console.print(table)
    for arm in study.others:
        for cost, unit in (("flops", "FLOPs"), ("seconds", "seconds")):
            console.print(f"{study.labels[arm]}: {_spoken(study, result, f'{arm}_{cost}_ratio', unit)}")


def _spoken(study: Study, result: dict[str, Any], name: str, unit: str) -> str:
    if result[name] is None:
        return f"its losses and those of '{study.labels[study.reference]}' do not overlap in {unit}, and nothing is extrapolated"
    interval = result[f"{name}_interval"]
    between = f", 95% interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else ", no interval"
    dear = study.labels[study.reference]
    return f"{result[name]:.2f} times the {unit} for '{dear}' at {result[f'{name}_bpb']:.4f} bits per byte{between}"
