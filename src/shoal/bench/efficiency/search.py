"""Tuning, the same for every side: one value after the other, a step up or down as long as that helps."""

from __future__ import annotations

from collections.abc import Callable

from ...plan.rules import VALUES, Point

FACTORS = {"width": 1.5, "layers": 2.0, "batch": 2.0, "rate": 2.0}
"""Size of a step of every value; the range is open, since steps go on while they help."""
LARGEST_ROUNDS = 3


def search(loss: Callable[[Point], float], start: Point) -> tuple[Point, float]:
    """The point that no single step makes better (or where `LARGEST_ROUNDS` rounds have led), and its loss.

    `loss` should remember: it is asked for points more than once.
    """
    best, found = start, loss(start)
    for _ in range(LARGEST_ROUNDS):
        before = found
        for name in VALUES:
            for factor in (FACTORS[name], 1 / FACTORS[name]):
                moved = False
                while (there := loss(candidate := best.times(**{name: factor}))) < found:
                    best, found, moved = candidate, there, True
                if moved:
                    break
        if found == before:
            break
    return best, found
