"""`shoal bench engine` and `shoal bench quantization`: what they print and refuse; their speed is no test's business."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench import contestants, engine
from shoal.bench.machine import Memory
from shoal.bench.quantization import cut
from shoal.bench.sides import Side
from shoal.cli import main
from shoal.config import BenchEngineCommand, ModelConfig, UserError
from shoal.formats.huggingface import read_config


class Stub:
    """A side that needs `seconds` for everything."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.settings = name, seconds, "as it is"
        self.loaded = {"load_seconds": 1.0, "weight_bytes_per_token": 1e9, "cache_bytes_per_position": 1e6}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append((op, arguments))
        if op == "decode_and_read":  # on a machine whose speed halves with every step
            steps = len(arguments["ids"])
            return {"seconds": [self.seconds * 2**i for i in range(steps)], "bandwidth": [2e10 / 2**i for i in range(steps + 1)]}
        return {"seconds": [self.seconds] * len(arguments["ids"]) if op == "decode" else [self.seconds]}

    def memory(self) -> Memory:
        return Memory(int(self.seconds * 1e9), 0, 0)

    def close(self) -> None:
        self.asked.append(("close", {}))


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[Stub]:
    """Three sides of known speed instead of processes, on a machine that reads 20 GB/s."""
    sides = [Stub("shoal", 0.1), Stub("llama.cpp", 0.2), Stub("transformers", 0.5)]
    contest = contestants.Contest("v2-lite", ModelConfig(max_position_embeddings=1 << 15), Path(), None, None, None, None)
    monkeypatch.setattr(contestants.Contest, "sides", lambda self, command: sides)
    monkeypatch.setattr(engine, "prepare", lambda command, say: contest)
    monkeypatch.setattr(engine, "read_bandwidth", lambda: 2e10)
    monkeypatch.setattr(engine, "product_peaks", lambda: {"fp32": 1e11, "int8": 4e11})
    return sides


def test_ratios_and_shares(stubs: list[Stub], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--vs", "llama.cpp", "--rounds", "2", "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert "decode, context 512" in printed
    for case in ("decode", "decode_32", "prefill", "batch", "long_context"):
        assert result[f"{case}_ratio"] == pytest.approx(2)
        assert result[f"transformers_{case}_ratio"] == pytest.approx(5)
    assert result["memory_ratio"] == pytest.approx(0.5)
    assert result["decode_tokens_per_second"] == pytest.approx(10)
    assert result["batch_tokens_per_second"] == pytest.approx(80)
    assert result["llama_prefill_tokens_per_second"] == pytest.approx(2560)
    assert result["bandwidth_share"] == pytest.approx(10 * (1e9 + 512e6) / 1.5e10)  # of the mean before and after, whatever it is then
    assert result["bits"] == 4
    # every turn asks the sides one after the other, the same of each
    assert [asked for asked in stubs[0].asked if asked[0] != "decode_and_read"] == stubs[1].asked
    assert [op for op, _ in stubs[1].asked] == ["decode", "decode", "prefill", "decode", "decode"] * 2 + ["close"]


def test_cases_that_the_model_is_too_short_for_are_left_out() -> None:
    command = BenchEngineCommand()
    names = {context: [m.name for m in engine.measurements(command, context)] for context in (20, 100, 600, 20000)}
    assert names[20] == []
    assert names[100] == ["decode_32"]
    assert names[600] == ["decode_32", "decode", "prefill", "batch"]
    assert names[20000] == ["decode_32", "decode", "prefill", "batch", "long_context"]
    assert [m.name for m in engine.measurements(BenchEngineCommand(cases=("batch",)), 20000)] == ["batch"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "8"], "made in 4 bits"),
        (["--vs", "transformers"], "32 GB"),
        (["--rounds", "0"], "--rounds"),
        (["--steps", "0"], "--steps"),
        (["--threads", "-1"], "--threads"),
        (["--vs", "vllm"], "vllm"),
        (["--model", "nowhere"], "does not exist"),
        (["--cases"], "--cases"),
    ],
)
def test_wrong_options_end_with_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_too_little_disk_is_noticed_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="use --cache-dir"):
        contestants.prepare(BenchEngineCommand(cache_dir=str(tmp_path)), print)
    assert not list(tmp_path.iterdir())


