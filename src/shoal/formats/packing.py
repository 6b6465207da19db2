"""The weights of a Hugging Face folder, packed part by part as the engine wants them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from ..config import ModelConfig
from ..kernels.packed import PackedMatrix, pack_floats, pack_integers
from ..numerics.grouped import Grouped, quantize
from .parts import DTYPES, EMBEDDING, HEAD, Part, arrays_of, split_kv_up
from .weight_files import WeightFiles

CHUNK = 1 << 22
"""Weights that are packed at once: what packing needs besides its result stays small beside any large tensor."""

_EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")


def pack(weight: Tensor, part: Part) -> PackedMatrix | Tensor:
    """`weight [..., O, I]` (or a small tensor) in the number format of its part; scales by least squares, rounding to nearest."""
    packed = part.empty()
    fill(packed, weight, part)
    return part.assemble(packed)


def fill(target: dict[str, Tensor], weight: Tensor, part: Part) -> None:
    """Write `weight` into the arrays of a part (`Part.empty`), some rows at a time."""
    if not part.is_matrix:
        target[""].copy_(weight)
        return
    if weight.ndim > 2:
        for e in range(len(weight)):
            fill({name: array[e] for name, array in target.items()}, weight[e], part)
        return
    step = max(16, CHUNK // weight.shape[-1] // 16 * 16)
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        matrix = pack_floats(rows, part.format) if part.format in DTYPES else pack_grouped(_quantized(rows, part))  # type: ignore[arg-type]
        tiles = slice(start // 16, start // 16 + matrix.data.shape[0])
        for name, array in arrays_of(matrix).items():
            target[name][tiles] = array


def pack_grouped(matrix: Grouped) -> PackedMatrix:
    """A quantized matrix in tiles."""
    format = "int4" if matrix.bits == 4 else "int8"
    return pack_integers(format, matrix.quants, matrix.scales, matrix.mins, group=matrix.group, columns=matrix.columns)  # type: ignore[arg-type]


def _quantized(rows: Tensor, part: Part) -> Grouped:
    return quantize(rows, 4 if part.format == "int4" else 8, part.group, mins=part.mins)


def read_part(files: WeightFiles, name: str, config: ModelConfig) -> Iterator[Tensor]:
    """The official weights of a part: one tensor, or one `[O, I]` after the other for the experts of a stack."""
    stacked = _EXPERTS.fullmatch(name)
    if stacked:
        assert config.n_routed_experts
        for e in range(config.n_routed_experts):
            yield files.read(f"{stacked[1]}.{e}.{stacked[2]}.weight")
    elif name.endswith((".k_up", ".v_up")):
        both = files.read(f"{name.rpartition('.')[0]}.kv_b_proj.weight")
        yield split_kv_up(both, config)[name.endswith(".v_up")]
    elif name == HEAD:
        yield files.read(EMBEDDING if config.tie_word_embeddings else f"{HEAD}.weight")
    elif name in files.file_of:
        yield files.read(name)
    else:
        yield files.read(f"{name}.weight")


def pack_files(files: WeightFiles, config: ModelConfig, parts: dict[str, Part]) -> Iterator[tuple[str, PackedMatrix | Tensor]]:
    """Every part of a model, packed. One official tensor is in memory at a time, besides the part being built."""
    for name, part in parts.items():
        target = part.empty()
        for e, weight in enumerate(read_part(files, name, config)):
            stacked = _EXPERTS.fullmatch(name) is not None
            fill({field: array[e] for field, array in target.items()} if stacked else target, weight, part)
        yield name, part.assemble(target)
