"""Hugging Face folders: `config.json` and safetensors weights under the official names of DeepSeek-V2, DeepSeek-V3 and Llama.

`Transformer` already bears the official names. What differs on disk: routed experts lie one by one, FP8 weights come with
scales (`numerics.fp8`), and MTP layers repeat embedding and output head, which they share with the main model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig, UserError
from ..config.huggingface import model_config_from_dict, model_config_to_dict
from ..model import Transformer
from ..runtime import require_memory
from .fp8 import Quantizer
from .parts import EMBEDDING, EXPERTS, HEAD_WEIGHT
from .weight_files import (
    CONFIG,
    GENERATION,
    INDEX,
    LARGEST_SHARD,
    SCALE,
    WeightFiles,
    plan_shards,
    read_generation,
    read_json,
    shard_names,
    write_generation,
    write_json,
)

_MATRIX = "model.layers.0.self_attn.o_proj.weight"
"""One that every model has; the dtype of a model whose tensors are not all of one is that of its matrices."""


def save_model(
    model: Transformer,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = LARGEST_SHARD,
    mtp_copies: bool = True,
    fp8: Quantizer | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and the weights, in one file or in shards of at most `max_shard_bytes`.

    `dtype` None keeps every tensor's own; the routing bias stays fp32 always. With `mtp_copies` every MTP layer repeats
    embedding and output head as the official files do, which vLLM and SGLang look for. With `fp8` the matrices that it takes are stored
    as it quantizes them. `generation` is what `generation_config.json` says besides.

    Raises `UserError` when the folder already holds weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} already holds weights: choose another folder")
    tensors = official_tensors(model)
    if mtp_copies:
        tensors |= {name: tensors[source] for name, source in shared_copies(model.config).items() if name != HEAD_WEIGHT}

    def stored_dtype(name: str) -> torch.dtype:
        kept = dtype is None or name.endswith("e_score_correction_bias") or not tensors[name].is_floating_point()
        return tensors[name].dtype if kept or dtype is None else dtype

    def stored(name: str) -> dict[str, Tensor]:
        if fp8 is not None and fp8.takes(name):
            quantized = fp8(name, tensors[name].cpu())
            return {name: quantized.data, name + SCALE: quantized.scales}
        # A copy of each: safetensors refuses tensors that share memory, as experts of one stack do.
        copied = tensors[name].to("cpu", stored_dtype(name), copy=True).contiguous()
        if copied.dtype == torch.float16 and not copied.isfinite().all():
            raise UserError(f"{name} holds numbers beyond 65504, which fp16 cannot: use bf16 or fp32")
        return {name: copied}

    def size(name: str) -> int:
        return tensors[name].numel() * (1 if fp8 is not None and fp8.takes(name) else stored_dtype(name).itemsize)

    shards = plan_shards({name: size(name) for name in tensors}, max_shard_bytes)
    files = shard_names(len(shards))
    weight_map: dict[str, str] = {}
    total = 0
    for file, names in zip(files, shards, strict=True):
        shard = {key: tensor for name in names for key, tensor in stored(name).items()}
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{folder / file} cannot be written ({error})") from error
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # some versions of safetensors write for the owner alone
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = model.config if model.model.counted is None else replace(model.config, count_entries=len(model.model.counted.entries))
    written = model_config_to_dict(config, dtype=str(stored_dtype(_MATRIX)).removeprefix("torch."))
    if fp8 is not None:
        written["quantization_config"] = fp8.settings
    write_json(folder / CONFIG, written)
    write_generation(folder, written, generation)


@contextmanager
def open_model(folder: Path) -> Iterator[tuple[Transformer, WeightFiles]]:
    """The model of a Hugging Face folder without its weights (on the device `meta`), and files that are known to hold them.

    Files whose `config.json` announces MTP layers that are not there, as transformers writes them, give a model without, with a warning.

    Raises `UserError` for unsupported models, and for missing, unexpected, misshapen or truncated tensors, before any is read.
    """
    raw = read_json(folder / CONFIG)
    config = config_of(folder, raw)
    with WeightFiles(folder, _fp8_block(raw)) as files:
        if config.num_nextn_predict_layers and not files.has_prefix(f"model.layers.{config.num_hidden_layers}."):
            warnings.warn(f"{folder} announces multi-token prediction layers but holds none: loading without them", stacklevel=2)
            config.num_nextn_predict_layers = 0
        with torch.device("meta"):
            model = Transformer(config)
        _check(model, files)
        yield model, files


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """The model of a Hugging Face folder, filled tensor by tensor so that no more than one copy of the weights is in memory.

    `dtype` None keeps the one in which each tensor is stored (FP8 weights are dequantized to that of the embedding).

    Raises `UserError` as `open_model` does, for numbers that are not finite, and where the model does not fit into memory.
    """
    with open_model(folder) as (empty, files):
        if dtype is None:
            _take_stored_dtypes(empty, files)
        return fill_model(empty, dtype, device, lambda model: _fill(model, files))


def fill_model(
    empty: Transformer, dtype: torch.dtype | None, device: torch.device | str, fill: Callable[[Transformer], None]
) -> Transformer:
    """Give a model on the device `meta` weights in `dtype` (None: in what each tensor has there) on `device`, overwritten by `fill`;
    `UserError` where they do not fit."""
    if dtype is not None:
        empty = empty.to(dtype)
    if torch.device(device).type == "cpu":
        require_memory(sum(parameter.nbytes for parameter in empty.parameters()), f"the model in {dtype_name(empty)}")
    model = empty.to_empty(device=device)
    if model.config.tie_word_embeddings:  # to_empty gives every module a weight of its own
        model.lm_head.weight = model.model.embed_tokens.weight
    fill(model)
    return model


def _take_stored_dtypes(empty: Transformer, files: WeightFiles) -> None:
    """Give the weights of a model on the device `meta` the dtypes of the files, a stack of experts that of its first."""
    embedding = files.plain_dtype(EMBEDDING)
    for name, parameter in empty.named_parameters():
        stored = EXPERTS.sub(r"\1.0.\2.weight", name)
        parameter.data = parameter.data.to(embedding if files.is_fp8(stored) else files.plain_dtype(stored))


def dtype_name(model: Transformer) -> str:
    """What the matrices of `model` are held in."""
    return str(model.state_dict()[_MATRIX].dtype).removeprefix("torch.")


def load_state(model: Transformer, folder: Path) -> None:
    """Overwrite the weights of `model` with those of a folder of the same shape; every tensor keeps its dtype and device.

    Raises `UserError` as `load_model` does; after an error about names or shapes the model is untouched.
    """
    with WeightFiles(folder, _fp8_block(read_json(folder / CONFIG))) as files:
        _check(model, files)
        _fill(model, files)


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in `folder`, without its weights."""
    return config_of(folder, read_json(folder / CONFIG))


