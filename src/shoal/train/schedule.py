"""What changes over the budget: learning rate, context and the weight of multi-token prediction."""

from __future__ import annotations

import math

from ..config import MTPConfig, ScheduleConfig, TrainConfig


def learning_rate_share(schedule: ScheduleConfig, progress: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1 of the budget).

    `trapezoid`: linear warm-up, plateau, linear decay (2405.18392). `cosine`: linear warm-up, then half a cosine (1608.03983).
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < schedule.warmup:
        return progress / schedule.warmup
    if schedule.name == "cosine":
        past = (progress - schedule.warmup) / max(1.0 - schedule.warmup, 1e-12)
        share = 0.5 * (1 + math.cos(math.pi * past))
    else:
        # A decay that would begin before the warm-up ends begins where it ends, or the rate would jump.
        share = min(1.0, (1.0 - progress) / max(min(schedule.decay, 1.0 - schedule.warmup), 1e-12))
    return schedule.final + (1 - schedule.final) * share


def extends_context(config: TrainConfig, progress: float) -> bool:
    """Whether the model is to see more at `progress` than the rows hold. One that training starts from knows its context already."""
    longer = config.start is None and config.sequence_length < config.model.max_position_embeddings
    return longer and config.schedule.extension > 0 and progress >= 1 - config.schedule.extension


def mtp_weight(config: MTPConfig, progress: float) -> float:
    """Weight lambda of the multi-token prediction loss at `progress`."""
    if progress < config.begins:
        return 0.0
    return config.weight + (config.final_weight - config.weight) * min(max(progress, 0.0), 1.0)
