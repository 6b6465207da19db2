"""Runs that are not trained: their losses follow a law."""

from __future__ import annotations

import math
from typing import Any

from shoal.config import TrainConfig
from shoal.plan.budget import step_flops


def made_up_run(config: TrainConfig, advantage: float, max_vio: float | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a `Trainer` returns: the loss falls by 0.3 a decade of FLOPs, of which `advantage` times as many count."""
    assert config.steps is not None
    flops = step_flops(config) * config.steps
    rows = [{"loss": 1.0, "tokens_per_second": 1e12 * config.tokens_per_step / step_flops(config)}] * config.steps
    return {
        "val_bpb": 4 - 0.3 * math.log10(flops / 1e11 * advantage) + 1e-4 * config.seed,
        "train_flops": flops,
        "tokens": config.tokens_per_step * config.steps,
        "steps": config.steps,
        "skipped": 0,
        "counting_seconds": 0.0,
        "counted_ngrams": 0,
        "max_vio": max_vio,
    }, rows
