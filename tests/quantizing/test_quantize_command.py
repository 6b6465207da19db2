"""`shoal quantize`: what it writes, what it reports, and that calibration pays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.cli import main
from shoal.config import ModelConfig
from shoal.engine.weights import quantized_scheme
from shoal.formats.huggingface import load_model, open_model, save_model
from shoal.formats.locate import locate_model
from shoal.formats.packing import pack_files
from shoal.formats.parts import parts_of
from shoal.formats.quantized import dequantized, open_quantized
from shoal.kernels.packed import PackedMatrix
from shoal.model import Transformer, init_weights
from shoal.quantizing.calibrate import Calibration


@pytest.fixture
def quantize(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*more: str) -> dict[str, Any]:
        assert main(["quantize", str(trained), str(tmp_path / "q"), "--threads", "1", "--json", *more]) == 0, capsys.readouterr().err
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    return run


@pytest.mark.parametrize("more", [[], ["--bits", "8"], ["--group", "64"]])
def test_plain_rounding(quantize: Any, tmp_path: Path, workshop: Path, more: list[str]) -> None:
    result = quantize("--data", str(workshop / "text.txt"), *more)
    opened = open_quantized(tmp_path / "q")
    assert opened.scheme.matrices == ("int8" if "8" in more else "int4")
    assert opened.scheme.group == (64 if "64" in more else 32)
    packed = {name: part for name, part in opened.parts.items() if isinstance(part, PackedMatrix)}
    assert {matrix["name"] for matrix in result["matrices"]} == packed.keys()
    assert all(matrix["nbytes"] == packed[matrix["name"]].nbytes for matrix in result["matrices"])
    assert 0 < result["weight_error"] < (1e-4 if "8" in more else 0.02)
    assert result["bpb_after"] == pytest.approx(result["bpb_before"], abs=0.05)
    assert result["bpb_increase"] == result["bpb_after"] - result["bpb_before"]
    assert result["calibration_tokens"] == 0


def test_eval_of_a_quantized_folder_gives_the_figure_of_the_report(
    quantize: Any, tmp_path: Path, workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(workshop / "text.txt")]
    result = quantize(*data)
    assert main(["eval", str(tmp_path / "q"), *data, "--threads", "1", "--precision", "fp32", "--device", "cpu", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["bpb"] == pytest.approx(result["bpb_after"], rel=1e-6)
    assert scored["window"] == 32, "that of the run"
    assert main(["generate", str(tmp_path / "q"), "the red", "--max-tokens", "4", "--ignore-eos", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 4


@pytest.mark.parametrize("written", ["now", "by earlier versions"])
def test_every_verb_opens_a_quantized_folder(
    quantize: Any, tmp_path: Path, workshop: Path, capsys: pytest.CaptureFixture[str], written: str
) -> None:
    quantize()
    q, file, chat = str(tmp_path / "q"), tmp_path / "q" / "config.json", tmp_path / "chat.jsonl"
    config = json.loads(file.read_text())
    assert (config["model_type"], config.pop("base_model_type"), "architectures" in config) == ("shoal", "deepseek_v3", False)
    if written != "now":
        file.write_text(json.dumps({**config, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}))
    turns = [{"role": "user", "content": "red fish?"}, {"role": "assistant", "content": "over the reef"}]
    chat.write_text(10 * (json.dumps({"messages": turns}) + "\n"))
    machine = ["--device", "cpu", "--threads", "1", "--precision", "fp32"]
    for verb, *args in (
        ["generate", q, "the red", "--max-tokens", "4", *machine],
        ["eval", q, "--data", str(workshop / "text.txt"), "--max-tokens", "64", *machine],
        ["sft", q, "--data", str(chat), "--steps", "1", "--out", str(tmp_path / "run"), *machine],
        ["plan", q],
    ):
        assert main([verb, *args]) == 0, capsys.readouterr().err
    made = json.loads((locate_model(tmp_path / "run") / "config.json").read_text())
    assert (made["model_type"], "base_model_type" in made) == ("deepseek_v3", False)


def test_transformers_does_not_open_a_quantized_folder(quantize: Any, tmp_path: Path) -> None:
    """It would fill the matrices that it does not find with random numbers."""
    transformers = pytest.importorskip("transformers")
    quantize()
    with pytest.raises(ValueError, match="model type `shoal`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_calibration_lowers_the_error_of_outputs(quantize: Any, workshop: Path) -> None:
    result = quantize("--calibrate", str(workshop / "text.txt"), "--calibrate-tokens", "2048")
    assert result["calibration_tokens"] == 2048
    assert result["output_error"] < 0.5 * result["weight_error"]
    assert result["bpb_increase"] is not None
    names = [matrix["name"] for matrix in result["matrices"]]
    assert len(names) == len(set(names))
    assert {matrix["format"] for matrix in result["matrices"] if ".layers.2." in matrix["name"]} == {"int8"}


SHAPES: list[dict[str, Any]] = [
    {"q_lora_rank": 24, "n_shared_experts": None, "moe_layer_freq": 2, "num_hidden_layers": 3},
    {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True},
    {"model_type": "llama", "n_routed_experts": None, "value_embedding": True, "repeat_window": 20},
    {"value_embedding": True},
    {"tie_word_embeddings": True, "qk_norm": True, "topk_method": "greedy", "scoring_func": "softmax", "num_nextn_predict_layers": 1},
]


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_calibrated_models_of_every_kind_stay_closer_to_the_original(changes: dict[str, Any], tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "init": "fan_in",
    }
    model = Transformer(ModelConfig(**{**shape, **changes})).eval()
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        if "value_embedding" in name:
            parameter.normal_(std=0.3)
    save_model(model, tmp_path)
    ids = torch.randint(0, 96, (40, 32), generator=torch.Generator().manual_seed(0))
    scheme = quantized_scheme(4)
    wanted = model(ids).hidden
    errors = []
    for seen in (ids, None):
        with open_model(tmp_path) as (empty, files):
            plan = parts_of(empty.config, scheme)
            if seen is None:
                parts = dict(pack_files(files, empty.config, plan))
            else:
                parts = dict(Calibration(files, empty.config, plan, seen, lambda settled: None).parts())
        assert list(parts) == list(plan)
        errors.append(float((dequantized(model.config, parts).eval()(ids).hidden - wanted).square().mean()))
    assert errors[0] < 0.75 * errors[1]


def test_scales_that_are_not_numbers_are_noticed(quantize: Any, tmp_path: Path, workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize()
    opened = open_quantized(tmp_path / "q")
    head = opened.parts["lm_head"]
    assert isinstance(head, PackedMatrix)
    assert head.scales is not None
    file = tmp_path / "q" / "model.safetensors"
    content = file.read_bytes()
    scales = head.scales.numpy().tobytes()
    assert content.count(scales) == 1
    file.write_bytes(content.replace(scales, b"\xff\x7f" * head.scales.numel()))
    for args in (["eval", "--data", str(workshop / "text.txt")], ["generate", "the red"]):
        assert main([args[0], str(tmp_path / "q"), *args[1:], "--threads", "1", "--precision", "fp32"]) == 2
        assert "not numbers" in capsys.readouterr().err


def refuse(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["quantize", *args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_work_is_said_at_once(
    trained: Path, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = str(workshop / "text.txt"), str(tmp_path / "q")
    monkeypatch.setattr("shoal.quantizing.command.write_quantized", lambda *args: pytest.fail("work began"))
    assert "bits" in refuse(capsys, str(trained), out, "--bits", "3")
    assert "group" in refuse(capsys, str(trained), out, "--group", "48")
    assert "does not exist" in refuse(capsys, str(trained), out, "--calibrate", str(tmp_path / "no.txt"))
    assert "--calibrate-tokens" in refuse(capsys, str(trained), out, "--calibrate", text, "--calibrate-tokens", "0")
    assert "not an earlier quantized model" in refuse(capsys, str(trained), str(workshop))
    assert "no folder to write in" in refuse(capsys, str(trained), text + "/q")
    (tmp_path / "short.txt").write_text("a few\n\nwords\n\n" * 3)
    assert "too short" in refuse(capsys, str(trained), out, "--calibrate", str(tmp_path / "short.txt"))
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a few words"}\n')
    both = [str(tmp_path / f"{name}.jsonl") for name in ("train", "val")]
    assert "tokens to calibrate with" in refuse(capsys, str(trained), out, "--calibrate", *both)
    monkeypatch.setattr("shoal.runtime.available_memory", lambda device: 1000)
    assert "of memory, but only" in refuse(capsys, str(trained), out)
    assert "--calibrate-tokens" in refuse(capsys, str(trained), out, "--calibrate", text)
    assert not Path(out).exists()


def test_a_quantized_model_is_not_quantized_again(quantize: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize()
    assert "quantized already" in refuse(capsys, str(tmp_path / "q"), str(tmp_path / "q2"))
    assert locate_model(tmp_path / "q") == tmp_path / "q"


def test_counted_ngrams_are_kept_to_the_bit(train_args: Any, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out, data = tmp_path / "run", tmp_path / "q", str(workshop / "text.txt")
    more = ["--model.count-order", "3", "--model.repeat-window", "20", "--model.num-nextn-predict-layers", "0", "--threads", "1"]
    assert main(train_args(run, *more)) == 0, capsys.readouterr().err
    assert main(["quantize", str(run), str(out), "--calibrate", data, "--calibrate-tokens", "1024", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bpb_increase"] < 0.02
    before, after = load_model(locate_model(str(run))).state_dict(), open_quantized(out).parts
    looked_up = [name for name in before if name.startswith(("model.counted.", "model.repeats."))]
    assert len(looked_up) == 6
    for name in looked_up:
        part = after[name]
        assert isinstance(part, torch.Tensor)
        assert part.equal(before[name]), name
    made = []
    for model in (run, out):
        assert main(["generate", str(model), "the red", "--max-tokens", "8", "--temperature", "0", "--ignore-eos", "--json"]) == 0
        made.append(json.loads(capsys.readouterr().out.splitlines()[-1])["text"])
    assert made[0] == made[1]
