"""How a ratio changes with the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from .frontier import best_ratio, cost_at
from .runs import Run, curves


def trend(runs: Sequence[Run], dear: str, cheap: str) -> list[list[float]]:
    """[FLOPs of `cheap`, how many times as many `dear` needs], from few to many.

    At every budget of `cheap` whose losses `dear` reaches with every seed; the last is at the lowest loss that all reach, which most often
    lies between two budgets.
    """
    found = []
    theirs = dict(zip(sorted({run.seed for run in runs}), curves(runs, dear, "flops"), strict=True))
    for budget in sorted({run.budget for run in runs if run.side == cheap}):
        same = [run for run in runs if run.side == cheap and run.budget == budget]
        costs = [cost_at(theirs[run.seed], run.bpb) for run in same]
        reached = [math.log(cost / run.flops) for run, cost in zip(same, costs, strict=True) if cost is not None]
        if len(reached) == len(same):
            found.append([budget, math.exp(fmean(reached))])
    if (best := best_ratio(list(theirs.values()), curves(runs, cheap, "flops"))) is not None:
        flops = math.exp(fmean(math.log(cost) for curve in theirs.values() if (cost := cost_at(curve, best.loss)))) / best.value
        found = [point for point in found if point[0] < flops] + [[flops, best.value]]
    return found