def config_of(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    """What `raw`, the content of the folder's `config.json`, says, with the end tokens that only `generation_config.json` names.

    `eos_token_id` is the first of them; where there are several, `extra` holds the list under the same name.
    """
    config = model_config_from_dict(raw)
    config.extra.pop("quantization_config", None)  # weights are dequantized on load: a saved copy has none
    known, more = config.extra.get("eos_token_id", config.eos_token_id), read_generation(folder).get("eos_token_id")
    ends = list(dict.fromkeys([*_ids(known, folder / CONFIG), *_ids(more, folder / GENERATION)]))
    if ends:
        config.eos_token_id = ends[0]
    if len(ends) > 1:
        config.extra["eos_token_id"] = ends
    return config


def _ids(written: Any, file: Path) -> list[int]:
    """The tokens that an `eos_token_id` names: one, several or, as null or -1, none."""
    ids = written if isinstance(written, list) else [] if written in (None, -1) else [written]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise UserError(f"eos_token_id is {written!r} in {file}: it must be the id of a token, or a list of them")
    return ids


def official_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every weight of the model, once, under its official name; routed experts are views of their stack, so all can be written to."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stacked = EXPERTS.fullmatch(name)
        if stacked:
            prefix, part = stacked.groups()
            tensors.update({f"{prefix}.{e}.{part}.weight": expert for e, expert in enumerate(tensor)})
        elif not (name == HEAD_WEIGHT and model.config.tie_word_embeddings):
            tensors[name] = tensor
    return tensors


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Names under which official files may repeat a shared tensor -> the tensor they repeat."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD_WEIGHT
    copies = {HEAD_WEIGHT: EMBEDDING} if config.tie_word_embeddings else {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = EMBEDDING
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def _fill(model: Transformer, files: WeightFiles) -> None:
    """Overwrite the weights with those of files that `_check` has passed."""
    targets = official_tensors(model)
    for name, target in targets.items():
        target.copy_(files.read(name))
    refuse_other_copies(model.config, files)


def _check(model: Transformer, files: WeightFiles) -> None:
    files.check({name: tensor.shape for name, tensor in official_tensors(model).items()}, shared_copies(model.config))


def refuse_other_copies(config: ModelConfig, files: WeightFiles) -> None:
    """Raise `UserError` where a tensor that the model shares differs from its copy in the files."""
    for name, source in shared_copies(config).items():
        if name in files.file_of:
            one, other = files.read(name), files.read(source)
            if one.shape != other.shape or not one.equal(other):
                raise UserError(f"{files.folder}: {name} differs from {source}, but Shoal shares the two: such files are not supported")


def _fp8_block(raw: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of an FP8 block; anything but block-scaled FP8 is refused."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return 128, 128
    if not isinstance(quantization, dict):
        raise UserError(f"quantization_config is {quantization!r}: it must be a table, or absent")
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method == "shoal":
        raise UserError("this model is quantized for Shoal's engine: name the model that it was made of")
    if method != "fp8" or not block:
        raise UserError(f"weights quantized by {method!r} are not supported here: use the original files or block-scaled FP8")
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and 0 < side < 2**31 for side in block):
        raise UserError(f"weight_block_size is {block!r}: it must be the rows and columns of a block")
    return block[0], block[1]
