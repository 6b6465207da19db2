"""The report: reading metrics, the pictures that come out, the page that holds them."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.train.history import read_metrics
from shoal.train.plots import _frame, smooth
from shoal.train.report import write_report
from shoal.train.units import duration, si, spelled

MOE_PLOTS = {"max_vio", "routing_entropy", "expert_load", "expert_load_final"}
DENSE_PLOTS = {"loss_tokens", "loss_flops", "learning_rate", "throughput", "gradient_norm"}


def step_row(step: int, layers: int = 0, experts: int = 4, **more: Any) -> dict[str, Any]:
    loss = 2 + 7 / step
    row = {"step": step, "tokens": 512 * step, "flops": 1e9 * step, "seconds": 0.5 * step, "loss": loss, "bpb": loss / 2.4, "lr": 0.5}
    row |= {"grad_norm": 0.4, "tokens_per_second": 1024.0, "tflops": 0.2, "peak_share": 0.6, "skipped": 0}
    if layers:
        load = [[(1 + expert) / sum(range(1, experts + 1)) for expert in range(experts)]] * layers
        row |= {"max_vio": 0.6, "max_vio_layers": [0.6] * layers, "entropy_layers": [0.9] * layers, "expert_load": load}
    return row | more


def evaluation_row(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 512 * step, "flops": 1e9 * step, "seconds": 0.5 * step, "val_bpb": 1.25, "val_loss": 3.0}


def write_run(run: Path, rows: list[dict[str, Any]], summary: dict[str, Any] | None = None, config: str | None = None) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (run / "config.toml").write_text(config)
    return run


def plots_of(run: Path) -> set[str]:
    return {path.stem for path in (run / "report").glob("*.png")}


def test_a_moe_run_gets_every_picture_and_a_page_without_outside_resources(tmp_path: Path) -> None:
    rows = [step_row(step, layers=2, mtp_loss=4.0) for step in range(1, 41)] + [evaluation_row(40)]
    samples = [{"prompt": "if a < b:", "text": " return <script>x</script>"}]
    summary = {"val_bpb": 1.25, "xz_bpb": 2.0, "train_flops": 4e10, "tokens": 20480, "seconds": 20.0, "samples": samples}
    run = write_run(tmp_path / "run", rows, summary, '[model]\nn_routed_experts = 4\nhidden_size = 123\n[corpus]\ntext_column = "<&>"\n')
    page = write_report(run)

    assert page == run / "report.html"
    assert plots_of(run) == DENSE_PLOTS | MOE_PLOTS
    html = page.read_text()
    sources = re.findall(r'src="([^"]+)"', html)
    assert len(sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<link|<script|@import|url\(", html)
    assert "if a &lt; b:" in html
    assert "&lt;script&gt;" in html
    assert "hidden_size = 123" in html
    assert "38% below xz" in html
    assert "width: 62.5%" in html  # the bar of 1.25 beside one of 2.0


def test_a_dense_run_leaves_the_pictures_of_experts_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step_row(step) for step in range(1, 4)], {"val_bpb": None, "xz_bpb": None, "max_vio": None})
    html = write_report(run).read_text()
    assert plots_of(run) == DENSE_PLOTS
    assert "MaxVio" not in html
    assert "held-out" not in html


@pytest.mark.parametrize("layers", [0, 1, 7])
def test_one_step_without_evaluation_or_summary_is_enough(tmp_path: Path, layers: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = write_report(write_run(tmp_path / "run", [step_row(1, layers=layers)])).read_text()
    assert "512" in html


@pytest.mark.parametrize("evaluated", [{2: 5.8}, {1: 30.0, 2: 5.96}], ids=["the only one", "the first one"])
def test_an_evaluation_far_from_the_curve_leaves_the_picture_its_layout(tmp_path: Path, evaluated: dict[int, float]) -> None:
    rows = [step_row(1, loss=5.97, bpb=2.5), step_row(2, loss=5.96, bpb=2.5)]
    rows += [evaluation_row(step) | {"val_loss": loss} for step, loss in evaluated.items()]
    run = write_run(tmp_path / "run", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(run)
    floor, ceiling = _frame(read_metrics(run / "metrics.jsonl"))
    assert floor < evaluated[2] < ceiling


def test_not_finite_and_missing_figures_are_left_out(tmp_path: Path) -> None:
    rows = [step_row(step, loss=math.nan if step % 2 else 3.0, peak_share=None, skipped=step // 2) for step in range(1, 30)]
    run = write_run(tmp_path / "run", [*rows, {"step": 30, "loss": None, "tokens": 512 * 30}, {"step": 30, "val_bpb": None}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(run)
    assert plots_of(run) == DENSE_PLOTS


def test_a_run_without_steps_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no training step yet"):
        write_report(write_run(tmp_path / "run", []))


def test_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [step_row(1)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape("pip install 'shoal[report]'")):
        write_report(run)


def test_layers_have_the_numbers_of_the_model(tmp_path: Path) -> None:
    from shoal.train.report import _layer_names

    metrics = read_metrics(write_run(tmp_path / "run", [step_row(1, layers=3)]) / "metrics.jsonl")
    config = "[model]\nnum_hidden_layers = {}\nfirst_k_dense_replace = 2\nnum_nextn_predict_layers = 1\n"
    assert _layer_names(config.format(4), metrics) == ["layer 2", "layer 3", "MTP 1"]
    assert _layer_names(config.format(5), metrics) == ["layer 2", "layer 3", "layer 4"]
    for other in ("", "model = [", "[model]\nunknown = 1\n", config.format(2)):  # absent, broken, or of another run
        assert len(_layer_names(other, metrics)) == 3


# Metrics


def test_half_a_line_is_skipped_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    first = [step_row(1), step_row(2), evaluation_row(2), step_row(3), step_row(4), evaluation_row(4)]
    text = "\n".join(json.dumps(row) for row in first) + '\n{"step": 5, "lo\n'
    text += "\n".join(json.dumps(row) for row in [step_row(3, loss=9.0), step_row(4)]) + '\n{"step": 5'
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.column("step").tolist() == [1, 2, 3, 4]
    assert metrics.column("loss")[2] == 9.0
    assert [row["step"] for row in metrics.evaluations] == [2]


def test_columns_are_nan_where_a_row_lacks_them(tmp_path: Path) -> None:
    rows = [step_row(1), step_row(2, layers=2), step_row(3, mtp_loss=5.0)]
    metrics = read_metrics(write_run(tmp_path / "run", rows) / "metrics.jsonl")
    assert np.isnan(metrics.column("mtp_loss")).tolist() == [True, True, False]
    tokens, load = metrics.layers("expert_load")
    assert tokens.tolist() == [1024]
    assert load.shape == (1, 2, 4)
    assert metrics.layers("absent")[0].shape == (0,)


# Numbers and lines


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.booleans())
def test_smoothing_stays_within_the_data_and_in_order(values: list[float], log: bool) -> None:
    x = np.arange(1, len(values) + 1, dtype=np.float64)
    at, smoothed = smooth(x, np.array(values), log)
    assert len(at) == len(smoothed) >= 1
    assert np.all(np.diff(at) > 0)
    margin = 1e-9 * (1 + max(abs(value) for value in values))
    assert min(values) - margin <= smoothed.min()
    assert smoothed.max() <= max(values) + margin


def test_smoothing_takes_the_noise_away() -> None:
    x = np.arange(1, 2001, dtype=np.float64)
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(x, noise)[1].std() < 0.3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.5, "0.5"),
        (6.61e13, "66.1 T"),
        (999.9, "1 k"),
        (999_600, "1 M"),
        (8192, "8.19 k"),
        (2.5e27, "2500 Y"),
        (math.nan, "–"),
    ],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text
    assert si(1e12, "FLOP") == "1 TFLOP"


def test_durations() -> None:
    assert [duration(s) for s in (7, 754, 3723, 273900, math.inf)] == ["0:07", "12:34", "1:02:03", "3 d 04:05 h", "–"]
    assert [spelled(s) for s in (42, 300, 11520, 700000)] == ["42 seconds", "5.0 minutes", "3.2 hours", "8.1 days"]


def test_layers_that_begin_late_are_drawn_from_where_they_begin(tmp_path: Path) -> None:
    rows = [step_row(step, layers=1) for step in range(1, 31)] + [step_row(step, layers=2, mtp_loss=4.0) for step in range(31, 41)]
    metrics = read_metrics(write_run(tmp_path / "run", rows) / "metrics.jsonl")
    _, load = metrics.layers("expert_load")
    assert load.shape == (40, 2, 4)
    assert np.isnan(load[:30, 1]).all()
    assert np.isfinite(load[30:]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_report(tmp_path / "run").exists()
