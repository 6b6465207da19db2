"""`shoal export --format gguf`: one file that llama.cpp loads, with the same weights, tokenizer and chat template.

The file is written tensor by tensor, so that no more than one (quantized) tensor of it is in memory; it appears under its name when it
is whole. MTP layers become llama.cpp's `nextn` blocks, which it skips unless it is asked to draft with them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ..atomic import new_file
from ..config import ModelConfig, UserError
from ..model.rope import inverse_frequencies, scaling_kind
from .export import chat_template_for
from .gguf_layout import GgufTensor, add_shape, architecture, gguf_obstacles, tensors
from .gguf_tokenizer import TokenizerFiles, add_tokenizer
from .huggingface import open_model
from .parts import split_kv_up

GgufType = Literal["f32", "f16", "q8_0", "q4_0"]
BLOCK = 32
"""Neighbouring columns that share a scale in q8_0 and q4_0."""
MAGIC = b"GGUF"
_HEADER_ROOM = 64 << 20


def export_gguf(folder: Path, tokenizer: TokenizerFiles | None, out: Path, dtype: GgufType) -> ModelConfig:
    """Write the model of a Hugging Face-style folder to the file `out`; returns its shape.

    Matrices become `dtype`, except that those whose rows do not divide into blocks stay f16; norms, routers and biases stay fp32.
    Without a `tokenizer` the file has no vocabulary. An earlier GGUF file at `out` is replaced.

    Raises `UserError` when something else is there, when the disk is too full, and for models and tokenizers that llama.cpp would read
    differently.
    """
    gguf = import_gguf()
    check_target(out)
    with open_model(folder) as (model, files):
        config = model.config
        obstacles = gguf_obstacles(config)
        if obstacles:
            raise UserError(f"this model cannot become a GGUF file that llama.cpp runs as Shoal does: {'; '.join(obstacles)}")
        plan = list(tensors(config))
        writer = gguf.GGUFWriter(path=None, arch=architecture(config))
        writer.add_name(out.stem)
        add_shape(writer, config)
        if tokenizer is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            add_tokenizer(writer, tokenizer, config.vocab_size, chat_template_for(tokenizer.json))
        data = ((tensor, _pieces(tensor, files, config)) for tensor in plan)
        write(writer, out, config, plan, data, dtype)
    return config


def import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("--format gguf needs the gguf package: pip install 'shoal[export]'") from None
    return gguf


def check_target(out: Path) -> None:
    """Refuse to write over anything but an earlier GGUF file."""
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder: create it, or name another place for {out.name}")
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file to write, such as {out / 'model.gguf'}")
    if out.exists():
        with out.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{out} exists and is no GGUF file: choose another name")


def stored_type(tensor: GgufTensor, dtype: GgufType) -> Any:
    """The `gguf.GGMLQuantizationType` that a tensor gets in a file of type `dtype`."""
    from gguf import GGMLQuantizationType as Type

    if tensor.exact or len(tensor.shape) == 1 or dtype == "f32":
        return Type.F32
    if dtype == "f16" or tensor.shape[-1] % BLOCK:
        return Type.F16
    return {"q8_0": Type.Q8_0, "q4_0": Type.Q4_0}[dtype]


def write(
    writer: Any,
    out: Path,
    config: ModelConfig,
    plan: list[GgufTensor],
    data: Iterator[tuple[GgufTensor, Iterator[np.ndarray]]],
    dtype: GgufType,
) -> None:
    """Write the file: `writer` already holds the metadata; `data` brings for every tensor of `plan`, in order, its leading slices.

    A slice is fp32, to be converted, or uint8: blocks of the stored type, as they go into the file.
    """
    gguf = import_gguf()
    factors = _rope_factors(config)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    total = 0
    for tensor in plan:
        kind = stored_type(tensor, dtype)
        size = byte_size(tensor.shape, kind)
        total += size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    free = shutil.disk_usage(out.parent).free
    if free < total + _HEADER_ROOM:
        raise UserError(f"{out} takes {total / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there")
    with new_file(out) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, slices in data:
            writer.write_tensor_data(_stored(tensor, slices, stored_type(tensor, dtype)))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()


def byte_size(shape: tuple[int, ...], kind: Any) -> int:
    """Bytes of a tensor in a GGML type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def _stored(tensor: GgufTensor, slices: Iterator[np.ndarray], kind: Any) -> np.ndarray:
    """The bytes of a tensor, filled slice by slice so that only one is there in fp32."""
    import gguf

    whole = np.empty(byte_size(tensor.shape, kind), dtype=np.uint8)
    filled = 0
    for piece in slices:
        if piece.dtype != np.uint8:
            with np.errstate(over="ignore"):
                piece = gguf.quants.quantize(np.ascontiguousarray(piece), kind)
            if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(piece).all():
                raise UserError(f"{tensor.sources[0]} holds numbers beyond 65504, which f16 cannot: the model cannot be written to GGUF")
        flat = piece.reshape(-1).view(np.uint8)
        whole[filled : filled + flat.size] = flat
        filled += flat.size
    assert filled == whole.size, f"{tensor.name}: {filled} bytes instead of {whole.size}"
    return whole


def _pieces(tensor: GgufTensor, files: Any, config: ModelConfig) -> Iterator[np.ndarray]:
    for name in tensor.sources:
        yield _treated(tensor, files.read(name).float(), config).numpy()


def _treated(tensor: GgufTensor, weight: Tensor, config: ModelConfig) -> Tensor:
    if tensor.treatment in ("key_up", "value_up"):
        return split_kv_up(weight, config)[tensor.treatment == "value_up"]
    if tensor.treatment == "pairs":
        halves = weight.unflatten(0, (-1, 2, config.qk_head_dim // 2))  # [heads, half, pair, ...]
        return halves.transpose(1, 2).flatten(0, 2)
    return weight


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama3's scaling divides the frequencies by, `[rope_dim / 2]`: llama.cpp takes it from a tensor."""
    scaling = config.rope_scaling or {}
    if scaling_kind(scaling) != "llama3":
        return None
    plain = config.rope_theta ** -(torch.arange(0, config.rope_dim, 2, dtype=torch.float32) / config.rope_dim)
    return cast(np.ndarray, (plain / inverse_frequencies(config)).numpy())