def test_a_trained_model_in_its_own_process(trained: Path, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(trained), "--rounds", "1", "--steps", "2", "--threads", "1", "--cache-dir", str(tmp_path)]
    args += ["--cases", "decode", "mtp", "--bits", "8", "--cache", "fp8"]
    assert main(["bench", "engine", *args, "--data", str(workshop / "text.txt")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["decode_32_tokens_per_second"] > 0
    assert result["cache_values_per_token_and_layer"] == 16 + 8
    assert "int8" in result["settings"]["shoal"]
    assert "cache in fp8" in result["settings"]["shoal"]
    assert result["mtp_same_text"]
    assert result["mtp_speedup"] > 0
    assert 0 <= result["mtp_acceptance"] <= 1


def test_peers_run_the_same_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    args = ["--model", str(trained), "--rounds", "1", "--steps", "2", "--threads", "1", "--cache-dir", str(tmp_path)]
    assert main(["bench", "engine", *args, "--cases", "decode", "--vs", "llama.cpp", "--vs", "transformers"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["decode_32_ratio"] > 0
    assert result["transformers_decode_32_ratio"] > 0
    side = Side("llama.cpp", "llama_worker")
    side.ask("load", model=str(tmp_path / "model.gguf"), threads=1, flash=1)
    prefix = list(range(16, 32))
    for context, sequences in ((40, 1), (16, 3)):  # a cache made of another's, over and over again; copied to other sequences
        reply = side.ask("decode", prefix=prefix, context=context, ids=[[5] * sequences] * 4, warm=1)
        assert len(reply["seconds"]) == 4
    side.close()


@pytest.fixture
def side() -> Iterator[Side]:
    opened = Side("shoal", "shoal_worker")
    yield opened
    opened.close()


def test_errors_of_a_side_are_told_and_it_stands_still_between_requests(side: Side, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shoal: UserError"):
        side.ask("load", model=str(tmp_path), threads=1, bits=None, group=32, precision="bf16", cache="auto")
    state = Path(f"/proc/{side._process.pid}/stat")
    deadline = time.monotonic() + 10  # a signal arrives when the system finds the time
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(side._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="killed"):
        side.ask("prefill", ids=[1])


def test_a_python_that_is_not_there() -> None:
    with pytest.raises(UserError, match="cannot be started"):
        Side("llama.cpp", "llama_worker", "/no/python")


@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.integers(2, 12))
def test_windows_score_every_token_once(lengths: list[int], window: int) -> None:
    documents = [([100 * i + k for k in range(length)], length) for i, length in enumerate(lengths)]
    sample = cut(documents, window)
    scored = [token for ids in sample.windows for token in ids[1:]]
    assert sorted(scored) == [token for ids, _ in documents for token in ids[1:]]
    assert max(map(len, sample.windows)) <= window
    assert sample.tokens == len(scored)


@pytest.mark.parametrize("folders", [("a/int4", "b/int4"), ("int8", "int8"), ("4 bits",)])
def test_rows_of_the_same_name_are_refused(folders: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quantization", "nowhere", "--data", "nothing", "--quantized", *folders]) == 2
    assert "would be called" in capsys.readouterr().err


@pytest.fixture
def empty_python(tmp_path: Path) -> str:
    """A Python without peers."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'llama_cpp'\" >&2\nexit 1\n")
    python.chmod(0o755)
    return str(python)


def test_a_missing_peer_is_noticed_before_anything_is_measured(
    trained: Path, workshop: Path, empty_python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shoal.bench.quantization._shoal", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr("shoal.bench.serve._measure_shoal", lambda *args: pytest.fail("measured"))
    for name, options in (("quantization", ["--data", str(workshop / "text.txt")]), ("serve", ["--vs", "llama.cpp"])):
        assert main(["bench", name, str(trained), *options, "--llama-python", empty_python]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--llama-python" in error
    monkeypatch.setattr("shoal.bench.memory._run", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(sys, "executable", empty_python)
    assert main(["bench", "memory", "--vs", "transformers"]) == 2
    assert "transformers cannot be imported" in capsys.readouterr().err


def test_models_of_other_shapes_have_folders_of_their_own(tmp_path: Path) -> None:
    shape = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=1, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, n_routed_experts=None,
    )  # fmt: skip
    for layers in (1, 2, 1):
        contest = contestants._small("demo", replace(shape, num_hidden_layers=layers), BenchEngineCommand(), tmp_path)
        assert read_config(contest.model).num_hidden_layers == layers
    assert len(list(tmp_path.iterdir())) == 2


def test_rollouts_of_what_transformers_does_not_have_are_refused(
    train_args: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_args(tmp_path / "run", "--steps", "1", "--model.qk-norm")) == 0
    capsys.readouterr()
    assert main(["bench", "rollouts", str(tmp_path / "run"), "--vs", "transformers", "--prompt-tokens", "4", "--tokens", "4"]) == 2
    assert "model.qk_norm is on" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_rollouts_of_both_sides_have_weights_of_one_type(
    trained: Path, precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    load, peers = transformers.AutoModelForCausalLM.from_pretrained, []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: peers.append(load(*args, **options)) or peers[-1]
    )
    small = ["--prompts", "2", "--group", "2", "--prompt-tokens", "4", "--tokens", "4", "--rounds", "1", "--threads", "1"]
    assert main(["bench", "rollouts", str(trained), "--vs", "transformers", "--precision", precision, *small]) == 0
    [peer] = peers
    assert {parameter.dtype for parameter in peer.parameters() if parameter.ndim > 1} == {dtype}


def test_quantization_beside_llama_cpp(trained: Path, workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    args = ["--data", str(workshop / "text.txt"), "--max-tokens", "600", "--threads", "1"]
    assert main(["bench", "quantization", str(trained), *args]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    bpb = result["bpb"]
    assert bpb["shoal"] == pytest.approx(bpb["llama.cpp, f32"], abs=2e-4)
    assert bpb["llama.cpp, f16"] == pytest.approx(bpb["llama.cpp, f32"], abs=2e-3)
    assert abs(result["increase"]["shoal, 8 bits"]) < 0.05
    assert set(result["increase"]) == set(bpb)
    assert statistics.mean(bpb.values()) < 8
