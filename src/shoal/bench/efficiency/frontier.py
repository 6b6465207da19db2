"""What equal loss costs on two sides: interpolation between whole runs, and an interval over seeds.

A curve is the cost (FLOPs or seconds) of runs with their complete schedules and the loss that each ends with. Between neighbours
log(cost) is linear in the loss; beyond the first and the last run nothing is said. A run whose loss is not finite reaches no loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, variance
from typing import Any

Curve = list[tuple[float, float]]
"""(cost, loss) of every run of one side and one seed."""

T_97_5 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's distribution with 1, 2, ... degrees of freedom; with more the last is taken, up to 15% too large."""


@dataclass(frozen=True)
class Ratio:
    """How many times the cost of the second side the first one pays for the same loss; geometric mean over seeds."""

    value: float
    low: float
    """End of the 95% interval."""
    high: float
    """Infinite, and `low` 0, where nothing is known about the spread: with one seed, or where runs of every budget diverged."""
    loss: float
    """At which the ratio is taken."""
    seeds: int


def figures(name: str, ratio: Ratio | None) -> dict[str, Any]:
    """What a JSON object holds of a ratio called `name`; nulls where there is none, or no interval."""
    return {
        name: None if ratio is None else ratio.value,
        f"{name}_interval": None if ratio is None or math.isinf(ratio.high) else [ratio.low, ratio.high],
        f"{name}_bpb": None if ratio is None else ratio.loss,
    }


def lower_hull(curve: Curve) -> Curve:
    """The runs that no cheaper run beats, by increasing cost: their losses fall."""
    kept: Curve = []
    for cost, loss in sorted(_finished(curve)):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


def _finished(curve: Curve) -> Curve:
    """The runs that did not diverge."""
    return [(cost, loss) for cost, loss in curve if math.isfinite(loss)]


def cost_at(curve: Curve, loss: float) -> float | None:
    """Cost at which a curve reaches `loss`; None where it does not."""
    around = _around(curve, loss)
    if around is None:
        return None
    (cheap, high), (dear, low) = around
    share = (high - loss) / (high - low)
    return math.exp(math.log(cheap) + share * (math.log(dear) - math.log(cheap)))


def _around(curve: Curve, loss: float) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The neighbours of the frontier between which a curve reaches `loss`; None outside of what its runs span."""
    return next(((cheap, dear) for cheap, dear in pairwise(lower_hull(curve)) if dear[1] <= loss <= cheap[1]), None)


def overlap(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Lowest and highest loss that all curves reach; None where there is no such range."""
    hulls = [lower_hull(curve) for curve in curves]
    if not all(hulls):
        return None
    low, high = max(hull[-1][1] for hull in hulls), min(hull[0][1] for hull in hulls)
    return (low, high) if low <= high else None


def ratio_at(first: Sequence[Curve], second: Sequence[Curve], loss: float) -> Ratio | None:
    """Cost of `first` over that of `second` at `loss`; one curve a seed on each side. None where a curve does not reach `loss`."""
    logs = []
    for one, other in zip(first, second, strict=True):
        dear, cheap = cost_at(one, loss), cost_at(other, loss)
        if dear is None or cheap is None:
            return None
        logs.append(math.log(dear / cheap))
    count = len(logs)
    mean = fmean(logs)
    pooled = [_budgets(first), _budgets(second)]
    if count == 1 or not all(pooled):
        return Ratio(math.exp(mean), 0.0, math.inf, loss, count)
    freedom = (count - 1) * min(map(len, pooled))
    variances = (_variance(side, budgets, loss) for side, budgets in zip((first, second), pooled, strict=True))
    reach = math.sqrt(sum(variances)) * T_97_5[min(freedom, len(T_97_5)) - 1]
    return Ratio(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), loss, count)


def _budgets(curves: Sequence[Curve]) -> list[tuple[tuple[float, float], ...]]:
    """(cost, loss) of every seed, budget by budget; without those at which a seed diverged."""
    return [runs for runs in zip(*curves, strict=True) if all(math.isfinite(loss) for _, loss in runs)]


def _variance(curves: Sequence[Curve], budgets: Sequence[Sequence[tuple[float, float]]], loss: float) -> float:
    """Variance of the logarithm of what `loss` costs, as a mean over the seeds `curves`, which all reach it.

    How far a run's loss and cost lie from those of other seeds is taken from all `budgets` together, each with a run of every seed: three
    seeds of a single budget lie close together by chance too often.
    """
    of_losses = fmean(variance(loss for _, loss in runs) for runs in budgets)
    of_costs = fmean(variance(math.log(cost) for cost, _ in runs) for runs in budgets)
    each = []
    for curve in curves:
        if (around := _around(curve, loss)) is not None:
            (cheap, high), (dear, low) = around
            share, slope = (high - loss) / (high - low), math.log(dear / cheap) / (high - low)
            each.append(((1 - share) ** 2 + share**2) * (slope**2 * of_losses + of_costs))
    return fmean(each) / len(curves)


def best_ratio(first: Sequence[Curve], second: Sequence[Curve]) -> Ratio | None:
    """The ratio at the lowest loss that all curves of both sides reach; None where they do not overlap."""
    common = overlap([*first, *second])
    return None if common is None else ratio_at(first, second, common[0])


def bound(first: Sequence[Curve], second: Sequence[Curve]) -> float | None:
    """Where every run of `second` beats every one of `first`: the ratio is more than dearest first over cheapest second.

    None where the curves overlap, or lie the other way round. The first side's dearest runs are those that did not diverge.
    """
    reached = [_finished(curve) for curve in first]
    if not all(reached) or any(len(_finished(curve)) < len(curve) for curve in second):
        return None
    best_first = min(loss for curve in reached for _, loss in curve)
    worst_second = max(loss for curve in second for _, loss in curve)
    if worst_second >= best_first:
        return None
    return min(max(cost for cost, _ in curve) for curve in reached) / max(min(cost for cost, _ in curve) for curve in second)
