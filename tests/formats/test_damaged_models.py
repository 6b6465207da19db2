"""Whatever a model's folder holds: it loads, or one line says what is wrong. No traceback, no crash, no minutes of work."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.engine.batch import Batch
from shoal.engine.native import NativeRunner
from shoal.engine.weights import load_weights, to_transformer
from shoal.formats.huggingface import load_model, open_model, save_model
from shoal.formats.locate import locate_model
from shoal.formats.packing import pack_files
from shoal.formats.parts import Scheme, parts_of
from shoal.formats.quantized import is_quantized, write_quantized
from shoal.kernels.selection import BACKEND
from shoal.model import Transformer, init_weights

VALUES = [None, 0, -1, 3, 10**12, 10**400, 1.5, math.nan, math.inf, "x", "4", "", [], [1], {}, {"factor": 0}, True]
SCALINGS = [
    {"type": kind, key: value, **extra}
    for kind in ("yarn", "llama3", "linear", None, 3)
    for key in ("factor", "original_max_position_embeddings", "beta_fast", "mscale", "low_freq_factor")
    for value in (None, 0, -1, "4", 1e999, [], 4)
    for extra in ({}, {"factor": 4.0, "original_max_position_embeddings": 16})
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small: dict[str, Any], tokenizer: Any) -> dict[str, Path]:
    """A plain folder and a quantized one; only to be copied."""
    root = tmp_path_factory.mktemp("models")
    model = Transformer(ModelConfig(**small, num_nextn_predict_layers=1))
    init_weights(model, 0)
    save_model(model, root / "plain", max_shard_bytes=40000)
    scheme = Scheme("int4", "int8", "int8")
    with open_model(root / "plain") as (empty, files):
        parts = pack_files(files, empty.config, parts_of(empty.config, scheme))
        write_quantized(root / "quantized", empty.config, scheme, parts, tokenizer)
    return {name: root / name for name in ("plain", "quantized")}


def try_to_load(folder: Path) -> str | None:
    """The message of a refusal; None where the folder loads, and runs. Any other exception is a failure."""
    try:
        found = locate_model(folder)
        if is_quantized(found):
            weights = load_weights(found)
            to_transformer(weights)
        else:
            load_model(found, dtype=torch.float32)
            weights = load_weights(found, bits=4)
        if BACKEND.cpu is not None:
            runner = NativeRunner(weights.config, weights.parts, 1)
            runner.allocate(1, "fp32")
            runner.forward(Batch.lay_out([[1, 2, 3]], [0], [np.zeros(1, np.int32)]))
    except UserError as error:
        return str(error)
    return None


def damaged(models: dict[str, Path], kind: str, tmp_path: Path, change: Callable[[Path], object]) -> str | None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(models[kind], folder)
    change(folder)
    message = try_to_load(folder)
    assert message is None or "\n" not in message
    return message


FUZZ = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["plain", "quantized"]))
def test_any_value_in_a_config(data: st.DataObject, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        inner = config.get("quantization_config", {})
        keys = sorted(config) + [f"quantization_config.{key}" for key in sorted(inner)]
        for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
            value = data.draw(st.sampled_from(SCALINGS if key == "rope_scaling" else VALUES))
            if key.startswith("quantization_config.") and isinstance(config["quantization_config"], dict):
                config["quantization_config"][key.partition(".")[2]] = value
            else:
                config[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    damaged(models, kind, tmp_path, change)


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["plain", "quantized"]))
def test_any_damage_to_a_file(data: st.DataObject, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        file = data.draw(
            st.sampled_from(sorted(path for path in folder.iterdir() if path.name not in ("tokenizer.json", "generation_config.json")))
        )
        content = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, min(header, len(content)) - 1))
            content[position] = data.draw(st.integers(0, 255))
        cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
        file.write_bytes(content[:cut] + (b"more" if data.draw(st.booleans()) and cut is None else b""))

    damaged(models, kind, tmp_path, change)


@pytest.mark.parametrize("kind", ["plain", "quantized"])
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "vocab_size", "n_routed_experts", "num_attention_heads", "kv_lora_rank"]
)
@pytest.mark.parametrize("value", [-1, 10**12, 2.5, "2", True])
def test_absurd_numbers_are_named(kind: str, key: str, value: Any, models: dict[str, Path], tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))

    message = damaged(models, kind, tmp_path, change)
    assert message is not None
    assert key in message
    assert "whole number" in message or "at least 1" in message or "between 1 and" in message


def test_too_little_memory_is_said_before_anything_is_read(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shoal.runtime.available_memory", lambda device: 1000)
    monkeypatch.setattr("shoal.formats.weight_files.WeightFiles.read", lambda self, name: pytest.fail("a weight was read"))
    for bits in (None, 4):
        with pytest.raises(UserError, match="of memory, but only"):
            load_weights(models["plain"], bits)
    with pytest.raises(UserError, match="of memory, but only"):
        load_model(models["plain"])
    load_weights(models["quantized"])  # mapped: it needs none


def test_a_shard_outside_the_folder_is_not_opened(models: dict[str, Path], tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name: "../" + file for name, file in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    message = damaged(models, "plain", tmp_path, change)
    assert message is not None
    assert "does not lie beside it" in message
