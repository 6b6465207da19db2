"""The weights of a Hugging Face folder, packed part by part as the engine wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..kernels.packed import TILE, PackedMatrix, pack_floats, pack_integers, unpack
from ..numerics.grouped import Bits, Grouped, quantize
from .parts import EMBEDDING, EXPERTS, HEAD, Part, arrays_of, split_kv_up
from .weight_files import WeightFiles

CHUNK = 1 << 20
"""Weights that are packed at once: what packing needs besides its result stays small beside any large tensor."""
BITS: dict[str, Bits] = {"int4": 4, "int8": 8}


@dataclass
class RoundingCost:
    """Squared error of some weights, and their squares, in all."""

    error: float = 0.0
    squares: float = 0.0

    def add(self, weight: Tensor, back: Tensor) -> None:
        self.error += float((back - weight).square().sum())
        self.squares += float(weight.square().sum())

    @property
    def share(self) -> float:
        return self.error / self.squares if self.squares else 0.0


def pack(weight: Tensor, part: Part) -> PackedMatrix | Tensor:
    """`weight [..., O, I]` (or a small tensor) in the number format of its part; scales by least squares, rounding to nearest."""
    packed = part.empty()
    fill(packed, weight, part)
    return part.assemble(packed)


def fill(target: dict[str, Tensor], weight: Tensor, part: Part, cost: RoundingCost | None = None) -> None:
    """Write `weight` into the arrays of a part (`Part.empty`), some rows at a time; count in `cost` what that changes."""
    if not part.is_matrix:
        target[""].copy_(weight)
        return
    if weight.ndim > 2:
        for e in range(len(weight)):
            fill({name: array[e] for name, array in target.items()}, weight[e], part, cost)
        return
    step = max(TILE, CHUNK // weight.shape[-1] // TILE * TILE)
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        if part.format in BITS:
            matrix = pack_grouped(quantize(rows, BITS[part.format], part.group))
        else:
            matrix = pack_floats(rows, part.format)  # type: ignore[arg-type]
        if cost is not None:
            cost.add(rows, unpack(matrix))
        tiles = slice(start // TILE, start // TILE + matrix.data.shape[0])
        for name, array in arrays_of(matrix).items():
            target[name][tiles] = array


def pack_grouped(matrix: Grouped) -> PackedMatrix:
    """A quantized matrix in tiles."""
    format = "int4" if matrix.bits == 4 else "int8"
    return pack_integers(format, matrix.quants, matrix.scales, group=matrix.group, columns=matrix.columns)  # type: ignore[arg-type]


def read_part(files: WeightFiles, name: str, config: ModelConfig) -> Iterator[Tensor]:
    """The official weights of a part: one tensor, or one `[O, I]` after the other for the experts of a stack."""
    stacked = EXPERTS.fullmatch(name)
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


def read_whole(files: WeightFiles, name: str, config: ModelConfig) -> Tensor:
    """The official weights of a part as one tensor; floats in fp32."""
    found = [tensor.float() if tensor.is_floating_point() else tensor for tensor in read_part(files, name, config)]
    return torch.stack(found) if EXPERTS.fullmatch(name) else found[0]


def pack_files(
    files: WeightFiles, config: ModelConfig, parts: dict[str, Part], packed: Callable[[str, RoundingCost], None] | None = None
) -> Iterator[tuple[str, PackedMatrix | Tensor]]:
    """Every part of a model, packed. One official tensor is in memory at a time, besides the part being built.

    `packed` is told of every part what rounding it has cost.
    """
    for name, part in parts.items():
        target, cost = part.empty(), RoundingCost() if packed else None
        stacked = EXPERTS.fullmatch(name) is not None
        for e, weight in enumerate(read_part(files, name, config)):
            fill({field: array[e] for field, array in target.items()} if stacked else target, weight, part, cost)
        if packed is not None and cost is not None:
            packed(name, cost)
        yield name, part.assemble(target)
