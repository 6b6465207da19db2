"""Predictions for one measured machine, and their comparison with what the trainer and the engine really do there.

The trainer and the engine stand above `plan`; their measurements come in as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from shoal.config import ModelConfig

from .assumptions import Assumptions
from .cost import checkpoint_bytes, kv_bytes_per_token, number_format
from .hardware import Machine
from .layout import Layout
from .serving import decode_seconds
from .training import plan_step

TOLERANCE = 0.25


@dataclass(frozen=True)
class Prediction:
    """Speed, and peak memory of what the job itself allocates (the interpreter and its libraries come on top)."""

    tokens_per_second: float
    memory_bytes: float


@dataclass(frozen=True)
class Comparison:
    """One figure of a check."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1

    @property
    def ok(self) -> bool:
        return abs(self.error) <= TOLERANCE


def predict_training(
    model: ModelConfig,
    machine: Machine,
    batch: int,
    sequence_length: int,
    micro_batch: int | None = None,
    assumptions: Assumptions | None = None,
) -> Prediction:
    """Training of `batch` sequences a step on one device, with Muon, in the faster of fp32 and bf16, without recomputation."""
    precision: Literal["bf16", "fp32"] = "bf16" if machine.peak("bf16") > machine.peak("fp32") else "fp32"
    layout = Layout(micro_batch=micro_batch or batch, zero=0, precision=precision, optimizer="muon")
    step = plan_step(model, machine, layout, batch, sequence_length, assumptions)
    return Prediction(step.tokens_per_second, step.memory.total)


def predict_decode(
    model: ModelConfig,
    machine: Machine,
    weights: str,
    context: int,
    batch: int = 1,
    cache: str = "bf16",
    assumptions: Assumptions | None = None,
) -> Prediction:
    """Decoding `batch` sequences at `context` tokens with weights in the number format `weights`, without MTP."""
    a = assumptions or Assumptions()
    seconds = decode_seconds(model, machine, weights, batch, context, cache, a)
    memory = checkpoint_bytes(model, number_format(weights)) + batch * context * kv_bytes_per_token(model, cache)
    return Prediction(batch / seconds, memory)


def compare(predictions: Mapping[str, Prediction], measurements: Mapping[str, Callable[[], Prediction]]) -> list[Comparison]:
    """Run every measurement that has a prediction and compare speed and memory, in the order of `predictions`."""
    rows = []
    for name, predicted in predictions.items():
        if name in measurements:
            measured = measurements[name]()
            rows.append(Comparison(f"{name}: tokens per second", predicted.tokens_per_second, measured.tokens_per_second))
            rows.append(Comparison(f"{name}: peak memory bytes", predicted.memory_bytes, measured.memory_bytes))
    return rows
