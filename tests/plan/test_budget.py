"""Budgets of FLOPs: what is planned is what the trainer spends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.config import TrainConfig, UserError
from shoal.config.recipes import load_recipe
from shoal.plan.budget import step_flops, steps_for


def test_a_run_spends_what_its_steps_cost(trained: Path) -> None:
    config = load_recipe(str(trained / "config.toml"))
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["train_flops"] == pytest.approx(summary["steps"] * step_flops(config), rel=1e-9)


def test_a_budget_buys_the_nearest_number_of_steps() -> None:
    config = TrainConfig(steps=1)
    assert steps_for(config, 10.4 * step_flops(config)) == 10
    assert steps_for(config, 10.6 * step_flops(config)) == 11
    with pytest.raises(UserError, match="less than one step"):
        steps_for(config, 0.4 * step_flops(config))
