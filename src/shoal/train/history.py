"""What a run wrote down: `metrics.jsonl` as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import UserError
from .metrics import read_rows

MOST_ROWS = 40_000
"""More than any picture shows."""
Floats = npt.NDArray[np.float64]


@dataclass
class Metrics:
    """The rows of a run in the order of their steps, one dictionary per optimizer step and one per evaluation."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def column(self, name: str) -> Floats:
        """One figure of every step, [S]; NaN where a row lacks it."""
        return column(self.steps, name)

    def layers(self, name: str) -> tuple[Floats, Floats]:
        """A per-layer figure of the rows that have it: their tokens [R] and the values [R, L, ...]. R is 0 for a dense model.

        The last layers are NaN in rows without them: those of multi-token prediction may run in a part of the steps only.
        """
        rows = [row for row in self.steps if row.get(name)]
        if not rows:
            return np.empty(0), np.empty((0, 0))
        values = np.full((len(rows), max(len(row[name]) for row in rows), *np.shape(rows[0][name])[1:]), np.nan)
        for place, row in zip(values, rows, strict=True):
            place[: len(row[name])] = row[name]
        return column(rows, "tokens"), values


def mean_of_finite(values: Floats, axis: int) -> Floats:
    """Means along an axis, NaN where all are."""
    mean: Floats = np.ma.masked_invalid(values).mean(axis=axis).filled(np.nan)
    return mean


def column(rows: list[dict[str, Any]], name: str) -> Floats:
    """One figure of every row, [R]; NaN where a row lacks it."""
    values = (row.get(name) for row in rows)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def read_metrics(path: Path) -> Metrics:
    """Read a run's `metrics.jsonl`.

    A resumed run repeats the steps since its checkpoint: the later row counts. Of more than `MOST_ROWS` steps every second is kept, of more
    again every fourth, and so on.

    Raises `UserError` when there is no such file.
    """
    metrics, apart = Metrics(), 1
    try:
        for row in read_rows(path):
            if "loss" in row:
                _forget(metrics.steps, row["step"])
                _forget(metrics.evaluations, row["step"] + 1)
                if (row["step"] - 1) % apart == 0:
                    metrics.steps.append(row)
                if len(metrics.steps) > MOST_ROWS:
                    apart *= 2
                    metrics.steps = [row for row in metrics.steps if (row["step"] - 1) % apart == 0]
            elif row.get("val_bpb") is not None:
                _forget(metrics.evaluations, row["step"])
                metrics.evaluations.append(row)
    except OSError:
        raise UserError(f"{path} cannot be read: name the folder of a run that has started training") from None
    return metrics


def _forget(rows: list[dict[str, Any]], step: int) -> None:
    """Drop the rows at `step` and later: the run has gone back to an earlier checkpoint."""
    while rows and rows[-1]["step"] >= step:
        rows.pop()
