"""A checkpoint fits any layout; a process that dies ends the run at once, and nothing but the steps since the last checkpoint is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layouts import SMALL, STYLES, Learned, settings, training
from processes import in_processes
from tests.alive import wait_for_end, wait_for_state

from shoal.config import CheckpointConfig, ModelConfig, TrainConfig
from shoal.config.recipes import to_toml
from shoal.formats import checkpoints

EVERY = CheckpointConfig(every_steps=8, every_minutes=0, keep_last=20)


def as_of_step(run: Path, step: int, copy: Path) -> Path:
    """What was on disk right after the checkpoint of `step`."""
    shutil.copytree(run, copy)
    for path in checkpoints.complete_checkpoints(copy):
        if checkpoints.checkpoint_step(path) > step:
            shutil.rmtree(path)
    return copy


def assert_same_losses(rows: list[dict[str, Any]], expected: Learned) -> None:
    for row in rows:
        for figure in ("loss", "mtp_loss", "max_vio"):
            assert row[figure] == pytest.approx(expected.rows[row["step"] - 1][figure], abs=1e-5), (figure, row["step"])


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_processes_is_resumed_by_one_and_by_two(
    single: Callable[..., Learned], workshop: Path, tmp_path: Path, optimizer: str
) -> None:
    config = settings(workshop, tmp_path / "run", optimizer=optimizer, expert=2, checkpoint=EVERY)
    in_processes(2, training, config)
    expected = single(optimizer=optimizer)
    alone = as_of_step(tmp_path / "run", 8, tmp_path / "alone")
    rows = training(settings(workshop, alone, optimizer=optimizer, resume=True, checkpoint=EVERY))
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert_same_losses(rows, expected)
    both = as_of_step(alone, 16, tmp_path / "both")  # 16 was written by the one process
    rows = in_processes(2, training, settings(workshop, both, optimizer=optimizer, resume=True, checkpoint=EVERY, pipeline=2))[0]
    assert_same_losses(rows, expected)


@pytest.mark.parametrize("dense", ["shard", "replicate"])
def test_tables_of_ngrams_are_saved_and_resumed_by_two_processes(workshop: Path, tmp_path: Path, dense: str) -> None:
    """Their optimizer keeps a number for every row beside the moments, which have the tables' shape."""
    every = CheckpointConfig(every_steps=4, every_minutes=0, keep_last=20)
    shape = ModelConfig(**SMALL | STYLES["v3"] | {"ngram_order": 3, "ngram_rows": 63})
    changes: dict[str, Any] = {"model": shape, "steps": 8, "dense": dense, "checkpoint": every}
    whole = in_processes(2, training, settings(workshop, tmp_path / "run", **changes))[0]
    half = as_of_step(tmp_path / "run", 4, tmp_path / "half")
    alone = shutil.copytree(half, tmp_path / "alone")
    rows = in_processes(2, training, settings(workshop, half, resume=True, **changes))[0]
    assert learnt(rows) == learnt(whole)
    rows = training(settings(workshop, alone, resume=True, **changes))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("count", "layout"), [(1, {}), (2, {"pipeline": 2}), (2, {}), (8, {"expert": 4, "per_node": 2}), (8, {"pipeline": 4, "expert": 2})]
)
def test_a_checkpoint_of_four_processes_fits_other_layouts(
    single: Callable[..., Learned], workshop: Path, tmp_path: Path, count: int, layout: dict[str, Any], optimizer: str
) -> None:
    config = settings(workshop, tmp_path / "run", optimizer=optimizer, expert=2, checkpoint=EVERY)
    in_processes(4, training, config)
    half = as_of_step(tmp_path / "run", 8, tmp_path / "half")
    again = settings(workshop, half, optimizer=optimizer, resume=True, checkpoint=EVERY, **layout)
    rows = training(again) if count == 1 else in_processes(count, training, again)[0]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert_same_losses(rows, single(optimizer=optimizer))


