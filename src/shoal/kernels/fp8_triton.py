"""Block-scaled FP8 in Triton: the quantizer of 1x128 tiles and the product that promotes its partial sums every 128 columns.

Specification: `numerics.fp8`, to whose bits scales and FP8 numbers are equal. Runs on GPUs that multiply FP8 (compute capability 8.9 and
up), and anywhere in Triton's interpreter (TRITON_INTERPRET=1). Imported only where it is used.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# Arguments of Triton's functions have types of its own.
import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
ROWS, OUTPUTS = 64, 128
"""Of one program of the product."""


@triton.jit
def _quantize_tiles(x, data, scales, rows, columns, tiles, ROWS: tl.constexpr, TILE: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # Not approximated: the scale and the quotient are those of IEEE division everywhere.
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value), axis=1), 448.0), 1.1754943508222875e-38)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = (((bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)  # mantissa 0, exponent rounded up
    scale = tl.where(tl.max((value != value).to(tl.int32), axis=1) > 0, float("nan"), scale)  # which maxima pass over
    quotient = tl.div_rn(value, tl.broadcast_to(scale[:, None], (ROWS, TILE)))
    # Rounded to nearest, ties to even, here: what a conversion does with numbers that E4M3 holds is the same everywhere.
    size = tl.abs(quotient)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)  # three bits of mantissa
    size = tl.where(size < 0.015625, (size + 24576.0) - 24576.0, normal)  # below 2^-6 steps of 2^-9
    quotient = tl.where(quotient < 0, -size, size)
    tl.store(data + at, quotient.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row.to(tl.int64) * tiles + tl.program_id(1), scale, mask=row < rows)


@triton.jit
def _product(
    a, a_scales, b, b_scales, y, rows, outputs, summed,
    a_row, a_column, b_row, b_column, a_scale_row, a_scale_tile, b_scale_row, b_scale_tile,
    B_GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, TILE)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for t in range(tl.cdiv(summed, TILE)):
        column = t * TILE + k
        left_mask = (row[:, None] < rows) & (column[None, :] < summed)
        right_mask = (output[None, :] < outputs) & (column[:, None] < summed)
        left = tl.load(a + row[:, None].to(tl.int64) * a_row + column[None, :].to(tl.int64) * a_column, mask=left_mask, other=0.0)
        right = tl.load(b + output[None, :].to(tl.int64) * b_row + column[:, None].to(tl.int64) * b_column, mask=right_mask, other=0.0)
        left_scale = tl.load(a_scales + row * a_scale_row + t * a_scale_tile, mask=row < rows, other=0.0)
        right_scale = tl.load(b_scales + output // B_GROUP * b_scale_row + t * b_scale_tile, mask=output < outputs, other=0.0)
        total += tl.dot(left, right) * left_scale[:, None] * right_scale[None, :]
    at = row[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(y + at, total, mask=(row[:, None] < rows) & (output[None, :] < outputs))


def quantize_tiles(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`x [R, K]` -> float8_e4m3fn `[R, K]` and scales `[R, ceil(K / 128)]`."""
    rows, columns = x.shape
    tiles = triton.cdiv(columns, TILE)
    data = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scales = x.new_empty(rows, tiles, dtype=torch.float32)
    if rows:
        grid = (triton.cdiv(rows, 16), tiles)
        _quantize_tiles[grid](x.contiguous(), data, scales, rows, columns, tiles, ROWS=16, TILE=TILE, POWER_OF_TWO=power_of_two)
    return data, scales


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_group: int) -> Tensor:
    """`a [R, K]` times `b [O, K]` transposed -> `[R, O]` fp32; both float8_e4m3fn, with any strides.

    `a_scales [R, T]` are of tiles of 128 columns, `b_scales [ceil(O / b_group), T]` of blocks of `b_group` rows and 128 columns.
    """
    rows, outputs = len(a), len(b)
    y = a.new_empty(rows, outputs, dtype=torch.float32)
    if rows:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(outputs, OUTPUTS))
        strides = (*a.stride(), *b.stride(), *a_scales.stride(), *b_scales.stride())
        sizes = (rows, outputs, a.shape[1])
        _product[grid](a, a_scales, b, b_scales, y, *sizes, *strides, B_GROUP=b_group, ROWS=ROWS, OUTPUTS=OUTPUTS, TILE=TILE)
    return y
