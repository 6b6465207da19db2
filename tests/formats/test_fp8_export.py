from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.config import UserError
from shoal.formats.export import export_model
from shoal.formats.fp8 import Fresh, quantizer_for
from shoal.formats.huggingface import load_model, official_tensors
from shoal.model import Transformer
from shoal.numerics.fp8 import dequantize_blocks, quantize_blocks

Make = Callable[..., Transformer]

WIDE = {"hidden_size": 136, "intermediate_size": 272, "moe_intermediate_size": 144, "num_nextn_predict_layers": 1, "n_shared_experts": 1}
"""Matrices with partial blocks on both edges."""
MATRIX = {"kv_a_proj_with_mqa", "kv_b_proj", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def write(model: Transformer, tokenizer: Any, out: Path, source: Path | None = None) -> dict[str, torch.Tensor]:
    if source is None:
        export_model(model, tokenizer, out, torch.bfloat16, fp8=Fresh())
    else:
        with quantizer_for(source) as quantizer:
            export_model(model, tokenizer, out, torch.bfloat16, fp8=quantizer)
    return load_file(out / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].view(torch.uint8).equal(b[name].view(torch.uint8)) for name in a)


def test_the_official_layout_and_the_numbers_in_it(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(**WIDE)
    stored = write(model, tokenizer, tmp_path / "out")
    matrices = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name.split(".")[-2] for name in matrices} == MATRIX
    assert {name for name in stored if name.endswith("_scale_inv")} == {f"{name}_scale_inv" for name in matrices}
    weights = official_tensors(model)
    for name in stored.keys() & weights.keys() - matrices:
        kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert stored[name].equal(weights[name].to(kept))
        assert not any(f".{part}." in name for part in MATRIX)
    read = official_tensors(load_model(tmp_path / "out"))
    for name in matrices:
        scales = stored[f"{name}_scale_inv"]
        assert scales.shape == tuple(-(-side // 128) for side in weights[name].shape)
        exact = dequantize_blocks(stored[name], scales)
        assert read[name].dtype == torch.bfloat16
        assert read[name].float().equal(exact)
        assert ((exact - weights[name]).abs() <= weights[name].abs() * 2**-4 + scales.max() * 2**-9).all()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["fmt"], settings["weight_block_size"]) == ("fp8", "e4m3", [128, 128])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_read_is_written_with_the_same_bits(make_model: Make, tokenizer: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    first = write(make_model(**WIDE), tokenizer, tmp_path / "first")
    again = load_model(tmp_path / "first", dtype=dtype)
    assert same(write(again, tokenizer, tmp_path / "by_value"), first)
    assert same(write(again, tokenizer, tmp_path / "as_stored", tmp_path / "first"), first)
    export_model(again, tokenizer, tmp_path / "plain", dtype)  # fp8 -> plain numbers -> fp8
    assert same(write(load_model(tmp_path / "plain"), tokenizer, tmp_path / "back", tmp_path / "plain"), first)


def test_scales_of_other_files_are_kept(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    """Official scales are any fp32 numbers: what is read from such a file is not rounded a second time."""
    stored = write(make_model(**WIDE), tokenizer, tmp_path / "source")
    weights = official_tensors(make_model(**WIDE))
    for name in [name for name in stored if stored[name].dtype == torch.float8_e4m3fn]:
        quantized = quantize_blocks(weights[name])
        stored |= {name: quantized.data, f"{name}_scale_inv": quantized.scales}
    save_file(stored, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    assert same(write(load_model(tmp_path / "source"), tokenizer, tmp_path / "out", tmp_path / "source"), stored)


def test_what_other_files_hold_in_bf16_stays(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    """They name it in `modules_to_not_convert`, which comes along."""
    stored, weights = write(make_model(**WIDE), tokenizer, tmp_path / "source"), official_tensors(make_model(**WIDE))
    kept = [name for name in stored if ".self_attn." in name and f"{name}_scale_inv" in stored]
    for name in kept:
        del stored[f"{name}_scale_inv"]
        stored[name] = weights[name].bfloat16()
    save_file(stored, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "source" / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["modules_to_not_convert"] = [name.removesuffix(".weight") for name in kept]
    config.write_text(json.dumps(content))
    assert same(write(load_model(tmp_path / "source"), tokenizer, tmp_path / "out", tmp_path / "source"), stored)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == content["quantization_config"]


def test_blocks_of_another_size_are_refused(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    write(make_model(), tokenizer, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["weight_block_size"] = [64, 64]
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match="export it as bf16 first"), quantizer_for(tmp_path / "out"):
        pass


def test_transformers_reads_the_same_numbers(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers opens FP8 files with accelerate only")
    model = make_model(hidden_size=256, intermediate_size=384, moe_intermediate_size=128)  # of partial blocks it divides none
    write(model, tokenizer, tmp_path / "out")
    settings = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=settings)
    theirs = theirs.float()
    ours = load_model(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids).hidden), theirs(ids).logits.float(), atol=1e-4, rtol=1e-4)
