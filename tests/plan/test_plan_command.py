"""The command: figures, files, sources, machines, comparison with measurements."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.config import ModelConfig, UserError
from shoal.config.huggingface import model_config_to_dict
from shoal.plan import check
from shoal.plan.assumptions import Assumptions
from shoal.plan.command import PlanCommand, run
from shoal.plan.hardware import MACHINES, Machine
from shoal.plan.models import BUILT_IN
from shoal.plan.serving import decode_seconds, plan_serving, touched_by_format, why_not
from shoal.plan.sources import load_model
from shoal.plan.sustained import Curve, Sustained

V3, LITE, A = BUILT_IN["deepseek-v3"], BUILT_IN["deepseek-v2-lite"], Assumptions()
HERE = Machine(
    name="box", memory_gib=24, bandwidth_gb_s=25, fp32_tflops=0.36, bf16_tflops=0.06, int8_tops=1.4, devices_per_node=1, measured=True
)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_built_in_model_has_the_promised_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(PlanCommand(model=name))
    keys = {"params_total", "params_active", "params_mtp", "kv_bytes_per_token", "train_flops_per_token"}
    assert keys <= figures.keys()
    assert figures["train_flops_per_token"] <= figures["train_flops_per_token_with_mtp"]
    json.dumps(figures)
    assert "Parameters" in capsys.readouterr().out


def test_a_small_model_has_figures_that_say_something(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(PlanCommand(model=str(trained)))
    table = capsys.readouterr().out.split("FLOPs per token")[1].split("Bytes")[0]
    assert re.search(r"main model +182\.30K +60\.77K", table)
    assert "0.000" not in table


def test_qwen_prints_what_shapes_give_beside_the_published_figure(capsys: pytest.CaptureFixture[str]) -> None:
    run(PlanCommand(model="qwen2.5-72b"))
    shown = capsys.readouterr().out
    assert "394.00B" in shown
    assert "444.86B" in shown


def test_published_v3_plan_prints_every_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(PlanCommand(model="deepseek-v3", published=True))
    shown = capsys.readouterr().out
    for name, _, _ in A.rows():
        assert name in shown
    assert figures["training"]["device_hours"] == pytest.approx(180e3, rel=0.15)
    slower = run(PlanCommand(model="deepseek-v3", published=True, assume=replace(A, fp8_efficiency=0.2), inter_node_gb_s=10.0))
    assert slower["training"]["device_hours"] > 1.3 * figures["training"]["device_hours"]
    assert slower["machine"]["inter_node_gb_s"] == 10


def test_models_come_from_config_files_folders_and_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_dict(LITE)))
    for source in (tmp_path, tmp_path / "config.json"):
        assert run(PlanCommand(model=str(source)))["params_total"] == 15_706_484_224
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("minutes = 1\n[model]\nvocab_size = 512\n")
    assert load_model(str(folder)) == ModelConfig(vocab_size=512)
    for step in (7, 12):
        (checkpoint := folder / "checkpoints" / f"step_{step:07}").mkdir(parents=True)
        counted = ModelConfig(model_type="llama", n_routed_experts=0, count_order=2, count_entries=step)
        (checkpoint / "config.json").write_text(json.dumps(model_config_to_dict(counted)))
    assert load_model(str(folder)).count_entries == 12, "what the last checkpoint holds"


def test_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    timeline, chart, text = (str(tmp_path / name) for name in ("timeline.png", "chart.svg", "plan.md"))
    run(
        PlanCommand(
            model="deepseek-v2-lite", machine="h800", devices=8, pipeline=4, schedule="zbv", timeline=timeline, chart=chart, markdown=text
        )
    )
    assert Path(timeline).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path(chart).read_text()
    assert "| total (main model) | 15.71B | 15,706,484,224 |" in Path(text).read_text()
    capsys.readouterr()
    run(PlanCommand(model="deepseek-v2-lite", markdown="-"))
    assert capsys.readouterr().out.startswith("### Parameters")


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (PlanCommand(), "deepseek-v3"),
        (PlanCommand(model="gpt-2"), "no model 'gpt-2'"),
        (PlanCommand(model="deepseek-v3", train=True), "--machine"),
        (PlanCommand(model="deepseek-v3", machine="h800", devices=8, nodes=1, train=True), "contradict"),
        (PlanCommand(model="llama-3.1-8b", published=True), "deepseek-v3"),
        (PlanCommand(model="deepseek-v3", published=True, expert=48), "Nearest plan that works"),
        (PlanCommand(model="deepseek-v3", machine="h200", serve=True, devices=2), "int4 weights on 4 device"),
        (PlanCommand(model="deepseek-v3", check=True), "--here"),
        (PlanCommand(model="llama-3.1-8b", sequence_length=131_073), "--sequence-length is 131073: the model sees 131072"),
        (PlanCommand(model="llama-3.1-8b", machine="h100", serve=True, context=10**6), "--context is 1000000: the model sees 131072"),
        (PlanCommand(model="deepseek-v3", machine="h800", devices=0), "--devices is 0"),
        (PlanCommand(model="deepseek-v3", published=True, micro_batch=-1), "--micro-batch is -1"),
        (PlanCommand(model="deepseek-v3", published=True, tokens=float("nan")), "--tokens is nan"),
        (PlanCommand(model="deepseek-v3", published=True, inter_node_gb_s=float("nan")), "--inter-node-gb-s is nan"),
        (PlanCommand(model="deepseek-v3", published=True, assume=replace(A, fp8_efficiency=0.0)), "--assume.fp8-efficiency is 0"),
        (PlanCommand(model="deepseek-v3", published=True, timeline="x.xyz"), "must end in one of .png"),
    ],
)
def test_bad_requests_say_what_to_do(command: PlanCommand, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        run(command)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "machine").write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(UserError, match="not readable JSON"):
        run(PlanCommand(model=str(tmp_path / "deep.json")))
    with pytest.raises(UserError, match="not valid TOML"):
        run(PlanCommand(model="deepseek-v3", machine=str(tmp_path / "machine")))


def test_a_model_that_sees_little_is_planned_for_what_it_sees(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_dict(replace(LITE, max_position_embeddings=2048))))
    figures = run(PlanCommand(model=str(tmp_path), machine="h100", serve=True))
    assert (figures["sequence_length"], figures["serving"][0]["context"]) == (2048, 2048)


@pytest.mark.parametrize(
    "given",
    [{"pipeline": 4, "schedule": "interleaved"}, {"micro_batch": 8, "recompute": "full"}, {"zero": 0, "pipeline": 4}, {"expert": 2}],
)
def test_a_search_keeps_what_was_given(given: dict[str, Any]) -> None:
    found = run(PlanCommand(model="deepseek-v2-lite", machine="h200", devices=8, search=True, **given))
    assert given.items() <= found["training"]["layout"].items()


def test_a_search_that_cannot_keep_what_was_given_says_so() -> None:
    with pytest.raises(UserError, match="PP 3 does not divide 8 devices"):
        run(PlanCommand(model="llama-3.1-8b", machine="h200", devices=8, search=True, pipeline=3))
    with pytest.raises(UserError, match=r"does not fit: .* Nearest plan that works"):
        run(PlanCommand(model="llama-3.1-8b", machine="h100", devices=8, search=True, zero=0, pipeline=1))


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal import runtime

    machine, limit = runtime.total_memory(runtime.choose_device("cpu")), 4 << 20
    for name, content in (("memory.max", limit), ("memory.current", 1 << 20), ("memory.stat", "inactive_file 0\nactive_file 0")):
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(runtime, "CONTROL_GROUP", tmp_path)
    assert runtime.total_memory(runtime.choose_device("cpu")) == limit < machine
    assert runtime.available_memory(runtime.choose_device("cpu")) == 3 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert runtime.available_memory(runtime.choose_device("cpu")) > limit


def test_a_named_machine_that_cannot_train_still_gets_its_serving_plan() -> None:
    figures = run(PlanCommand(model="deepseek-v2-lite", machine="rtx4090"))
    assert "Nearest plan that works" in figures["training"]["impossible"]
    fitting = {plan["weights"]: plan["fits"] for plan in figures["serving"]}
    assert fitting == {"bf16": False, "fp8": True, "int8": True, "int4": True}


def touched_bytes(model: ModelConfig, weights: str, tokens: int) -> float:
    return sum(touched_by_format(model, weights, tokens).values())


def test_serving_speed_is_the_roofline() -> None:
    machine = MACHINES["h100"]
    one = plan_serving(LITE, machine, "bf16", batch=1, context=1000)
    read = touched_bytes(LITE, "bf16", 1) + 1000 * 31104
    assert one.decode_tokens_per_second == pytest.approx(3350e9 * 0.8 / read)
    assert touched_bytes(LITE, "bf16", 1) == pytest.approx(2 * 2.45e9, rel=0.01)  # the active parameters
    many = plan_serving(LITE, machine, "bf16", batch=64, context=1000)
    assert one.decode_tokens_per_second < many.decode_tokens_per_second < 64 * one.decode_tokens_per_second
    assert touched_bytes(LITE, "bf16", 10**6) < 2 * 15.7e9


def test_serving_memory_decides_how_many_sequences_fit() -> None:
    plan = plan_serving(LITE, MACHINES["h100"], "bf16", context=8192)
    used = plan.weight_bytes + plan.sequences * 8192 * 31104
    usable = 80 * 1024**3 * 0.92
    assert used <= usable < used + 8192 * 31104
    assert plan_serving(LITE, MACHINES["h100"], "bf16", context=8192, cache="fp8").sequences >= 2 * plan.sequences
    reason = why_not(plan_serving(V3, MACHINES["h200"], "bf16", 8), V3, MACHINES["h200"], "bf16", A)
    assert reason is not None
    assert "fp8 weights on 8 device" in reason


def test_mtp_pays_by_its_acceptance() -> None:
    kept = plan_serving(V3, MACHINES["h200"], "fp8", 8, batch=1, assumptions=replace(A, mtp_acceptance=0.9))
    lost = plan_serving(V3, MACHINES["h200"], "fp8", 8, batch=1, assumptions=replace(A, mtp_acceptance=0.0))
    assert kept.decode_with_mtp is not None
    assert lost.decode_with_mtp is not None
    assert lost.decode_with_mtp < lost.decode_tokens_per_second
    assert kept.decode_with_mtp == pytest.approx(1.9 * lost.decode_with_mtp)


def test_predictions_for_one_machine() -> None:
    small = check.predict_training(ModelConfig(), HERE, batch=16, sequence_length=512)
    large = check.predict_training(ModelConfig(hidden_size=768, num_attention_heads=12, moe_intermediate_size=384), HERE, 16, 512)
    assert small.tokens_per_second > large.tokens_per_second
    assert small.memory_bytes < large.memory_bytes
    micro = check.predict_training(ModelConfig(), HERE, batch=16, sequence_length=512, micro_batch=4)
    assert micro.memory_bytes < small.memory_bytes
    decode = check.predict_decode(LITE, HERE, "int4", context=1000)
    assert decode.tokens_per_second == pytest.approx(1 / decode_seconds(LITE, HERE, "int4", 1, 1000, "bf16", A))
    assert decode.tokens_per_second <= 25e9 / touched_bytes(LITE, "int4", 1)
    # a CPU's engine moves its matrices one by one: the largest, here the head in 8.5 bits, exists twice
    twice = check.predict_decode(LITE, replace(HERE, is_cpu=True), "int4", context=1000).memory_bytes - decode.memory_bytes
    assert twice == 102400 * 2048 * 8.5 / 8


def test_a_slow_small_product_slows_the_small_model_more() -> None:
    flat = Curve(((64.0, 300e9), (1024.0, 300e9)))
    known = Sustained("fp32", flat, flat, flat, flat, flat, *[1e9] * 6)
    even = replace(HERE, sustained=known)
    uneven = replace(HERE, sustained=replace(known, products=Curve(((64.0, 30e9), (1024.0, 300e9)))))
    small = ModelConfig(hidden_size=96, num_attention_heads=3, intermediate_size=256, moe_intermediate_size=96)
    large = ModelConfig(hidden_size=768, num_attention_heads=12, intermediate_size=2048, moe_intermediate_size=384)
    losses = [
        check.predict_training(model, uneven, 16, 512).tokens_per_second / check.predict_training(model, even, 16, 512).tokens_per_second
        for model in (small, large)
    ]
    assert losses[0] < losses[1] < 1


def test_check_compares_what_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shoal.plan.measure.measure_machine", lambda: HERE)
    monkeypatch.setattr("shoal.plan.measure.product_tflops", lambda: 0.2)
    predicted = check.Prediction(100.0, 2 * 2**30)
    cases = [
        check.Case("training", predicted, lambda: check.Prediction(110.0, 2**30)),
        check.Case("decoding", predicted, None, "there is no engine"),
    ]

    figures = run(PlanCommand(here=True, check=True), measurements=lambda model, machine, assumptions: cases)
    assert [(row["name"], row["figure"], row["ok"]) for row in figures["check"]] == [
        ("training", "tokens_per_second", True),
        ("training", "memory_bytes", False),
        ("decoding", "tokens_per_second", None),
        ("decoding", "memory_bytes", None),
    ]
    assert figures["check"][1]["error"] == pytest.approx(1.0)
    assert figures["fits"]["deepseek-v2-lite"]["weights"] == "int8"
    shown = " ".join(capsys.readouterr().out.split())
    assert "+100.0%" in shown
    assert "decoding was not measured: there is no engine" in shown
    assert "the machine was not quiet" in shown
    speeds = [row["tokens_per_second"] for row in figures["trains"]]
    assert speeds == sorted(speeds, reverse=True)


def test_planning_needs_no_torch() -> None:
    code = "import sys; from shoal.plan.command import PlanCommand, run; run(PlanCommand(model='deepseek-v3', published=True))"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_the_machine_is_measured() -> None:
    from shoal.plan.measure import measure_machine

    machine = measure_machine(budget=0.001)
    assert machine.measured
    assert machine.sustained is not None
    assert min(machine.sustained.norm, machine.sustained.softmax, machine.sustained.experts.at(100)) > 0
    assert min(machine.memory_gib, machine.bandwidth_gb_s, machine.fp32_tflops, machine.bf16_tflops) > 0
