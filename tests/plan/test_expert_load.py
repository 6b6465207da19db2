"""Measured loads of experts, and what placing them by load is said to gain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shoal.config import ModelConfig, UserError
from shoal.config.huggingface import model_config_to_dict
from shoal.engine import EngineStats
from shoal.plan.command import PlanCommand, run
from shoal.plan.expert_load import read_expert_load

MODEL = ModelConfig(num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=12, num_experts_per_tok=2)
LOAD = np.array([[900, 80, 10, 0, 20, 30, 40, 50, 60, 70, 80, 90], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 305]])


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model_config_to_dict(MODEL)), encoding="utf-8")
    return str(path)


def metrics_of(load: np.ndarray, folder: Path) -> str:
    from shoal.serve.metrics import Metrics

    metrics = Metrics()
    metrics.watch(lambda: EngineStats(expert_load=load))
    (folder / "metrics.txt").write_bytes(metrics.text())
    return str(folder / "metrics.txt")


def test_loads_are_read_from_what_a_server_says(tmp_path: Path) -> None:
    assert read_expert_load(metrics_of(LOAD, tmp_path), 12) == LOAD.tolist()


def test_the_last_load_of_a_run_counts(tmp_path: Path) -> None:
    rows = [{"step": 1, "expert_load": [[0.5, 0.5]]}, {"step": 11, "expert_load": [[0.25, 0.75]]}, {"step": 12, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 1', encoding="utf-8")
    assert read_expert_load(str(tmp_path), 2) == [[0.25, 0.75]]


def test_copies_of_busy_experts_even_the_load_out(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = metrics_of(LOAD, tmp_path)
    placed = run(PlanCommand(model=model, expert_load=file, devices=4, redundant_experts=4))["expert_placement"]
    assert placed["in_order"] == [pytest.approx(990 * 4 / 1430), pytest.approx(315 * 4 / 360)]
    for plain, spread in zip(placed["placed"], placed["with_copies"], strict=True):
        assert 1 <= spread < 0.6 * plain
    assert [len(layer) for layer in placed["placements"]] == [16, 16]
    assert "by load, 4 redundant" in capsys.readouterr().out


def test_experts_that_divide_only_with_their_copies(model: str, tmp_path: Path) -> None:
    placed = run(PlanCommand(model=model, expert_load=metrics_of(LOAD, tmp_path), devices=8, redundant_experts=4))["expert_placement"]
    assert placed["in_order"] is placed["placed"] is None
    assert len(placed["with_copies"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"redundant_experts": 3}, "15 places do not divide by 4"),
        ({"redundant_experts": -1}, "--redundant-experts is -1"),
        ({"nodes": 2, "devices": None}, "--machine"),
        ({"machine": "h100", "devices": 12}, "12 devices leave 4 on a node of 8: use 8 or 16"),
        ({"model": "llama-3.1-8b"}, "models with experts"),
        ({"model": "deepseek-v3"}, "12 experts, but the model has 256"),
        ({"expert_load": "nowhere"}, "cannot be read"),
    ],
)
def test_what_cannot_be_placed_is_refused(model: str, tmp_path: Path, changes: dict, message: str) -> None:
    options = {"model": model, "expert_load": metrics_of(LOAD, tmp_path), "devices": 4} | changes
    with pytest.raises(UserError, match=message):
        run(PlanCommand(**options))


def test_a_file_without_loads_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no load"):
        run(PlanCommand(model=model, expert_load=metrics_of(np.zeros_like(LOAD), tmp_path), devices=4))
