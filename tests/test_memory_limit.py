"""`shoal train --memory-limit`: choosing measures, keeping the limit, refusing what cannot be kept."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal import memory_limit
from shoal.cli import main
from shoal.config import TrainConfig, UserError, parse_bytes
from shoal.config.recipes import load_recipe
from shoal.plan.measures import Measures, candidates, predicted_bytes, predicted_seconds
from shoal.train.run_folder import RunFolder, run_facts

MIB = 1 << 20
BESIDE = 300 * MIB


def recipe(**changes: Any) -> TrainConfig:
    return dataclasses.replace(load_recipe("demo"), minutes=None, steps=10, device="cpu", **changes)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Trials that find what the planner says, a tenth more, and `BESIDE`."""
    seen: list[TrainConfig] = []

    def trial(config: TrainConfig) -> float:
        seen.append(config)
        return 1.1 * predicted_bytes(config, measures_of(config)) + BESIDE

    monkeypatch.setattr(memory_limit, "trial", trial)
    monkeypatch.setattr(memory_limit, "prepare", lambda config: None)
    return seen


def measures_of(config: TrainConfig) -> Measures:
    return Measures(
        config.micro_batch_size or config.batch_size, config.recompute, config.optimizer.moments == "bf16", config.return_memory,
        config.offload, config.update_early,
    )  # fmt: skip


def test_amounts_of_memory() -> None:
    assert [parse_bytes(text) for text in ("800M", "4G", "1.5GiB", "2 tb", "64k")] == [
        800 * MIB, 4096 * MIB, 1536 * MIB, 2 << 40, 64 << 10,
    ]  # fmt: skip
    for text in ("4", "0G", "-1G", "lots", "4 GG"):
        with pytest.raises(UserError, match="amount of memory"):
            parse_bytes(text)


@pytest.mark.parametrize("limit", ["4G", "700M", "480M", "420M"])
def test_a_limit_is_kept_by_the_fastest_measures(limit: str, trials: list[TrainConfig]) -> None:
    config = recipe(memory_limit=limit)
    chosen = memory_limit.fit(config)
    assert memory_limit.trial(chosen) <= parse_bytes(limit)
    assert len(trials) <= memory_limit.TRIALS + 1
    # Nothing that would be faster, and has room according to what the trials found, was passed over by much.
    mine = measures_of(chosen)
    beside = memory_limit.trial(chosen) - predicted_bytes(config, mine)
    for other in candidates(config):
        if predicted_bytes(config, other) + beside < 0.9 * parse_bytes(limit):
            assert predicted_seconds(config, mine) <= predicted_seconds(config, other)
    if limit == "4G":
        assert mine == Measures(config.batch_size)


def test_what_does_not_fit_is_refused_with_what_would(trials: list[TrainConfig]) -> None:
    config = recipe(memory_limit="420M", sequence_length=2048)
    with pytest.raises(UserError, match="420M are too little") as refusal:
        memory_limit.fit(config)
    assert "--memory-limit" in str(refusal.value)
    enough = str(refusal.value).split("--memory-limit ")[1].split()[0]
    assert memory_limit.fit(dataclasses.replace(config, memory_limit=enough))
    assert "--sequence-length" in str(refusal.value)


def test_a_run_that_goes_on_keeps_its_measures_and_what_it_learns(trials: list[TrainConfig], tmp_path: Path) -> None:
    asked = recipe(memory_limit="420M", out=str(tmp_path / "run"))
    first = Measures(4, bf16_moments=True).apply(asked)
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").write_json("run.json", run_facts(first, "", "fp32"))
    tried = len(trials)
    again = memory_limit.go_on(dataclasses.replace(asked, resume=True))
    assert (measures_of(again), len(trials)) == (measures_of(first), tried)
    more = memory_limit.go_on(dataclasses.replace(asked, memory_limit="4G", resume=True))
    assert measures_of(more) == Measures(asked.batch_size, bf16_moments=True)


def test_what_was_asked_for_stays(trials: list[TrainConfig]) -> None:
    config = recipe(memory_limit="500M", micro_batch_size=4, recompute=("attention",), offload=True)
    chosen = memory_limit.fit(config)
    assert chosen.offload
    assert "attention" in chosen.recompute
    assert (chosen.micro_batch_size or 99) <= 4


def test_candidates_hold_together() -> None:
    config = recipe()
    config.optimizer.clip = 0.0
    for choice in candidates(config):
        choice.apply(config).validate()
    assert any(choice.update_early for choice in candidates(config))
    config.optimizer.clip = 1.0
    assert not any(choice.update_early for choice in candidates(config))
    assert any(choice.bf16_moments for choice in candidates(config))
    config.optimizer.adam_betas = (0.9, 0.999)
    assert not any(choice.bf16_moments for choice in candidates(config))


@pytest.mark.parametrize("weaker", [Measures(32), Measures(8), Measures(8, ("swiglu",))])
def test_every_measure_saves_memory_and_costs_time(weaker: Measures) -> None:
    config = recipe()
    stronger = [
        dataclasses.replace(weaker, micro_batch=weaker.micro_batch // 2),
        dataclasses.replace(weaker, recompute=("feed_forward", "attention")),
        dataclasses.replace(weaker, return_memory=True),
        dataclasses.replace(weaker, bf16_moments=True),
    ]
    for one in stronger:
        assert predicted_bytes(config, one) < predicted_bytes(config, weaker)
        assert predicted_seconds(config, one) > predicted_seconds(config, weaker)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["480M", "400M", "250M"])
def test_the_operating_system_agrees(limit: str, workshop: Path, tmp_path: Path) -> None:
    """A whole run of the demo's shape: peak memory as the kernel counts it, within 5% of the limit, or of the one that a refusal names."""
    text = tmp_path / "text.txt"
    text.write_text((workshop / "text.txt").read_text(encoding="utf-8") * 8, encoding="utf-8")
    command = ["train", "demo", "--data", str(text), "--steps", "4", "--threads", "1", "--out", str(tmp_path / "run")]
    more = ["--corpus.cache", str(tmp_path / "cache"), "--precision", "fp32", "--prompts", "--json", "--memory-limit"]
    watched = (
        "import sys, torch; from shoal.cli import main; from shoal.runtime import peak_memory; "
        "code = main(sys.argv[1:]); print(peak_memory(torch.device('cpu'))); sys.exit(code)"
    )

    def run(limit: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", watched, *command, *more, limit], capture_output=True, text=True, timeout=500)

    done = run(limit)
    if done.returncode == 2 and limit != "480M":  # that is enough, so it must be kept
        assert not (tmp_path / "run").exists()
        named = re.search(r"too little for this run.*--memory-limit (\d+M) would do", done.stderr)
        assert named, done.stderr
        limit = named[1]
        done = run(limit)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) <= 1.05 * parse_bytes(limit)
    assert json.loads(done.stdout.splitlines()[-2])["steps"] == 4


def test_several_processes_are_refused_before_anything_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(memory_limit, "trial", lambda *args: pytest.fail("a trial"))
    args = ["train", "default", "--memory-limit", "4G", "--steps", "3", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*args, "--nproc", "2"]) == 2
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)  # as torchrun does
    assert main(args) == 2
    assert capsys.readouterr().err == "shoal: error: memory_limit is for a single process: leave it away, or --nproc\n" * 2
    assert not (tmp_path / "run").exists()
