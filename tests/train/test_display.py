"""The live panel and the plain lines of a run, and its TensorBoard events."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal.config import UserError
from shoal.train.display import Curve, Display
from shoal.train.tensorboard import TensorBoardLog


def step_row(step: int, **more: Any) -> dict[str, Any]:
    row = {"step": step, "tokens": 512 * step, "flops": 1e9 * step, "seconds": 0.5 * step, "loss": 2 + 7 / step, "bpb": 1.7, "lr": 0.5}
    return row | {"grad_norm": 0.4, "tokens_per_second": 7123.0, "tflops": 0.21, "peak_share": 0.61, "skipped": 0} | more


def moe_row(step: int, layers: int = 7) -> dict[str, Any]:
    return step_row(step, max_vio=0.31, max_vio_layers=[0.1 * layer for layer in range(layers)], entropy_layers=[0.9] * layers)


def drawn(display: Display, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(display.panel(width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_are_few_hold_every_figure_and_leave_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("200 steps", "a small model") as display:  # the captured stderr is no terminal
        for step in range(1, 201):
            display.step(moe_row(step), step / 200, 200.0 - step)
        display.evaluation({"step": 200, "val_bpb": 1.23456, "val_loss": 3.0})
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "training a small model for 200 steps"
    assert 20 <= len(lines) <= 24
    assert any("1.2346 bits per byte" in line for line in lines)
    last = next(line for line in lines if line.startswith("100%"))
    for figure in (
        "step 200",
        "loss 2.035",
        "1.700 bits/byte",
        "7,123 tokens/s",
        "0.21 TFLOP/s (61% of peak)",
        "200 GFLOP",
        "MaxVio 0.31",
        "ETA 0:00",
    ):
        assert figure in last


def test_plain_lines_come_by_time_when_progress_is_slow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 4))  # four seconds at each look at the clock
    monkeypatch.setattr("shoal.train.display.time.monotonic", lambda: next(now))
    with Display("a week", "a model", plain=True) as display:
        for step in range(1, 31):
            display.step(step_row(step), step * 1e-6, 1e6)
    assert 5 <= len(capsys.readouterr().err.splitlines()) <= 15


def test_what_is_told_of_a_step_comes_after_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("100 steps", "a model", plain=True) as display:
        for step in range(1, 4):
            display.step(step_row(step), 0.01 * step, 99)
        display.evaluation({"step": 3, "val_bpb": 1.25})
        display.message("stopped")
    first, last, evaluation, message = capsys.readouterr().err.splitlines()[1:]
    assert ("step 1 " in first, "step 3 " in last, message) == (True, True, "stopped")
    assert evaluation.startswith("evaluation at step 3")


def test_a_killed_run_still_shows_its_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    def train() -> None:
        with Display("100 steps", "a model", plain=True) as display:
            display.step(step_row(1), 0.01, 99)
            display.step(step_row(2), 0.02, 98)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert "step 2 " in capsys.readouterr().err.splitlines()[-1]


def test_live_output_goes_to_stderr_and_ends_with_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("10 steps", "a model", plain=False) as display:
        for step in range(1, 11):
            display.step(moe_row(step), step / 10, 10.0 - step)
        display.message("checkpoint [saved]")  # brackets are not rich's markup
        print("{}")
    out, err = capsys.readouterr()
    assert out == "{}\n"
    assert "checkpoint [saved]" in err
    assert re.search(r"step +10 ", err)


@pytest.mark.parametrize("width", [28, 40, 50, 60, 80, 120, 200])
@pytest.mark.parametrize("layers", [0, 1, 26, 61])
def test_panel_fits_the_terminal(width: int, layers: int) -> None:
    display = Display("5 minutes", "a model with a long description " * 3 + "that ends", plain=True)
    assert "first step" in drawn(display, width)
    for step in range(1, 60):
        display.step(moe_row(step, layers) if layers else step_row(step), step / 60, 60.0 - step)
    display.evaluation({"step": 59, "val_bpb": 1.234})
    text = drawn(display, width)
    lines = text.splitlines()
    assert {len(line) for line in lines} == {min(width, 120)}
    for figure in ("2.119", "1.700", "7,123", "0.21", "61%", "30.2 k", "59 G", "1.234", "50%", "0.4", "98%"):
        assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", text)
    assert ("MaxVio" in text) == (layers > 0)
    if width >= 80:
        assert len(lines) <= 17
        for figure in ("ETA 0:01", "that ends"):
            assert figure in text


def test_panel_bears_missing_and_not_finite_figures() -> None:
    display = Display("5 minutes", "a model", plain=True)
    display.step({"step": 1, "loss": math.nan, "peak_share": None}, 0.0, math.inf)
    assert "nan" in drawn(display, 80)


# The loss curve


@given(st.lists(st.floats(-1e3, 1e3), max_size=300), st.integers(1, 80), st.integers(1, 4))
def test_curve_has_the_size_asked_for_and_stacks_full_blocks(values: list[float], width: int, height: int) -> None:
    curve = Curve(limit=64)
    for value in values:
        curve.add(value)
    assert len(curve.points) < 64
    lines = curve.draw(width, height)
    assert len(lines) == height
    assert {len(line) for line in lines} == {width}
    for column in zip(*lines, strict=True):  # nothing floats: below a filled cell there are only full ones
        filled = "".join(column).lstrip(" ")
        assert set(filled[1:]) <= {"█"}


def test_curve_falls_with_the_loss() -> None:
    curve = Curve()
    for step in range(1, 5000):
        curve.add(3 + 6 / step)
    levels = [" ▁▂▃▄▅▆▇█".index(cell) for cell in curve.draw(40, 1)[0]]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == 8
    assert levels[-1] == 1


# TensorBoard


def test_tensorboard_events_hold_scalars_and_layers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path)
    log.write(moe_row(3, layers=2) | {"expert_load": [[0.5, 0.5]] * 2, "mtp_loss": None})
    log.write({"step": 3, "val_bpb": 1.25})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/max_vio", "max_vio_layers/00", "max_vio_layers/01", "evaluation/val_bpb"} <= tags
    assert not any("expert_load" in tag or "mtp" in tag for tag in tags)
    assert events.Scalars("evaluation/val_bpb")[0].step == 3
    assert events.Scalars("evaluation/val_bpb")[0].value == 1.25


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=re.escape("pip install 'shoal[report]'")):
        TensorBoardLog(tmp_path)
