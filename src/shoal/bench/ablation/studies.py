"""The studies of `studies.toml`: arms that differ in one thing, and the budgets of their runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from ...config import TrainConfig, UserError
from ...config.recipes import from_table, read_toml
from ...plan.budget import steps_for
from ...plan.rules import merged


@dataclass(frozen=True)
class Study:
    """Arms by name, in the order of the file; the first is what the others are compared with."""

    name: str
    labels: dict[str, str]
    budgets: dict[str, list[float]]
    """FLOPs of the runs of every arm."""
    tables: dict[str, dict[str, Any]]
    """Settings of `shoal train` of every arm."""
    batch: dict[str, float]
    """Sequences of a step: `at_1e12` times (FLOPs / 1e12) to the `power`."""

    @classmethod
    def load(cls, name: str) -> Study:
        """Raises `UserError` where there is no such study."""
        table = read_toml((resources.files(__package__) / "studies.toml").read_text(encoding="utf-8"), "studies")
        if name not in table["studies"]:
            raise UserError(f"there is no study {name!r}: use one of {', '.join(table['studies'])}")
        arms = {arm: dict(table["arms"][arm]) for arm in table["studies"][name]}
        labels = {arm: changes.pop("label") for arm, changes in arms.items()}
        tables = {arm: merged(table["settings"], changes) for arm, changes in arms.items()}
        return cls(name, labels, table["studies"][name], tables, table["batch"])

    @property
    def reference(self) -> str:
        return next(iter(self.budgets))

    @property
    def others(self) -> list[str]:
        return list(self.budgets)[1:]

    def config(self, arm: str, flops: float) -> TrainConfig:
        """Settings of a run of an arm; steps are what the budget buys."""
        batch = max(1, round(self.batch["at_1e12"] * (flops / 1e12) ** self.batch["power"]))
        config = from_table(TrainConfig, self.tables[arm] | {"batch_size": batch, "steps": 1}, f"arm {arm}")
        config = replace(config, steps=steps_for(config, flops))
        config.validate()
        return config
