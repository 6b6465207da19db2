"""What quantizing has cost, matrix by matrix: the table and the figures of the JSON object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Settled:
    """How one matrix came out."""

    name: str
    format: str
    weights: int
    nbytes: int
    weight_error: float
    """Squared error of the weights, as a share of their squares."""
    output_error: float | None = None
    """Squared error of the outputs on the calibration inputs, as a share of their squares; None where no inputs were looked at."""


def figures(matrices: Sequence[Settled]) -> dict[str, Any]:
    """`matrices` one by one, and their mean errors by number of weights."""
    return {
        "weight_error": _mean([(m.weight_error, m.weights) for m in matrices]),
        "output_error": _mean([(m.output_error, m.weights) for m in matrices if m.output_error is not None]),
        "matrices": [asdict(m) for m in matrices],
    }


def print_table(matrices: Sequence[Settled]) -> None:
    """One line for every layer."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What rounding has changed")
    for column in ("layer", "format", "weights", "bits per weight", "weight error", "output error"):
        table.add_column(column, justify="left" if column in ("layer", "format") else "right", no_wrap=True)
    layers: dict[str, list[Settled]] = {}
    for matrix in matrices:
        found = re.match(r"model\.layers\.(\d+)\.", matrix.name)
        layers.setdefault(found[1] if found else matrix.name, []).append(matrix)
    for layer, inside in layers.items():
        weights = sum(m.weights for m in inside)
        errors = _mean([(m.weight_error, m.weights) for m in inside])
        outputs = _mean([(m.output_error, m.weights) for m in inside if m.output_error is not None])
        bits = 8 * sum(m.nbytes for m in inside) / weights
        formats = ", ".join(sorted({m.format for m in inside}))
        table.add_row(layer, formats, f"{weights:,}", f"{bits:.2f}", _percent(errors), _percent(outputs))
    Console(width=None if Console().is_terminal else 100).print(table)


def _mean(values: list[tuple[float, int]]) -> float | None:
    """Mean by number of weights; None of nothing."""
    total = sum(weights for _, weights in values)
    return sum(value * weights for value, weights in values) / total if total else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3f}%"
