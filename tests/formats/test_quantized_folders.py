"""Shoal's quantized folder: what is written comes back, without a copy, and anything else is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoal.config import UserError
from shoal.formats.huggingface import load_model, open_model, save_model
from shoal.formats.packing import pack, pack_files
from shoal.formats.parts import Part, Scheme, arrays_of, join_kv_up, parts_of, split_kv_up
from shoal.formats.quantized import dequantized, open_quantized, refuse_other, write_quantized
from shoal.kernels.packed import PackedMatrix, unpack
from shoal.model import Transformer

Make = Callable[..., Transformer]

SCHEMES = [
    Scheme("int4", "int8", "int8"),
    Scheme("int4", "int4", "int8", "fp32", 64),
    Scheme("int8", "int8", "int8"),
    Scheme("fp32", "fp32", "fp32", "fp32"),
    Scheme("bf16", "bf16", "bf16"),
]
MODELS: list[dict[str, Any]] = [
    {"num_nextn_predict_layers": 1},
    {"tie_word_embeddings": True, "q_lora_rank": 8, "n_shared_experts": None},
    {"model_type": "llama", "attention_bias": True, "num_key_value_heads": 1},
]


def write(model: Transformer, scheme: Scheme, folder: Path, tokenizer: Any, **options: Any) -> Path:
    """`model` quantized by rounding to nearest, in `folder / "q"`."""
    save_model(model, folder / "plain")
    with open_model(folder / "plain") as (empty, files):
        parts = pack_files(files, empty.config, parts_of(empty.config, scheme))
        write_quantized(folder / "q", empty.config, scheme, parts, tokenizer, **options)
    return folder / "q"


@pytest.mark.parametrize("shard", [10**9, 6000])
@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip(make_model: Make, tmp_path: Path, tokenizer: Any, scheme: Scheme, changes: dict[str, Any], shard: int) -> None:
    model = make_model(**changes)
    folder = write(model, scheme, tmp_path, tokenizer, max_shard_bytes=shard)
    opened = open_quantized(folder)
    assert opened.scheme == scheme
    assert (folder / "tokenizer.json").exists()
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (shard == 10**9)
    plan = parts_of(model.config, scheme)
    assert opened.parts.keys() == plan.keys()
    back = dequantized(opened.config, opened.parts)
    tolerance = {"int4": 0.25, "int8": 0.01, "bf16": 0.005, "fp32": 0}[scheme.matrices]
    for name, tensor in model.state_dict().items():
        found = back.state_dict()[name]
        assert (found - tensor).norm() <= tolerance * tensor.norm(), name
        if ".gate.weight" in name or "norm" in name or "bias" in name:
            assert found.equal(tensor), name
    for name, part in opened.parts.items():
        for array in arrays_of(part).values():
            assert array.data_ptr() % 64 == 0, name


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_head_that_was_tied_is_saved_as_it_was_tuned(make_model: Make, tmp_path: Path, tokenizer: Any, scheme: Scheme) -> None:
    opened = open_quantized(write(make_model(tie_word_embeddings=True), scheme, tmp_path, tokenizer))
    model = dequantized(opened.config, opened.parts).eval()
    assert model.config.tie_word_embeddings == (scheme.head == scheme.embedding)
    assert opened.config.tie_word_embeddings
    model.lm_head.weight.mul_(2)
    save_model(model, tmp_path / "tuned")
    back, ids = load_model(tmp_path / "tuned").eval(), torch.arange(16)[None]
    assert back.logits(back(ids).hidden).equal(model.logits(model(ids).hidden))


def test_arrays_are_views_of_the_file(make_model: Make, tmp_path: Path, tokenizer: Any) -> None:
    folder = write(make_model(), SCHEMES[0], tmp_path, tokenizer)
    part = open_quantized(folder).parts["model.layers.1.mlp.experts.up_proj"]
    assert isinstance(part, PackedMatrix)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert any(start <= part.data.data_ptr() < end for start, end in spans)


def test_files_are_what_the_safetensors_library_reads(make_model: Make, tmp_path: Path, tokenizer: Any) -> None:
    folder = write(make_model(), SCHEMES[0], tmp_path, tokenizer)
    stored = load_file(folder / "model.safetensors")
    part = open_quantized(folder).parts["model.layers.0.self_attn.o_proj"]
    assert isinstance(part, PackedMatrix)
    assert stored["model.layers.0.self_attn.o_proj.data"].equal(part.data)
    assert part.scales is not None
    assert stored["model.layers.0.self_attn.o_proj.scales"].equal(part.scales)


def test_multi_token_prediction_keeps_more_bits(make_model: Make, tmp_path: Path, tokenizer: Any) -> None:
    parts = open_quantized(write(make_model(num_nextn_predict_layers=1), SCHEMES[0], tmp_path, tokenizer)).parts
    formats = {name: part.format for name, part in parts.items() if isinstance(part, PackedMatrix)}
    assert {format for name, format in formats.items() if ".layers.2." in name or name == "lm_head"} == {"int8"}
    assert {format for name, format in formats.items() if ".layers.1." in name} == {"int4"}


def test_stacks_of_heads(make_model: Make) -> None:
    model = make_model()
    weight = model.state_dict()["model.layers.0.self_attn.kv_b_proj.weight"]
    key, value = split_kv_up(weight, model.config)
    assert (key.shape, value.shape) == ((2, 16, 8), (2, 8, 16))
    assert key[1, 3, 5] == weight[16 + 5, 3]
    assert value[1, 3, 5] == weight[16 + 8 + 3, 5]
    assert join_kv_up(key, value).equal(weight)


def test_packing_in_pieces_equals_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(2, 70, 40)
    part = Part((2, 70, 40), "int4", True, 32)
    whole = pack(weight, part)
    monkeypatch.setattr("shoal.formats.packing.CHUNK", 1)
    pieces = pack(weight, part)
    assert isinstance(whole, PackedMatrix)
    assert isinstance(pieces, PackedMatrix)
    assert unpack(whole).equal(unpack(pieces))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["quantization_config"].update(version=1), "version"),
        (lambda c: c["quantization_config"].update(group=48), "groups of 48"),
        (lambda c: c["quantization_config"].update(group=64), "but config.json makes it"),
        (lambda c: c["quantization_config"].update(matrices="int8"), "but config.json makes it"),
        (lambda c: c["quantization_config"].update(matrices="int3"), "int3"),
        (lambda c: c["quantization_config"].update(matrices=[4]), "number format"),
        (lambda c: c["quantization_config"].pop("head"), "quantization_config must hold"),
        (lambda c: c["quantization_config"].update(surprise=1), "quantization_config must hold"),
        (lambda c: c.update(hidden_size=64), "but config.json makes it"),
        (lambda c: c.update(num_hidden_layers=3), "lacks"),
        (lambda c: c.update(num_hidden_layers=1), "does not account for"),
    ],
)
def test_another_config_is_refused(make_model: Make, tmp_path: Path, tokenizer: Any, damage: Any, message: str) -> None:
    folder = write(make_model(), SCHEMES[0], tmp_path, tokenizer)
    edit_config(folder, damage)
    with pytest.raises(UserError, match=message) as caught:
        open_quantized(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(make_model: Make, tmp_path: Path, tokenizer: Any) -> None:
    folder = write(make_model(), SCHEMES[0], tmp_path, tokenizer)
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            open_quantized(folder)


def test_numbers_that_are_not_finite_are_refused(make_model: Make, tmp_path: Path, tokenizer: Any) -> None:
    model = make_model()
    scheme = SCHEMES[0]
    folder = write(model, scheme, tmp_path, tokenizer)
    parts = dict(open_quantized(folder).parts)
    parts["model.norm.weight"] = torch.full((32,), torch.nan)
    write_quantized(folder, model.config, scheme, iter(parts.items()), tokenizer)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        open_quantized(folder)


def test_other_peoples_folders_are_never_replaced(make_model: Make, tmp_path: Path, tokenizer: Any) -> None:
    folder = write(make_model(), SCHEMES[0], tmp_path, tokenizer)
    refuse_other(folder)
    (folder / "additional_chat_templates").mkdir()
    refuse_other(folder)
    with pytest.raises(UserError, match="not an earlier quantized model"):
        refuse_other(tmp_path / "plain")
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an earlier quantized model"):
        write_quantized(folder, make_model().config, SCHEMES[0], iter(()), tokenizer)


def test_a_failure_leaves_nothing_behind(make_model: Make, tmp_path: Path, tokenizer: Any) -> None:
    def parts() -> Any:
        raise UserError("out of luck")
        yield

    with pytest.raises(UserError, match="out of luck"):
        write_quantized(tmp_path / "q", make_model().config, SCHEMES[0], parts(), tokenizer)
    assert not list(tmp_path.iterdir())
