"""Shoal's own quantized folder: `config.json`, tokenizer, and packed matrices in safetensors files that are used where they lie.

Array `X.data` (`.scales`) belongs to the matrix X, a name without suffix is a small tensor; `parts` says which there are and in
which shapes, `kernels.packed` how a matrix is laid out. Every array begins at a multiple of 64 bytes of its file, so that the kernels read
the memory-mapped file itself: opening takes no longer for a large model, and what is never used is never read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..atomic import new_folder
from ..config import ModelConfig, UserError
from ..config.huggingface import model_config_to_dict
from ..kernels.packed import PackedMatrix, unpack
from ..model import Transformer
from .checkpoints import SavesFiles
from .huggingface import config_of, fill_model
from .parts import EMBEDDING, HEAD, Part, Scheme, arrays_of, join_kv_up, parts_of
from .weight_files import (
    CONFIG,
    GENERATION,
    INDEX,
    LARGEST_SHARD,
    open_shard,
    plan_shards,
    read_json,
    shard_names,
    shard_paths,
    some,
    write_generation,
    write_json,
)

METHOD = "shoal"
VERSION = 2
ALIGNMENT = 64

_PAD = "padding."
_NAMES = {torch.int64: "I64", torch.int16: "I16", torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_PLAIN_FILES = {CONFIG, INDEX, GENERATION, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"}


@dataclass(frozen=True)
class Weights:
    """Matrices and small tensors of a model by module name; which names there are is said in `parts`."""

    config: ModelConfig
    scheme: Scheme
    parts: dict[str, PackedMatrix | Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def is_quantized(folder: Path) -> bool:
    """Whether `folder` (with a `config.json`) says that it is one of ours."""
    quantization = read_json(folder / CONFIG).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def refuse_other(folder: Path) -> None:
    """Raise `UserError` where a quantized model cannot be written, because `folder` is something else than an earlier one."""
    if folder.exists() and not _may_replace(folder):
        raise UserError(f"{folder} exists and is not an earlier quantized model: choose another folder or empty it")


def _may_replace(folder: Path) -> bool:
    """Whether nothing is lost when `folder` goes: it is empty, or a quantized folder and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if not names:
        return True
    ours = all(name in _PLAIN_FILES or (name.startswith("model") and name.endswith(".safetensors")) for name in names)
    return ours and CONFIG in names and is_quantized(folder)


