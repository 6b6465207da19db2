"""A run that is stopped or killed at any moment ends with the bits of one that was not.

The runs are started from a fork server that has imported everything already, so that a start costs little.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

STEPS = 60
PATIENCE = 60.0
"""Seconds after which a run that should have moved has not."""

Args = Callable[..., list[str]]


def run_shoal(args: list[str], log: str) -> None:
    """`shoal ARGS` in a process of its own; stderr is appended to a file, stdout dropped."""
    for descriptor, name in ((1, os.devnull), (2, log)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    from shoal.cli import main

    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # no report: it takes longer than the run
    sys.exit(main(args))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[list[str], Path], BaseProcess]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shoal.cli", "shoal.showcase", "shoal.train"])
    begun: list[BaseProcess] = []

    def begin(args: list[str], log: Path) -> BaseProcess:
        process = context.Process(target=run_shoal, args=(args, str(log)))
        process.start()
        begun.append(process)
        return process

    yield begin
    for process in begun:
        if process.is_alive():
            process.kill()


@pytest.fixture(scope="module")
def args_of(train_args: Args) -> Callable[..., list[str]]:
    """A run with a checkpoint every few steps; the report is for others to test."""

    def make(out: Path, *more: str) -> list[str]:
        return train_args(out, "--steps", str(STEPS), "--checkpoint.every-steps", "7", *more)

    return make


@pytest.fixture(scope="module")
def uninterrupted(start: Any, args_of: Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(args_of(run), run.parent / "log")
    process.join()
    assert process.exitcode == 0, (run.parent / "log").read_text()
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines_written(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics_file(run: Path) -> int:
    """Which file holds the metrics: another one each time that training begins; 0 for none."""
    path = run / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Until the condition holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.005)


def wait_until_at_work(run: Path, before: int, process: BaseProcess) -> None:
    """Until the loop has begun, `before` being the metrics file that was there then."""
    wait_for(lambda: metrics_file(run) != before and lines_written(run) > 0, process)


def assert_equal_to_the_bit(run: Path, other: Path) -> None:
    exact = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio_layers", "lr")
    for key in exact:
        assert [row[key] for row in rows(run) if "loss" in row] == [row[key] for row in rows(other) if "loss" in row], key
    weights = [folder / "checkpoints" / f"step_{STEPS:07d}" / "model.safetensors" for folder in (run, other)]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}) == 1
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, other)]
    assert summaries[0]["val_bpb"] == summaries[1]["val_bpb"]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]


def kill_until_done(start: Any, args_of: Args, uninterrupted: Path, run: Path, kills: int, seed: int) -> int:
    """Start, kill at a random moment, resume, and so on; then let it end. Returns how often it was killed."""
    draw, log, killed = random.Random(seed), run.parent / "log", 0
    seconds = json.loads((uninterrupted / "summary.json").read_text())["seconds"]
    while True:
        begun, before = (run / "run.json").exists(), metrics_file(run)
        process = start(args_of(run, *(["--resume"] if begun else [])), log)
        if killed < kills:
            if not begun or draw.random() < 0.7:  # else it may die while it is loading
                wait_until_at_work(run, before, process)
            time.sleep(draw.uniform(0, 0.4) * seconds)
            process.kill()
        process.join()
        if process.exitcode == 0:
            return killed
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        killed += 1


def test_killed_runs_go_on_to_the_same_bits(start: Any, args_of: Args, uninterrupted: Path, tmp_path: Path) -> None:
    assert kill_until_done(start, args_of, uninterrupted, tmp_path / "run", kills=3, seed=0) > 0
    assert_equal_to_the_bit(tmp_path / "run", uninterrupted)
    assert not [path.name for path in (tmp_path / "run").rglob("*tmp")]


@pytest.mark.slow
def test_runs_killed_twenty_times_go_on_to_the_same_bits(start: Any, args_of: Args, uninterrupted: Path, tmp_path: Path) -> None:
    killed = 0
    for number in range(20):
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        killed += kill_until_done(start, args_of, uninterrupted, run, kills=20, seed=number)
        assert_equal_to_the_bit(run, uninterrupted)
        if killed >= 20:
            return
    pytest.fail(f"killed only {killed} times")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(
    start: Any, args_of: Args, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(args_of(run), log)
    wait_for(lambda: lines_written(run) > 3, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0, log.read_text()
    done = rows(run)[-1]["step"]
    assert 4 <= done < STEPS
    assert f"stopped at step {done} and saved" in log.read_text()
    assert (run / "checkpoints" / f"step_{done:07d}" / "COMPLETE").exists()
    assert not (run / "summary.json").exists()
    process = start(["train", "--resume", "--out", str(run)], log)  # as the message says
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert_equal_to_the_bit(run, uninterrupted)


def test_the_command_itself_stops_on_sigterm_and_says_so_in_json(args_of: Args, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal", *args_of(tmp_path / "run", "--steps", "100000", "--json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while lines_written(tmp_path / "run") < 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == {"step": rows(tmp_path / "run")[-1]["step"]}
    assert "Traceback" not in err
