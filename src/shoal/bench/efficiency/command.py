"""`shoal bench efficiency`: all runs of all sides, the table, the picture, the JSON object."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config import BenchEfficiencyCommand, CorpusConfig, TrainConfig, UserError
from ...data import open_corpus
from ...plan.rules import Point, Rules
from ..pictures import require_picture
from .frontier import Ratio, best_ratio, bound, figures
from .picture import draw
from .runs import Run, Runs, Stopped, Trainer, curves, only_the_end, open_runs
from .search import search
from .sides import BUDGETS, load_side
from .trend import trend

RATIOS = (
    ("flops_ratio", "baseline", "full", "flops"),
    ("seconds_ratio", "baseline", "full", "seconds"),
    ("exportable_flops_ratio", "baseline", "exportable", "flops"),
    ("exportable_seconds_ratio", "baseline", "exportable", "seconds"),
    ("sampled_flops_ratio", "sampled", "full", "flops"),
    ("sampled_exportable_flops_ratio", "sampled", "exportable", "flops"),
)
"""What is reported: whose cost is divided by whose."""
QUICK = 0.03


def run_bench(command: BenchEfficiencyCommand, trainer: Trainer | None = None) -> dict[str, Any]:
    """Make the runs that are missing, print the table, draw the picture, return the JSON object. `trainer`: see `Runs`."""
    command.validate()
    folder = Path(command.out).expanduser()
    sides = [load_side(name) for name in BUDGETS[command.scale]]
    budgets = {name: [flops * (QUICK if command.quick else 1) for flops in some] for name, some in BUDGETS[command.scale].items()}
    with open_runs(folder, open_corpus(command.data, CorpusConfig()).fingerprint, trainer) as runs:
        if command.search:
            return _search(command, sides, budgets, runs)
        picture = folder / "efficiency.png"
        require_picture(picture)
        made = []
        for seed in range(command.seeds or (1 if command.quick else 3)):
            for side in sides:
                for flops in budgets[side.name]:
                    made.append(runs.get(side.name, flops, _settings(command, side.config(flops), seed)))
                    _say(made[-1])
    return _finish(made, picture)


def _settings(command: BenchEfficiencyCommand, config: TrainConfig, seed: int) -> TrainConfig:
    return only_the_end(config, command.data, seed, command.threads, "cuda" if command.scale == "gpu" else "cpu")


def _search(command: BenchEfficiencyCommand, sides: Sequence[Rules], budgets: dict[str, list[float]], runs: Runs) -> dict[str, Any]:
    """Tune every side at every budget, by the same steps; the points found."""
    found: dict[str, list[dict[str, Any]]] = {}
    for side in sides:
        found[side.name] = []
        for flops in budgets[side.name]:

            @functools.cache
            def loss(point: Point, side: Rules = side, flops: float = flops) -> float:
                try:
                    run = runs.get(side.name, flops, _settings(command, side.config(flops, point), 0))
                except Stopped:
                    raise
                except UserError as error:  # a step too large for the budget, or a rate at which nothing is learnt
                    print(f"{side.name} {flops:.1e} with {_point(asdict(point))}: {error}", file=sys.stderr)
                    return math.inf
                _say(run)
                return run.bpb if math.isfinite(run.bpb) else math.inf

            start = side.point(flops)
            point, bpb = search(loss, start)
            found[side.name].append({"flops": flops, "bpb": bpb, "start_bpb": loss(start), **asdict(point)})
    for name, rows in found.items():
        for row in rows:
            print(f"{name:<12} {row['flops']:.1e}  {row['start_bpb']:.4f} -> {row['bpb']:.4f}  " + _point(row))
    return {"search": found}


def _point(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]:.4g}" for name in ("width", "layers", "batch", "rate"))


def _say(run: Run) -> None:
    print(f"{run.side} {run.budget:.1e} seed {run.seed}: {run.bpb:.4f} bits per byte ({run.shape}, {run.tokens:,} tokens)", file=sys.stderr)


def compare(runs: Sequence[Run], dear: str, cheap: str, cost: str) -> tuple[Ratio | None, float | None]:
    """How many times the cost of one side is that of another, and a bound where the two do not overlap."""
    one, other = curves(runs, dear, cost), curves(runs, cheap, cost)
    return best_ratio(one, other), bound(one, other)


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """The JSON object. A ratio is null where the curves do not overlap; `..._at_least` then holds the bound, if there is one.

    `..._trend` says how a ratio of FLOPs changes with the budget of the cheap side.
    """
    result: dict[str, Any] = {}
    sides = {run.side for run in runs}
    for name, dear, cheap, cost in RATIOS:
        if {dear, cheap} <= sides:
            ratio, least = compare(runs, dear, cheap, cost)
            result |= figures(name, ratio) | {f"{name}_at_least": least}
            if cost == "flops":
                result[f"{name}_trend"] = trend(runs, dear, cheap)
    return result | {"seeds": len({run.seed for run in runs}), "runs": [asdict(run) for run in runs]}


def _finish(runs: list[Run], picture: Path) -> dict[str, Any]:
    result = summarize(runs)
    _print(runs, result)
    draw(runs, {side: compare(runs, "baseline", side, "flops")[0] for side in ("full", "exportable")}, picture)
    print(f"picture: {picture}")
    return result


def _print(runs: list[Run], result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=130)
    table = Table()
    for column in ("", "FLOPs", "seconds", "bits per byte", "layers x width", "tokens", "batch", "rate", "active", "tables", "skipped"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for side in dict.fromkeys(run.side for run in runs):
        for budget in sorted({run.budget for run in runs if run.side == side}):
            same = [run for run in runs if run.side == side and run.budget == budget]
            first = same[0]
            mean = sum(run.bpb for run in same) / len(same)
            spread = f" ± {(max(run.bpb for run in same) - min(run.bpb for run in same)) / 2:.3f}" if len(same) > 1 else ""
            table.add_row(
                side, f"{first.flops:.2e}", f"{sum(run.seconds for run in same) / len(same):.1f}", f"{mean:.4f}{spread}", first.shape,
                f"{first.tokens:,}", str(first.batch), f"{first.rate:.2g}", f"{first.active:,}", f"{first.tables:,}",
                str(sum(run.skipped for run in same)),
            )  # fmt: skip
    console.print(table)
    for name, *_ in RATIOS:
        if name in result:
            console.print(f"{name}: {_spoken(result, name)}")
            if len(points := result.get(f"{name}_trend", [])) > 1:
                console.print("    with the budget: " + ", ".join(f"{value:.2f} at {flops:.1e} FLOPs" for flops, value in points))


def _spoken(result: dict[str, Any], name: str) -> str:
    value, interval, least = result[name], result[f"{name}_interval"], result[f"{name}_at_least"]
    if value is None:
        if least is not None:
            return f"the curves do not overlap: every run beats all of the other side, so more than {least:.2f}; nothing is extrapolated"
        return "the curves do not overlap, and nothing is extrapolated: change the budgets"
    between = f", 95% interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else ", no interval"
    return f"{value:.2f} at {result[f'{name}_bpb']:.4f} bits per byte{between}"
