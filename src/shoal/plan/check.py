"""Predictions for one measured machine, and their comparison with what the trainer and the engine really do there.

The trainer and the engine stand above `plan`; their measurements come in as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ..config import ModelConfig
from .assumptions import Assumptions
from .cost import checkpoint_bytes, kv_bytes_per_token, main_matrices, number_format, stored_as
from .hardware import Machine
from .layout import Layout
from .serving import decode_seconds
from .training import plan_step

TOLERANCE = 0.25
FIGURES: tuple[Literal["tokens_per_second", "memory_bytes"], ...] = ("tokens_per_second", "memory_bytes")


@dataclass(frozen=True)
class Prediction:
    """Speed, and peak memory of what the job itself allocates (the interpreter and its libraries come on top)."""

    tokens_per_second: float
    memory_bytes: float


@dataclass(frozen=True)
class Case:
    """Something predicted, and the function that measures it; without one, why not."""

    name: str
    predicted: Prediction
    measure: Callable[[], Prediction] | None
    missing: str = ""


@dataclass(frozen=True)
class Comparison:
    """One figure of a check."""

    name: str
    figure: Literal["tokens_per_second", "memory_bytes"]
    predicted: float
    measured: float | None
    """None: it was not measured, for the reason in `missing`."""
    missing: str = ""

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        return None if self.measured is None else self.predicted / self.measured - 1

    @property
    def ok(self) -> bool | None:
        return None if self.error is None else abs(self.error) <= TOLERANCE


def predict_training(
    model: ModelConfig,
    machine: Machine,
    batch: int,
    sequence_length: int,
    micro_batch: int | None = None,
    precision: Literal["bf16", "fp32"] = "fp32",
    assumptions: Assumptions | None = None,
) -> Prediction:
    """Training of `batch` sequences a step on one device as `shoal train` does it: with Muon, without recomputation."""
    layout = Layout(micro_batch=micro_batch or batch, zero=0, precision=precision, optimizer="muon")
    step = plan_step(model, machine, layout, batch, sequence_length, assumptions)
    return Prediction(step.tokens_per_second, step.memory.total)


def predict_decode(
    model: ModelConfig,
    machine: Machine,
    weights: str,
    context: int,
    assumptions: Assumptions | None = None,
) -> Prediction:
    """Decoding one sequence at `context` tokens with weights in the number format `weights` and a cache in bf16, without MTP.

    Peak memory: of the embedding only the rows of tokens that occur come into memory, so it is not counted; on a CPU the engine moves
    matrices (all experts of a projection are one) into large pages one by one, so the largest exists twice for a moment.
    """
    a, numbers = assumptions or Assumptions(), number_format(weights)
    seconds = decode_seconds(model, machine, weights, 1, context, "bf16", a)
    sizes = [
        matrix.stored * stored_as(matrix.part, numbers).matrix_bytes(matrix.out_features, matrix.in_features)
        for matrix in main_matrices(model)
    ]
    embedding, *others = sizes
    memory = checkpoint_bytes(model, numbers) - embedding + context * kv_bytes_per_token(model, "bf16")
    return Prediction(1 / seconds, memory + (max(others) if machine.is_cpu else 0))


def compare(cases: Iterable[Case], tell: Callable[[str], None] = lambda _: None) -> list[Comparison]:
    """Take every measurement, and compare speed and memory, in order. `tell` hears what is being measured."""
    rows = []
    for case in cases:
        measured = None
        if case.measure is not None:
            tell(f"measuring: {case.name}")
            measured = case.measure()
        for figure in FIGURES:
            seen = None if measured is None else getattr(measured, figure)
            rows.append(Comparison(case.name, figure, getattr(case.predicted, figure), seen, case.missing))
    return rows
