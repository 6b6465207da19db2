"""The comparison of training efficiency: sides, kept runs, search, ratios; and a real one in miniature."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.made_up_runs import made_up_run

from shoal.bench import ablation
from shoal.bench.efficiency import runs
from shoal.bench.efficiency.command import RATIOS, run_bench
from shoal.bench.efficiency.runs import Runs, Stopped, key_of, train_in
from shoal.bench.efficiency.search import FACTORS, search
from shoal.bench.efficiency.sides import BUDGETS, load_side
from shoal.cli import main
from shoal.config import BenchAblationCommand, BenchEfficiencyCommand, TrainConfig, UserError
from shoal.config.huggingface import export_obstacles
from shoal.config.recipes import RULES, load_recipe
from shoal.plan.budget import step_flops
from shoal.plan.rules import Point, Rules
from shoal.train import trainer

pytest.importorskip("matplotlib")


def side_of(config: TrainConfig) -> str:
    if export_obstacles(config.model):
        return "full"
    if config.model.model_type != "llama":
        return "exportable"
    return "sampled" if config.sampled_softmax.drawn else "baseline"


class FakeTrainer:
    """Loss falls by 0.3 a decade of FLOPs; the recipes reach the baseline's with a tenth and a fifth of them."""

    def __init__(self) -> None:
        self.count = 0
        self.advantage = {"baseline": 1.0, "sampled": 2.0, "exportable": 5.0, "full": 10.0}

    def __call__(self, config: TrainConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        self.count += 1
        return made_up_run(config, self.advantage[side_of(config)])


@pytest.fixture
def command(workshop: Path, tmp_path: Path) -> BenchEfficiencyCommand:
    return BenchEfficiencyCommand(data=(str(workshop / "text.txt"),), out=str(tmp_path / "efficiency"))


def test_ratios_are_those_of_the_laws_behind_the_runs(command: BenchEfficiencyCommand, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench(command, FakeTrainer())
    assert result["flops_ratio"] == pytest.approx(10, rel=0.02)
    assert result["exportable_flops_ratio"] == pytest.approx(5, rel=0.02)
    assert result["seconds_ratio"] == pytest.approx(10, rel=0.02)
    assert result["sampled_flops_ratio"] == pytest.approx(5, rel=0.02)
    assert result["sampled_exportable_flops_ratio"] == pytest.approx(2.5, rel=0.02)
    assert [ratio for _, ratio in result["exportable_flops_ratio_trend"]] == pytest.approx([5] * 2, rel=0.02)
    low, high = result["flops_ratio_interval"]
    assert low <= result["flops_ratio"] <= high
    assert result["flops_ratio_at_least"] is None
    assert (Path(command.out) / "efficiency.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "95% interval" in shown
    assert "with the budget: 5.0" in shown
    for name in (*BUDGETS["small"], *(name for name, *_ in RATIOS)):
        assert name in shown


def test_the_seconds_of_a_run_are_those_of_undisturbed_steps_and_of_counting() -> None:
    config = load_side("full").config(BUDGETS["small"]["full"][0])
    summary, _ = made_up_run(config, 1.0)
    steps = [{"tokens_per_second": config.tokens_per_step / seconds} for seconds in (9.0, 1.0, 1.0, 4.0, 1.0, 2.0, 1.0, 3.0)]
    assert runs._run("full", 1.0, config, "", summary | {"counting_seconds": 5.0}, steps).seconds == pytest.approx(8 * 1.0 + 5)


@pytest.mark.parametrize(("quick", "asked", "got"), [(False, None, 3), (True, None, 1), (True, 2, 2)])
def test_as_many_seeds_as_asked_for(command: BenchEfficiencyCommand, quick: bool, asked: int | None, got: int) -> None:
    command.quick, command.seeds = quick, asked
    result = run_bench(command, FakeTrainer())
    assert result["seeds"] == got
    assert (result["flops_ratio_interval"] is None) == (got == 1)


def test_curves_that_do_not_overlap_are_said_so(command: BenchEfficiencyCommand, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = FakeTrainer()
    trainer.advantage = {"baseline": 1.0, "sampled": 1.0, "exportable": 1e-9, "full": 1e9}
    result = run_bench(command, trainer)
    assert result["flops_ratio"] is None
    dearest, cheapest = max(BUDGETS["small"]["baseline"]), min(BUDGETS["small"]["full"])
    assert result["flops_ratio_at_least"] == pytest.approx(dearest / cheapest, rel=0.05)
    assert result["exportable_flops_ratio"] is None
    assert result["exportable_flops_ratio_at_least"] is None
    assert capsys.readouterr().out.count("do not overlap") == 6


def test_runs_that_are_known_are_not_repeated(command: BenchEfficiencyCommand) -> None:
    first = FakeTrainer()
    result = run_bench(command, first)
    assert first.count == 3 * sum(len(budgets) for budgets in BUDGETS["small"].values())
    file = Path(command.out) / "runs.jsonl"
    file.write_text(file.read_text() + '{"side": "ba')
    again = FakeTrainer()
    assert run_bench(command, again) == result
    assert again.count == 0


@pytest.mark.parametrize(("scale", "name"), [(scale, name) for scale, sides in BUDGETS.items() for name in sides])
def test_every_budget_is_spent_and_every_side_is_what_it_says(scale: str, name: str) -> None:
    assert len(BUDGETS[scale][name]) >= 3
    for flops in BUDGETS[scale][name]:
        config = load_side(name).config(flops)
        assert config.steps is not None
        assert config.steps * step_flops(config) == pytest.approx(flops, rel=0.02)
        assert side_of(config) == name
        assert bool(export_obstacles(config.model)) == (name == "full")
        assert config.optimizer.name == ("adamw" if name in ("baseline", "sampled") else "muon")
        assert config.schedule.name == ("cosine" if name in ("baseline", "sampled") else config.schedule.name)


@given(st.floats(9, 21))
def test_mixtures_fit_four_bits_and_what_a_token_uses_stays_in_proportion(power: float) -> None:
    model = Rules.load("exportable").config(10**power).model
    inner = model.moe_intermediate_size
    assert model.hidden_size % 32 == inner % 32 == model.num_attention_heads * model.v_head_dim % 32 == 0
    assert abs(inner - model.hidden_size / 3) <= max(16, 32 - model.hidden_size / 3)
    assert model.num_experts_per_tok >= 2
    if model.num_experts_per_tok > 2:
        assert abs((model.num_experts_per_tok + model.n_shared_experts) * inner - model.hidden_size) <= inner / 2
    assert 32 <= (model.n_routed_experts or 0) <= 256


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_networks_of_several_layers_begin_copying_and_are_told_of_repetitions(layers: int) -> None:
    rules = Rules.load("exportable")
    config = rules.config(1e12, replace(rules.point(1e12), layers=layers))
    several = layers > 1
    assert (config.model.init == "copying") == config.teacher.repetitions == several
    assert config.model.first_k_dense_replace == several
    assert config.model.intermediate_size == config.model.moe_intermediate_size, "the dense layer is narrow"
    other = Rules.load("full").config(1e12, replace(rules.point(1e12), layers=layers))
    assert other.model.init == "anchored"


def test_all_sides_share_tokens_tokenizer_and_length() -> None:
    shared = {(c.sequence_length, c.model.vocab_size, c.eval_tokens, c.precision) for c in (Rules.load(s).config(1e12) for s in RULES)}
    assert len(shared) == 1


def test_the_search_finds_the_best_point_of_a_bowl_and_no_side_gets_other_steps() -> None:
    asked: list[Point] = []

    def loss(point: Point) -> float:
        asked.append(point)
        wanted = Point(width=72, layers=2, batch=1, rate=4)
        return sum(math.log(getattr(point, n) / getattr(wanted, n)) ** 2 for n in FACTORS)

    best, found = search(loss, Point(width=32, layers=2, batch=4, rate=1))
    assert best == Point(width=72, layers=2, batch=1, rate=4)
    assert found == pytest.approx(0)
    assert len(set(asked)) < 30


def test_a_run_that_diverged_does_not_win_the_search(command: BenchEfficiencyCommand) -> None:
    class Diverging(FakeTrainer):
        def __call__(self, config: TrainConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            summary, rows = super().__call__(config)
            if config.optimizer.adam_lr > 0.02:
                summary["val_bpb"] = math.nan
            return summary, rows

    command.search = command.quick = True
    result = run_bench(command, Diverging())
    for row in result["search"]["baseline"]:
        assert math.isfinite(row["bpb"])
        assert row["bpb"] <= row["start_bpb"]


def test_a_point_that_cannot_be_trained_does_not_end_the_search(
    command: BenchEfficiencyCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(FakeTrainer):
        def __call__(self, config: TrainConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            if config.optimizer.name == "adamw" and config.optimizer.adam_lr > 0.01:
                self.count += 1
                raise UserError("no finite loss for 20 steps in a row")
            return made_up_run(config, 1)

    command.search = command.quick = True
    trainer = Refusing()
    found = run_bench(command, trainer)["search"]
    assert set(found) == set(BUDGETS["small"])
    assert all(math.isfinite(row["bpb"]) for rows in found.values() for row in rows if row["start_bpb"] < math.inf)
    assert 0 < capsys.readouterr().err.count("no finite loss for 20 steps") == trainer.count, "a point is tried once"


def test_a_signal_ends_the_search(command: BenchEfficiencyCommand) -> None:
    def stopped(config: TrainConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        raise Stopped("stopped")

    command.search = command.quick = True
    with pytest.raises(Stopped):
        run_bench(command, stopped)


def test_a_signal_while_the_end_of_a_run_is_scored_ends_the_benchmark(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(workshop / "recipe.toml"))
    config = replace(recipe, steps=2, data=(str(workshop / "text.txt"),), corpus=replace(recipe.corpus, cache=str(workshop / "cache")))
    score = trainer.score

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(trainer, "score", score)
        return score(*args)

    monkeypatch.setattr(trainer, "score", interrupted)
    with pytest.raises(Stopped, match="the same command goes on"):
        train_in(config, tmp_path / "run")
    summary, rows = train_in(config, tmp_path / "run")
    assert summary["steps"] == len(rows) == 2


def test_a_folder_of_results_belongs_to_one_process(command: BenchEfficiencyCommand) -> None:
    Path(command.out).mkdir()
    program = "import sys; from pathlib import Path; from shoal.bench.efficiency.runs import open_runs"
    program += "\nwith open_runs(Path(sys.argv[1]), ''):\n    print(flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", program, command.out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        trainer = FakeTrainer()
        with pytest.raises(UserError, match="another process is training in"):
            run_bench(command, trainer)
        assert trainer.count == 0
        other.kill()


def test_half_a_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    trainer, rules = FakeTrainer(), Rules.load("baseline")
    (tmp_path / "runs.jsonl").write_text('{"side": "baseline", "bud')
    for _ in range(2):
        Runs(tmp_path, "data", trainer).get("baseline", 1e11, rules.config(1e11))
    assert trainer.count == 1


def test_runs_of_other_code_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Rules.load("baseline").config(1e11)
    before = key_of(config, "data")
    assert key_of(replace(config, data=("elsewhere",)), "data") == before
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b" " if path.name == "loss.py" else b""))
    runs.code_fingerprint.cache_clear()
    assert key_of(config, "data") != before
    runs.code_fingerprint.cache_clear()


@pytest.mark.parametrize("bench", [run_bench, ablation.run_bench])
def test_a_missing_matplotlib_is_noticed_before_anything_is_trained(
    command: BenchEfficiencyCommand, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = FakeTrainer()
    with pytest.raises(UserError, match="matplotlib"):
        bench(command if bench is run_bench else BenchAblationCommand(data=command.data, out=command.out), trainer)
    assert trainer.count == 0


def test_the_store_holds_one_line_a_run_and_tells_data_apart(tmp_path: Path) -> None:
    config = Rules.load("baseline").config(1e11)
    trainer = FakeTrainer()
    for data in ("one", "two", "one"):
        Runs(tmp_path, data, trainer).get("baseline", 1e11, config)
    assert trainer.count == 2
    assert len([json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]) == 2


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "efficiency", "--seeds", "0"]) == 2
    assert capsys.readouterr().err == "shoal: error: --seeds is 0: it must be at least 1\n"
