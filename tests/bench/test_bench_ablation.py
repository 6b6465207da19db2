"""The ablations: arms that differ in one thing, ratios, what the picture and the JSON object say; and a real one in miniature."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.bench.made_up_runs import made_up_run

from shoal.bench.ablation.command import run_bench
from shoal.bench.ablation.studies import Study
from shoal.cli import main
from shoal.config import BenchAblationCommand, TrainConfig, UserError
from shoal.plan.budget import step_flops
from shoal.plan.cost import count_parameters

pytest.importorskip("matplotlib")
STUDIES = ("experts", "attention", "anchored", "granularity", "balance")


class FakeTrainer:
    """Loss falls by 0.3 a decade of FLOPs; dense layers need 1.8 times as many as mixtures for the same."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, config: TrainConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        self.count += 1
        mixture = bool(config.model.n_routed_experts)
        return made_up_run(config, 1.8 if mixture else 1, 0.25 if mixture else None)


@pytest.fixture
def command(workshop: Path, tmp_path: Path) -> BenchAblationCommand:
    return BenchAblationCommand(data=(str(workshop / "text.txt"),), out=str(tmp_path / "ablation"))


def test_ratios_and_their_trend_are_those_of_the_laws_behind_the_runs(
    command: BenchAblationCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_bench(command, FakeTrainer())
    assert result["reference"] == "dense"
    assert result["seeds"] == 3
    assert result["shared_flops_ratio"] == pytest.approx(1.8, rel=0.02)
    low, high = result["shared_flops_ratio_interval"]
    assert low <= result["shared_flops_ratio"] <= high
    budgets = Study.load("experts").budgets["shared"]
    assert [flops for flops, _ in result["shared_trend"]] == pytest.approx(budgets, rel=0.05), "the dearest run is the lowest loss of both"
    assert [ratio for _, ratio in result["shared_trend"]] == pytest.approx([1.8] * len(result["shared_trend"]), rel=0.02)
    assert (Path(command.out) / "experts.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "95% interval" in shown
    assert "0.25" in shown


def test_nothing_is_said_beyond_what_the_first_arm_reaches(command: BenchAblationCommand, capsys: pytest.CaptureFixture[str]) -> None:
    class Ahead(FakeTrainer):
        def __call__(self, config: TrainConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            summary, rows = super().__call__(config)
            return summary | {"val_bpb": summary["val_bpb"] - (2 if config.model.n_routed_experts else 0)}, rows

    result = run_bench(command, Ahead())
    assert result["shared_flops_ratio"] is None
    assert result["shared_trend"] == []
    assert "do not overlap" in capsys.readouterr().out


def test_studies_share_runs_of_equal_arms(command: BenchAblationCommand) -> None:
    command.seeds = 1
    trainer = FakeTrainer()
    run_bench(command, trainer)
    before = trainer.count
    command.study = "granularity"
    run_bench(command, trainer)
    study = Study.load("granularity").budgets
    known = {(arm, flops) for arm, budgets in Study.load("experts").budgets.items() for flops in budgets}
    assert trainer.count - before == len({(arm, flops) for arm, budgets in study.items() for flops in budgets} - known)
    assert len((Path(command.out) / "runs.jsonl").read_text().splitlines()) == trainer.count


@pytest.mark.parametrize("name", STUDIES)
def test_arms_spend_their_budgets_and_have_as_many_active_parameters(name: str) -> None:
    study = Study.load(name)
    active = []
    for arm, budgets in study.budgets.items():
        for flops in budgets:
            config = study.config(arm, flops)
            assert config.steps is not None
            assert config.steps * step_flops(config) == pytest.approx(flops, rel=0.02)
        model = config.model
        router = (model.n_routed_experts or 0) * model.hidden_size * model.num_hidden_layers
        active.append(count_parameters(model).active - router)
    if name not in ("attention", "anchored"):  # MLA has smaller matrices than multi-head attention: there the FLOPs are equal
        assert len(set(active)) == 1, "but for the router"


def test_the_help_names_the_largest_budget() -> None:
    assert BenchAblationCommand.__doc__ is not None
    largest = max(flops for name in STUDIES for budgets in Study.load(name).budgets.values() for flops in budgets)
    assert float(BenchAblationCommand.__doc__.split(" up to ")[1].split()[0]) == largest


def test_a_study_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="there is no study 'depth': use one of experts"):
        Study.load("depth")


def test_a_real_one(command: BenchAblationCommand, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "ablation", "--study", "attention", "--quick", "--data", *command.data, "--out", command.out]
    assert main(args) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {run["side"] for run in result["runs"]} == set(Study.load("attention").budgets)
    assert all(math.isfinite(run["bpb"]) and run["seconds"] > 0 for run in result["runs"])


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ablation", "--seeds", "0"]) == 2
    assert capsys.readouterr().err == "shoal: error: --seeds is 0: it must be at least 1\n"
