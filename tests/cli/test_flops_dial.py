"""`shoal train --flops`, `--params` and `--minutes`: a whole configuration from one number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shoal.cli import main
from shoal.config import TrainConfig
from shoal.config.recipes import RULES, load_recipe
from shoal.plan.cost import count_parameters
from shoal.plan.rules import Rules


@pytest.mark.parametrize(
    "order", [["--flops", "1e9"], ["full", "--flops=1e9"], ["exportable", "--flops", "1e9", "--model.num-hidden-layers", "3"]]
)
def test_a_budget_of_flops_is_spent(order: list[str], workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--data", str(workshop / "text.txt"), "--corpus.cache", str(workshop / "cache"), "--out", str(tmp_path / "run")]
    assert main(["train", *order, *places, "--threads", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    config = load_recipe(str(tmp_path / "run" / "config.toml"))
    exportable = order[0] == "exportable"
    assert bool(config.teacher.order) == exportable
    assert bool(config.model.count_order) == (not exportable)
    assert config.optimizer.name == "muon"
    if "--model.num-hidden-layers" in order:
        assert config.model.num_hidden_layers == 3
    else:  # the tokenizer of so small a text is smaller than planned, and so is the head
        assert 0.2e9 < summary["train_flops"] < 1.1e9
    assert main(["generate", str(tmp_path / "run"), "red", "--max-tokens", "3", "--ignore-eos", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 3
    if not exportable:
        assert main(["quantize", str(tmp_path / "run"), str(tmp_path / "small")]) == 0
        assert main(["generate", str(tmp_path / "small"), "red", "--max-tokens", "3", "--ignore-eos", "--threads", "1"]) == 0
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "run.gguf"), "--format", "gguf"]) == 2
        assert "count_order is" in capsys.readouterr().err


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("wanted", [1e6, 1e7, 1e8, 1e9])
def test_a_size_is_met(name: str, wanted: float) -> None:
    rules = Rules.load(name)
    flops = rules.flops_for(wanted)
    found, *others = (count_parameters(rules.config(some).model).total for some in (flops, flops / 1.01, flops * 1.01))
    assert all(abs(math.log(found / wanted)) <= abs(math.log(other / wanted)) for other in others), "no model of the rules is nearer"
    assert 0.6 < found / wanted < 1.6


def test_a_model_of_a_size_is_trained(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--data", str(workshop / "text.txt"), "--corpus.cache", str(workshop / "cache"), "--out", str(tmp_path / "run")]
    assert main(["train", "exportable", "--params", "0.3M", "--steps", "2", *places, "--threads", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 2
    assert 0.1e6 < summary["params_total"] < 0.5e6


@pytest.mark.parametrize(("size", "near"), [("5M", False), ("3.4M", True)])
def test_a_size_that_is_missed_is_told(size: str, near: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shoal.train.train", lambda config: SimpleNamespace(reports=False))
    assert main(["train", "exportable", "--params", size]) == 0
    said = "" if near else "asked for 5.00M parameters: the nearest model of the rules exportable has 3.45M\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("args", [["exportable"], ["full", "--flops", "1e9"], ["--minutes", "5"], ["baseline", "--params=5M"], ["demo"]])
def test_help_needs_no_budget(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *args, "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "RULES: full" in out
    assert "usage: shoal train" in out


@pytest.mark.parametrize("rules", [[], ["exportable"]])
def test_minutes_are_kept_and_give_a_shape(rules: list[str], workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--data", str(workshop / "text.txt"), "--corpus.cache", str(workshop / "cache"), "--out", str(tmp_path / "run")]
    assert main(["train", *rules, "--minutes", "0.03", *places, "--threads", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1.8 <= summary["seconds"] < 10
    assert bool(summary["counted_ngrams"]) == (not rules)


@pytest.mark.parametrize("dial", [["exportable", "--minutes", "0.01"], ["full", "--flops", "1e9"]])
def test_the_same_command_resumes_the_model_that_rules_found(
    dial: list[str], workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ["--data", str(workshop / "text.txt"), "--corpus.cache", str(workshop / "cache"), "--out", str(tmp_path / "run")]
    command = ["train", *dial, *places, "--threads", "1", "--json"]
    assert main(command) == 0
    monkeypatch.setattr("shoal.plan.rules.SHARE_OF_PEAK", 20.0)  # as if the machine had become faster
    assert main([*command, "--resume"]) == 0
    first, again = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (first["params_total"], first["steps"]) == (again["params_total"], again["steps"])


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--flops", "many"], "--flops is 'many'"),
        (["--flops"], "--flops is ''"),
        (["--flops", "-1"], "more than 0"),
        (["--flops", "nan"], "more than 0"),
        (["--flops", "10"], "less than one step"),
        (["fast", "--flops", "1e9"], "no recipe 'fast'"),
        (["demo", "--flops", "1e9"], "demo has its shape"),
        (["exportable", "--steps", "5"], "give --minutes, --flops or --params"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--params", "large"], "--params is 'large'"),
        (["--params", "M"], "--params is 'M'"),
        (["--params", "1K"], "have 101,354 to "),
        (["--params", "nan"], "nan parameters"),
        (["--params", "9000B"], "9e+12 parameters"),
        (["--params", "5M", "--flops", "1e12"], "give one of them"),
        (["--resume", "--flops", "1e12"], "are for new runs"),
    ],
)
def test_a_bad_budget_is_one_line(args: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *args]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_processes_train_the_model_that_was_found_for_all_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each would measure the machine for itself, and find another."""
    started: list[tuple[TrainConfig, int]] = []

    def launch(args: list[str], count: int) -> None:
        assert args[0] == "train"
        started.append((load_recipe(args[1]), count))

    monkeypatch.setattr("shoal.parallel.launch.launch", launch)
    out = str(tmp_path / "run")
    assert main(["train", "baseline", "--minutes", "5", "--nproc", "2", "--batch-size", "4", "--out", out]) == 0
    ((config, count),) = started
    assert (count, config.batch_size, config.minutes, config.steps, config.out) == (2, 4, 5, None, out)
    assert config.model.model_type == "llama"
    assert config.model.hidden_size > 0
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "baseline", "--minutes", "5"]) == 2


def test_rules_were_fitted_in_fp32_which_a_gpu_need_not_keep_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, precision in ((False, "fp32"), (True, "auto")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert all(Rules.load(name).config(1e12).precision == precision for name in RULES)
