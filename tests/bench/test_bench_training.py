"""`shoal bench fp8` and `shoal bench memory`: what they make of the runs that they start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench import fp8, memory
from shoal.bench import train as bench_train
from shoal.bench.memory import Row
from shoal.bench.train import SHAPE, Transformers
from shoal.cli import finish
from shoal.config import BenchFP8Command, BenchMemoryCommand, BenchTrainCommand, OptimizerConfig, TrainConfig, UserError
from shoal.runtime import Machine


def test_a_loss_that_was_not_finite_is_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_apart(module: str, verb: str, settings: str, failed: str) -> str:
        run = Path(settings).parent / "run"
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n{"step": 2, "val_loss": 3.0}\n')
        return ""

    monkeypatch.setattr(fp8, "run_apart", run_apart)
    losses = fp8.train(TrainConfig())
    assert losses[0] == 3.0
    assert math.isnan(losses[1])
    assert fp8.smoothed(losses) == math.inf

    finish(fp8.compare({"bf16": [[3.0], losses], "fp8": [losses, [3.0]]}), True)
    result = json.loads(capsys.readouterr().out)
    assert result["final_loss"] == {"bf16": [3.0, None], "fp8": [None, 3.0]}
    assert result["relative_difference"] == {"fp8": [None, None]}


@pytest.mark.parametrize(("picture", "message"), [("nowhere/fp8.png", "there is no folder"), ("fp8.txt", "end in .png or .svg")])
def test_a_picture_that_cannot_be_written_is_refused_first(
    picture: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fp8, "product_errors", lambda: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        fp8.run_bench(BenchFP8Command(data=("text",), picture=str(tmp_path / picture)))


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.1, 100)), min_size=13, max_size=16))
def test_the_peer_is_compared_as_it_is_used_and_at_its_leanest(measured: list[tuple[int, float]]) -> None:
    rows = [Row(str(i), *figures) for i, figures in enumerate(measured)]
    ours, theirs = rows[:-12], rows[-12:]
    result = memory.summarize(ours, theirs)
    assert result["lean_seconds"] <= memory.SLOWDOWN * min(row.seconds for row in ours)
    assert result["memory_ratio"] == min(row.peak for row in theirs[:4]) / result["lean_peak"]
    assert result["ratio_to_leanest"] == min(result["ratios"].values()) <= result["memory_ratio"]
    leanest = next(row for row in theirs if row.name == result["leanest_peer"])
    assert (leanest.peak, leanest.seconds) == (min(row.peak for row in theirs), result["leanest_peer_seconds"])


def test_the_peer_has_shoals_micro_batches_and_checkpointing() -> None:
    rows = list(memory.peers(BenchMemoryCommand(batch_size=16)).items())
    assert len(rows) == 12
    assert all(options["micro_batch"] == 16 and not options["checkpointing"] for _, options in rows[:4])
    assert all(options["micro_batch"] == 2 and "micro-batches of 2" in name for name, options in rows[4:])
    assert all(options["checkpointing"] and "checkpointing" in name for name, options in rows[8:])
    assert memory.settings(BenchMemoryCommand(batch_size=16))["+ micro-batches of 2"].micro_batch == 2


def test_the_peers_gradients_are_those_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("shoal.bench.train.SHAPE", tiny())
    rows = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(0))
    found: list[tuple[float, list[torch.Tensor]]] = []
    for measures in ({}, {"micro_batch": 1}, {"micro_batch": 3, "checkpointing": True}):
        torch.manual_seed(0)
        peer = Transformers("fp32", "eager", **measures)  # type: ignore[arg-type]
        monkeypatch.setattr(peer.adam, "zero_grad", lambda set_to_none: None)
        loss = peer.step(rows)
        found.append((loss, [parameter.grad for parameter in peer.model.parameters() if parameter.grad is not None]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def tiny() -> Any:
    from dataclasses import replace

    return replace(
        SHAPE, vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip


def test_shoal_is_compared_with_the_fastest_form_of_the_peer() -> None:
    machine = Machine(torch.device("cpu"), "fp32", 1, 1e12, "")
    peers = [SimpleNamespace(precision=precision) for precision in ("bf16", "bf16", "fp32", "fp32")]
    contestants: Any = [None, None, *peers]
    command = BenchTrainCommand(batch_size=4, sequence_length=32)
    result = bench_train._result(contestants, [1200.0, 600.0, 100.0, 200.0, 400.0, 300.0], machine, command)
    assert result["peak_share"] == pytest.approx(1200 / 128 * bench_train.step_flops(command, OptimizerConfig()) / 1e12)
    del result["peak_share"]
    assert result == {
        "shoal_tokens_per_second": 1200, "shoal_adamw_tokens_per_second": 600, "precision": "fp32", "peak_flops": 1e12,
        "transformers_bf16_tokens_per_second": 200, "transformers_fp32_tokens_per_second": 400, "transformers_tokens_per_second": 400,
        "ratio": 6, "ratio_adamw": 3, "ratio_fastest": 3, "ratio_fastest_adamw": 1.5,
    }  # fmt: skip
    assert "ratio" not in bench_train._result(contestants[:2], [1200.0, 600.0], machine, command)
