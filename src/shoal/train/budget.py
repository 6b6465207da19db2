"""How much of a run is done: by the clock, by tokens or by steps."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TrainConfig


@dataclass
class Budget:
    """Exactly one of the three limits is set (`TrainConfig.validate`)."""

    minutes: float | None
    tokens: int | None
    steps: int | None
    tokens_per_step: int

    @classmethod
    def of(cls, config: TrainConfig) -> Budget:
        return cls(config.minutes, config.tokens, config.steps, config.tokens_per_step)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget spent after `step` steps and `seconds`; the run ends at 1, though its last step may cost more."""
        if self.minutes is not None:
            return min(seconds / (60 * self.minutes), 1.0)
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.tokens is not None
        return min(step * self.tokens_per_step / self.tokens, 1.0)

    def seconds_left(self, step: int, seconds: float) -> float:
        progress = self.progress(step, seconds)
        return seconds * (1 - progress) / progress if progress else float("inf")

    def __str__(self) -> str:
        if self.minutes is not None:
            return f"{self.minutes:g} min"
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.tokens:,} tokens"