@pytest.mark.parametrize(
    ("count", "layout"),
    [
        (2, {"expert": 2}),
        pytest.param(2, {"expert": 2, "overlap": True}, marks=pytest.mark.slow),
        pytest.param(2, {"pipeline": 2, "schedule": "zbv"}, marks=pytest.mark.slow),
        pytest.param(4, {"expert": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_same_layout_goes_on_to_the_bit(workshop: Path, tmp_path: Path, count: int, layout: dict[str, Any]) -> None:
    whole = in_processes(count, training, settings(workshop, tmp_path / "run", checkpoint=EVERY, **layout))[0]
    half = as_of_step(tmp_path / "run", 8, tmp_path / "half")
    rows = in_processes(count, training, settings(workshop, half, resume=True, checkpoint=EVERY, **layout))[0]
    assert learnt(rows) == learnt(whole)


def learnt(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Of every step what does not depend on the clock."""
    return [[row[figure] for figure in ("step", "loss", "mtp_loss", "balance_loss", "max_vio", "grad_norm")] for row in rows]


def start(command: list[str], config: TrainConfig, folder: Path) -> subprocess.Popen:
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(replace(config, out=None)), encoding="utf-8")
    command = [sys.executable, *command, "train", str(recipe), "--out", str(folder / "run")]
    with said(folder).open("w") as file:  # not a pipe, which would be full before anyone reads it
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})


def said(folder: Path) -> Path:
    """What a run that was started wrote to stderr."""
    return folder / "stderr.txt"


def steps_done(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def steps_with_losses(run: Path) -> list[dict[str, Any]]:
    """Whole rows of steps in a run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [row for row in rows if "loss" in row]


def wait_for_step(run: Path, step: int, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while steps_done(run) < step:
        assert process.poll() is None, said(run.parent).read_text()
        assert time.monotonic() < until, "no progress"
        time.sleep(0.02)


def member(run: Path, rank: int) -> int:
    """Id of the process that has `rank` in the run."""
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and str(run).encode() in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")
def test_a_process_that_is_killed_ends_the_run_at_once(workshop: Path, tmp_path: Path) -> None:
    config = replace(settings(workshop, tmp_path / "run", steps=100000, checkpoint=EVERY), nproc=2)
    process = start(["-m", "shoal"], config, tmp_path)
    wait_for_step(tmp_path / "run", 9, process)
    os.kill(member(tmp_path / "run", 1), signal.SIGKILL)
    began = time.monotonic()
    process.wait(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 2
    assert "process 1 of 2 was killed by SIGKILL" in said(tmp_path).read_text().splitlines()[-1]
    assert "Traceback" not in said(tmp_path).read_text()
    assert checkpoints.complete_checkpoints(tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")
def test_one_interrupt_saves_and_a_second_one_ends_all_at_once(workshop: Path, tmp_path: Path) -> None:
    """Before that, Ctrl-Z halts all for a while."""
    config = replace(settings(workshop, tmp_path / "run", steps=100000), nproc=2)
    process = start(["-m", "shoal"], config, tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    os.kill(process.pid, signal.SIGTSTP)
    wait_for_state(process.pid, "T")
    members = [member(tmp_path / "run", rank) for rank in range(2)]
    for halted in members:
        wait_for_state(halted, "T")
        assert os.getsid(halted) != os.getsid(process.pid), "a terminal would send Ctrl-C to both"
    done = steps_done(tmp_path / "run")
    os.kill(process.pid, signal.SIGCONT)
    wait_for_step(tmp_path / "run", done + 2, process)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0, said(tmp_path).read_text()
    (saved,) = checkpoints.complete_checkpoints(tmp_path / "run")
    assert checkpoints.checkpoint_step(saved) == steps_done(tmp_path / "run")
    process = start(["-m", "shoal"], replace(config, resume=True), tmp_path)
    wait_for_step(tmp_path / "run", checkpoints.checkpoint_step(saved) + 2, process)
    members = [member(tmp_path / "run", rank) for rank in range(2)]
    os.kill(members[1], signal.SIGSTOP)  # so that the other waits for it, and cannot stop and save
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert said(tmp_path).read_text().splitlines()[-1] == "shoal: interrupted"
    wait_for_end(members, 30)
    assert checkpoints.complete_checkpoints(tmp_path / "run") == [saved]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")
def test_nobody_trains_on_when_the_launcher_is_killed(workshop: Path, tmp_path: Path) -> None:
    config = replace(settings(workshop, tmp_path / "run", steps=100000, checkpoint=EVERY), nproc=2)
    process = start(["-m", "shoal"], config, tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    members = [member(tmp_path / "run", rank) for rank in range(2)]
    process.kill()
    process.wait()
    wait_for_end(members, 10)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")
def test_ten_kills_cost_only_the_steps_since_the_last_checkpoint(workshop: Path, tmp_path: Path) -> None:
    run, draw = tmp_path / "run", random.Random(0)
    config = settings(workshop, run, steps=150, expert=2, checkpoint=CheckpointConfig(every_steps=10, every_minutes=0))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "12", "-m", "shoal"]
    process = start(torchrun, config, tmp_path)
    lost = []
    for kill in range(10):
        wait_for_step(run, 12 * (kill + 1), process)
        time.sleep(draw.uniform(0, 0.1))  # somewhere in a step
        safe = max(map(checkpoints.checkpoint_step, checkpoints.complete_checkpoints(run)))
        done = steps_with_losses(run)
        os.kill(member(run, draw.randrange(4)), signal.SIGKILL)
        lost.append((safe, done))
    assert process.wait(timeout=240) == 0, said(tmp_path).read_text()
    rows = steps_with_losses(run)
    assert [row["step"] for row in rows] == list(range(1, 151))
    for safe, done in lost:  # a row holds times, so that one that was made again is another
        assert rows[:safe] == done[:safe]
    print([len(done) - max(i + 1 for i, row in enumerate(done) if rows[i] == row) for _, done in lost], "steps were made again")
    uninterrupted = in_processes(4, training, replace(config, out=str(tmp_path / "uninterrupted")))[0]
    assert learnt(rows) == learnt(uninterrupted)
