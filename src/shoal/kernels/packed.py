"""Matrices in the layout that the engine's C++ kernels read: tiles of 16 rows, so that a vector register holds one value of each row.

Shapes: O rows (outputs), I columns (inputs), `...` leading dimensions (experts, heads). O is padded to whole tiles and I to whole groups,
with zeros. Byte order is that of this file, whatever processor reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TILE = 16
"""Rows of a tile."""

Format = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")
ZERO_POINT = {"int8": 128, "int4": 8}
"""The stored number that means 0."""


@dataclass(frozen=True)
class PackedMatrix:
    """Weights `[..., O, I]` of linear layers.

    A weight is `data` itself (fp32, bf16), or `scale * (q - ZERO_POINT)` (int8, int4) with one scale for `group` neighbouring columns.
    """

    format: Format
    rows: int
    columns: int
    data: Tensor
    """fp32, bf16: `[..., O/16, I, 16]`. int8: uint8 `[..., O/16, I/4, 64]`, byte 4r + j of line c is row r, column 4c + j. int4: uint8
    `[..., O/16, I/8, 64]`, byte 4r + j of line c is row r, column 8c + j in its low half and column 8c + 4 + j in its high half."""
    scales: Tensor | None = None
    """fp16 `[..., O/16, I/group, 16]`."""
    group: int = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales) if part is not None)

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions before O and I."""
        return tuple(self.data.shape[:-3])


def pack_floats(weight: Tensor, format: Literal["fp32", "bf16"]) -> PackedMatrix:
    """`weight [..., O, I]` in tiles, its numbers rounded to `format`."""
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    rows, columns = weight.shape[-2:]
    return PackedMatrix(format, rows, columns, _tiles(weight.to(dtype)).transpose(-1, -2).contiguous())


def pack_integers(
    format: Literal["int8", "int4"], quants: Tensor, scales: Tensor, *, group: int, columns: int | None = None
) -> PackedMatrix:
    """Quantized weights in tiles.

    Args:
        quants: uint8 `[..., O, I]` with I a multiple of `group`; below 16 for int4.
        scales: `[..., O, I/group]`.
        columns: I before it was padded to whole groups.
    """
    rows, padded = quants.shape[-2:]
    tiles = _tiles(quants)  # [..., O/16, 16, I]
    if format == "int8":
        data = tiles.unflatten(-1, (padded // 4, 4)).transpose(-3, -2).flatten(-2)
    else:
        low, high = tiles.unflatten(-1, (padded // 8, 2, 4)).unbind(-2)  # each [..., O/16, 16, I/8, 4]
        data = (low | (high << 4)).transpose(-3, -2).flatten(-2)
    halves = _tiles(scales.to(torch.float16)).transpose(-1, -2).contiguous()
    return PackedMatrix(format, rows, padded if columns is None else columns, data.contiguous(), halves, group)


def unpack_integers(matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """The `quants [..., O, I]` (I still padded to whole groups) and `scales` that `pack_integers` was given."""
    assert matrix.scales is not None
    lines = matrix.data.unflatten(-1, (TILE, 4))  # [..., O/16, line, 16, 4]
    if matrix.format == "int4":
        lines = torch.stack([lines & 15, lines >> 4], dim=-2)  # [..., O/16, line, 16, 2, 4]
        lines = lines.flatten(-2)
    quants = lines.transpose(-3, -2).flatten(-2)  # [..., O/16, 16, I]
    quants, scales = (x.flatten(-3, -2)[..., : matrix.rows, :] for x in (quants, matrix.scales.transpose(-1, -2)))
    return quants, scales


def unpack(matrix: PackedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights `[..., O, I]`; those of quantized formats exactly as the kernels understand them, rounded to `dtype`."""
    if matrix.format in ("fp32", "bf16"):
        return matrix.data.transpose(-1, -2).flatten(-3, -2)[..., : matrix.rows, :].to(dtype)
    quants, scales = unpack_integers(matrix)
    steps = scales.float().unsqueeze(-1)
    weight = quants.unflatten(-1, (-1, matrix.group)) * steps - ZERO_POINT[matrix.format] * steps
    return weight.flatten(-2)[..., : matrix.columns].to(dtype)


def _tiles(x: Tensor) -> Tensor:
    """`[..., O, C]` -> `[..., ceil(O/16), 16, C]`, padded with zeros."""
    short = -x.shape[-2] % TILE
    if short:
        x = torch.nn.functional.pad(x, (0, 0, 0, short))
    return x.unflatten(-2, (-1, TILE))
