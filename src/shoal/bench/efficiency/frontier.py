"""What equal loss costs on two sides: interpolation between whole runs, and an interval over seeds.

A curve is the cost (FLOPs or seconds) of runs with their complete schedules and the loss that each ends with. Between neighbours
log(cost) is linear in the loss; beyond the first and the last run nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Curve = list[tuple[float, float]]
"""(cost, loss) of every run of one side and one seed."""

T_97_5 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's distribution with 1, 2, ... degrees of freedom (beyond the last: 1.96 is too small by at most 14%)."""


@dataclass(frozen=True)
class Ratio:
    """How many times the cost of the second side the first one pays for the same loss; geometric mean over seeds."""

    value: float
    low: float
    """End of the 95% interval; minus infinity is 0: one seed says nothing about the spread."""
    high: float
    loss: float
    """At which the ratio is taken."""
    seeds: int


def figures(name: str, ratio: Ratio | None) -> dict[str, Any]:
    """What a JSON object holds of a ratio called `name`; nulls where there is none, no interval where there is one seed."""
    return {
        name: None if ratio is None else ratio.value,
        f"{name}_interval": None if ratio is None or ratio.seeds < 2 else [ratio.low, ratio.high],
        f"{name}_bpb": None if ratio is None else ratio.loss,
    }


def lower_hull(curve: Curve) -> Curve:
    """The runs that no cheaper run beats, by increasing cost: their losses fall."""
    kept: Curve = []
    for cost, loss in sorted(curve):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


def cost_at(curve: Curve, loss: float) -> float | None:
    """Cost at which a curve reaches `loss`; None outside of what its runs span."""
    hull = lower_hull(curve)
    for (cheap, high), (dear, low) in pairwise(hull):
        if low <= loss <= high:
            share = (high - loss) / (high - low)
            return math.exp(math.log(cheap) + share * (math.log(dear) - math.log(cheap)))
    return None


def overlap(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Lowest and highest loss that all curves reach; None where there is no such range."""
    hulls = [lower_hull(curve) for curve in curves]
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
    mean = sum(logs) / count
    if count == 1:
        return Ratio(math.exp(mean), 0.0, math.inf, loss, 1)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / (count - 1) / count)
    reach = spread * (T_97_5[count - 2] if count - 2 < len(T_97_5) else T_97_5[-1])
    return Ratio(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), loss, count)


def best_ratio(first: Sequence[Curve], second: Sequence[Curve]) -> Ratio | None:
    """The ratio at the lowest loss that all curves of both sides reach; None where they do not overlap."""
    common = overlap([*first, *second])
    return None if common is None else ratio_at(first, second, common[0])


def bound(first: Sequence[Curve], second: Sequence[Curve]) -> float | None:
    """Where every run of `second` beats every one of `first`: the ratio is more than dearest first over cheapest second.

    None where the curves overlap, or lie the other way round.
    """
    best_first = min(loss for curve in first for _, loss in curve)
    worst_second = max(loss for curve in second for _, loss in curve)
    if worst_second >= best_first:
        return None
    return min(max(cost for cost, _ in curve) for curve in first) / max(min(cost for cost, _ in curve) for curve in second)
