"""Models with random weights, made directly in 4 bits: a 16B-parameter model never exists in floating point.

Every tensor is drawn from its own generator, so that any program gets the same weights from the same name, in whatever layout it needs.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..config import ModelConfig, UserError
from ..formats.gguf import BLOCK, import_gguf, stored_type, write
from ..formats.gguf_layout import GgufTensor, add_shape, architecture, gguf_obstacles, tensors
from ..formats.packing import pack
from ..formats.parts import EMBEDDING, Part, Scheme, arrays_of, parts_of
from ..formats.quantized import write_quantized
from ..kernels.packed import ZERO_POINT, PackedMatrix, pack_integers

_UNIFORM_SPREAD = (16**2 / 12) ** 0.5
"""Standard deviation of the 16 quants."""


def generator(name: str) -> np.random.Generator:
    """The source of the tensor `name`'s weights."""
    return np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))


def random_q4(draw: np.random.Generator, rows: int, columns: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights `scale * (q - 8)` of standard deviation 1 / sqrt(columns), in groups of `group` columns.

    Returns scales fp16 `[rows, groups]` and q uint8 `[rows, columns / 2]`, two to a byte as GGML has them: within its block of 32, byte j
    holds column j in its low half and column j + 16 in its high half. The signs of the scales are random, so that the weights have no mean.
    """
    groups = -(-columns // group)
    size = columns**-0.5 / _UNIFORM_SPREAD * (0.75 + 0.5 * draw.random((rows, groups), dtype=np.float32))
    signs = draw.integers(0, 2, (rows, groups), dtype=np.int8) * 2 - 1
    quants = np.frombuffer(draw.bytes(rows * columns // 2), dtype=np.uint8).reshape(rows, columns // 2)
    return (size * signs).astype(np.float16), quants


def random_floats(tensor: GgufTensor) -> np.ndarray:
    """The weights of a tensor that stays in floating point: norms are 1, the rest has standard deviation 1 / sqrt(columns).

    The routing bias is small, so that the scores decide.
    """
    if len(tensor.shape) == 1 and not tensor.name.endswith(".bias"):
        return np.ones(tensor.shape, dtype=np.float32)
    weights = generator(tensor.name).standard_normal(tensor.shape, dtype=np.float32)
    return weights * np.float32(0.02 if len(tensor.shape) == 1 else tensor.shape[-1] ** -0.5)


def write_random_gguf(config: ModelConfig, out: Path, group: int) -> None:
    """Write a q4_0 file of this shape, without a vocabulary. `group / 32` neighbouring blocks have the same scale."""
    gguf = import_gguf()
    obstacles = gguf_obstacles(config)
    if obstacles:
        raise UserError(f"llama.cpp cannot run this shape: {'; '.join(obstacles)}")
    writer = gguf.GGUFWriter(path=None, arch=architecture(config))
    writer.add_name(out.stem)
    add_shape(writer, config)
    writer.add_tokenizer_model("no_vocab")
    plan = list(tensors(config))
    write(writer, out, config, plan, ((tensor, _pieces(tensor, group)) for tensor in plan), "q4_0")


def write_random_folder(config: ModelConfig, scheme: Scheme, folder: Path) -> None:
    """Write a quantized folder of the same weights that `write_random_gguf` writes for the scheme's groups, without a tokenizer.

    A 4-bit weight that `scheme` holds in 8 bits keeps its value; one that it holds in floating point is rounded.
    """
    origin = {_part_name(tensor): tensor for tensor in tensors(config)}
    plan = parts_of(config, scheme)
    write_quantized(folder, config, scheme, ((name, _part(origin[name], part, scheme.group)) for name, part in plan.items()), None)


def _part_name(tensor: GgufTensor) -> str:
    """What a quantized folder calls a tensor of a GGUF file (see `formats.parts`)."""
    name = re.sub(r"\.experts\.\d+\.(\w+)\.weight$", r".experts.\1", tensor.sources[0])
    if tensor.treatment in ("key_up", "value_up"):
        return name.replace("kv_b_proj.weight", tensor.treatment.replace("key", "k").replace("value", "v"))
    keeps_suffix = len(tensor.shape) == 1 or tensor.exact or name == EMBEDDING
    return name if keeps_suffix else name.removesuffix(".weight")


def _part(tensor: GgufTensor, part: Part, group: int) -> PackedMatrix | torch.Tensor:
    if stored_type(tensor, "q4_0").name != "Q4_0":
        return pack(torch.from_numpy(random_floats(tensor)), part)
    draw = generator(tensor.name)
    rows, columns = tensor.shape[-2:]
    arrays = part.empty()
    leading = tensor.shape[:-2]
    for index in np.ndindex(*leading):
        scales, halves = random_q4(draw, rows, columns, group)
        split = halves.reshape(rows, columns // BLOCK, 1, BLOCK // 2)
        quants = torch.from_numpy(np.concatenate([split & 15, split >> 4], axis=2).reshape(rows, columns))
        matrix = _in_part(part, quants, torch.from_numpy(scales), group)
        fields = arrays_of(matrix)
        for name, array in arrays.items():
            array[index] = fields[name]
    return part.assemble(arrays)


def _in_part(part: Part, quants: torch.Tensor, scales: torch.Tensor, group: int) -> PackedMatrix | torch.Tensor:
    """4-bit weights in the number format of `part`."""
    rows, columns = quants.shape
    quants = F.pad(quants, (0, -columns % group), value=ZERO_POINT["int4"])
    if part.is_matrix and part.format in ("int4", "int8"):
        shift = ZERO_POINT[part.format] - ZERO_POINT["int4"]
        return pack_integers(part.format, quants + shift, scales, group=group, columns=columns)
    weight = (quants.float() - ZERO_POINT["int4"]).unflatten(-1, (-1, group)) * scales.float().unsqueeze(-1)
    return pack(weight.flatten(-2)[:, :columns], replace(part, shape=(rows, columns)))


def _pieces(tensor: GgufTensor, group: int) -> Iterator[np.ndarray]:
    if stored_type(tensor, "q4_0").name != "Q4_0":
        yield random_floats(tensor)
        return
    draw = generator(tensor.name)
    rows, columns = tensor.shape[-2:]
    for _ in range(int(np.prod(tensor.shape[:-2]))):
        scales, quants = random_q4(draw, rows, columns, group)
        blocks = np.empty((rows, columns // BLOCK, 2 + BLOCK // 2), dtype=np.uint8)
        blocks[..., :2] = scales.repeat(group // BLOCK, axis=1)[:, : columns // BLOCK, None].view(np.uint8)
        blocks[..., 2:] = quants.reshape(rows, columns // BLOCK, BLOCK // 2)
        yield blocks
