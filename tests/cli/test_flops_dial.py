"""`shoal train --flops`: a whole configuration from one number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.config.recipes import load_recipe


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


@pytest.mark.parametrize("rules", [[], ["exportable"]])
def test_minutes_are_kept_and_give_a_shape(rules: list[str], workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--data", str(workshop / "text.txt"), "--corpus.cache", str(workshop / "cache"), "--out", str(tmp_path / "run")]
    assert main(["train", *rules, "--minutes", "0.03", *places, "--threads", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1.8 <= summary["seconds"] < 10
    assert bool(summary["counted_ngrams"]) == (not rules)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--flops", "many"], "--flops is 'many'"),
        (["--flops"], "--flops is ''"),
        (["--flops", "-1"], "more than 0"),
        (["--flops", "nan"], "more than 0"),
        (["--flops", "10"], "less than one step"),
        (["fast", "--flops", "1e9"], "no rules 'fast'"),
        (["exportable", "--steps", "5"], "give --minutes or --flops"),
        (["--minutes", "0"], "--minutes is 0"),
    ],
)
def test_a_bad_budget_is_one_line(args: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *args]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