def write_quantized(
    folder: Path,
    config: ModelConfig,
    scheme: Scheme,
    parts: Iterator[tuple[str, PackedMatrix | Tensor]],
    tokenizer: SavesFiles | None,
    *,
    max_shard_bytes: int = LARGEST_SHARD,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write a whole folder; `parts` comes in the order of `parts_of` and is written as it comes, one part in memory at a time.

    `tokenizer`: None for weights that were drawn at random and have no words.
    `generation`: what `generation_config.json` says besides the tokens that texts begin and end with.

    What was at `folder` is replaced when the new one is whole. Raises `UserError` where that is something else than an earlier such folder.
    """
    refuse_other(folder)
    plan = parts_of(config, scheme)
    shards = plan_shards({name: part.nbytes for name, part in plan.items()}, max_shard_bytes)
    files = shard_names(len(shards))
    with new_folder(folder.resolve()) as temporary:
        weight_map: dict[str, str] = {}
        for file, names in zip(files, shards, strict=True):
            header, data_offset = _header({name: plan[name] for name in names})
            with (temporary / file).open("wb") as out:
                out.write(header)
                for name in names:
                    came, part = next(parts)
                    assert came == name, f"{came} came where {name} was due"
                    for array in arrays_of(part).values():
                        _write_array(out, array, data_offset)
            weight_map.update(dict.fromkeys(_entries({name: plan[name] for name in names}), file))
        if len(files) > 1:
            size = sum(part.nbytes for part in plan.values())
            write_json(temporary / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        written = model_config_to_dict(config, own_weights=True)
        written["quantization_config"] = {"quant_method": METHOD, "version": VERSION, **asdict(scheme)}
        write_json(temporary / CONFIG, written)
        write_generation(temporary, written, generation)
        if tokenizer is not None:
            tokenizer.save(temporary, config.max_position_embeddings)


def read_scheme(folder: Path) -> tuple[ModelConfig, Scheme]:
    """What kind of model lies in a quantized folder; raises `UserError` where its `config.json` is no such thing."""
    raw = read_json(folder / CONFIG)
    quantization = dict(raw.pop("quantization_config"))
    quantization.pop("quant_method")
    version = quantization.pop("version", None)
    if version != VERSION:
        raise UserError(f"{folder} is a quantized model of version {version!r}, this Shoal reads version {VERSION}: quantize it anew")
    names = {field.name for field in fields(Scheme)}
    if quantization.keys() != names:
        raise UserError(f"{folder}: quantization_config must hold {', '.join(sorted(names))}, and nothing else: quantize it anew")
    return config_of(folder, raw), Scheme(**quantization)


def open_quantized(folder: Path) -> Weights:
    """Map a quantized folder; no weight is read, and every matrix is a view of the file.

    Raises `UserError` for missing, unexpected, misshapen or truncated arrays, and for small tensors with numbers that are not finite.
    """
    config, scheme = read_scheme(folder)
    plan = parts_of(config, scheme)
    wanted = _entries(plan)
    file_of: dict[str, Any] = {}
    for path in shard_paths(folder):
        file = open_shard(path)
        file_of.update({name: file for name in file.keys() if not name.startswith(_PAD)})  # noqa: SIM118 - not a dictionary
    if missing := [name for name in wanted if name not in file_of]:
        raise UserError(f"{folder} lacks {some(missing)}: the files are incomplete or config.json belongs to another model")
    if unexpected := [name for name in file_of if name not in wanted]:
        raise UserError(f"{folder} has {some(unexpected)} that config.json does not account for: is it another model's?")
    for name, (dtype, shape) in wanted.items():
        stored = file_of[name].get_slice(name)
        found, due = f"{stored.get_dtype()} {list(stored.get_shape())}", f"{_NAMES[dtype]} {list(shape)}"
        if found != due:
            raise UserError(f"{folder}: {name} is {found}, but config.json makes it {due}")
    parts: dict[str, PackedMatrix | Tensor] = {}
    for name, part in plan.items():
        arrays = {field: file_of[_entry(name, field)].get_tensor(_entry(name, field)) for field in part.arrays()}
        parts[name] = part.assemble({field: _aligned(array) for field, array in arrays.items()})
        if not part.is_matrix and name != EMBEDDING and not arrays[""].isfinite().all():
            raise UserError(f"{folder}: {name} holds NaN or infinite numbers: the file is damaged")
    return Weights(config, scheme, parts)


def dequantized(
    config: ModelConfig, parts: dict[str, PackedMatrix | Tensor], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """The model whose weights are exactly what `parts` stand for (rounded to `dtype`).

    An output head that was tied to the embedding, and has been rounded otherwise, is one of its own from here on.
    """
    if config.tie_word_embeddings and not _plain(parts[HEAD]).to(dtype).equal(_plain(parts[EMBEDDING]).to(dtype)):
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        empty = Transformer(config)

    def fill(model: Transformer) -> None:
        for name, target in model.state_dict().items():
            module = name.removesuffix(".weight")
            if module.endswith(".kv_b_proj"):
                attention = module.removesuffix(".kv_b_proj")
                target.copy_(join_kv_up(_plain(parts[f"{attention}.k_up"]), _plain(parts[f"{attention}.v_up"])))
            else:
                source = parts.get(name, parts.get(module))
                assert source is not None, name
                if source.nbytes and target.ndim > 2:  # experts one by one
                    assert isinstance(source, PackedMatrix)
                    for e, expert in enumerate(target):
                        expert.copy_(unpack(slice_part(source, e)))
                else:
                    target.copy_(_plain(source))

    return fill_model(empty, dtype, device, fill)


def slice_part(matrix: PackedMatrix, index: int) -> PackedMatrix:
    """One matrix of a stack."""
    part = {name: array[index] for name, array in arrays_of(matrix).items()}
    return PackedMatrix(matrix.format, matrix.rows, matrix.columns, part["data"], part.get("scales"), matrix.group)


def _plain(part: PackedMatrix | Tensor) -> Tensor:
    return part if isinstance(part, Tensor) else unpack(part)


def _entry(name: str, field: str) -> str:
    return f"{name}.{field}" if field else name


def _entries(plan: dict[str, Part]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every array in the files, by its name there."""
    return {_entry(name, field): array for name, part in plan.items() for field, array in part.arrays().items()}


def _header(plan: dict[str, Part]) -> tuple[bytes, int]:
    """The beginning of a safetensors file up to its data, padded to whole lines of 64 bytes, and its length.

    The format allows no gaps between arrays, so that bytes between them are arrays as well (`padding.N`).
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in _entries(plan).items():
        size = dtype.itemsize * math.prod(shape)
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
        if short := -offset % ALIGNMENT:
            content[f"{_PAD}{len(content)}"] = {"dtype": "U8", "shape": [short], "data_offsets": [offset, offset + short]}
            offset += short
    text = json.dumps(content).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


def _write_array(out: BinaryIO, array: Tensor, data_offset: int) -> None:
    out.write(array.contiguous().flatten().view(torch.uint8).numpy().data)
    out.write(bytes(-(out.tell() - data_offset) % ALIGNMENT))


def _aligned(array: Tensor) -> Tensor:
    """The array itself where it lies at a multiple of 64 bytes, as in every file that we write; else a copy that does."""
    if array.data_ptr() % ALIGNMENT == 0 or not array.numel():
        return array
    room = torch.empty(array.nbytes + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).view(array.shape)
    return copy.copy_(array)
