"""Block-scaled FP8 (DeepSeek-V3, 2412.19437, section 3.3): E4M3 numbers that share a scale in tiles of 1x128 (activations and
gradients) or blocks of 128x128 (weights), and the products of a linear layer on them.

Scales are found while quantizing (online): the largest number of a tile becomes 448. Products take 128 columns of both sides at a time;
each partial sum is scaled and added in fp32 (promotion). GPUs that multiply FP8 run Triton kernels (`kernels.fp8_triton`). Elsewhere the
same is simulated: the same operands, held as fp32 numbers that E4M3 can represent, added in the same blocks.

Shapes: R rows, K summed columns, O outputs, E groups (experts); a trailing tile or block may be partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .. import kernels
from ..config import UserError
from ..kernels.selection import multiplies_fp8

TILE = 128
FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""
PARTIAL_SUMS = 1 << 21
"""Numbers of partial weight gradients that exist at a time: few enough to stay in the cache."""


@dataclass(frozen=True)
class Quantized:
    """FP8 numbers and their scales."""

    data: Tensor
    """float8_e4m3fn: `[R, K]`, or weights `[..., O, K]`."""
    scales: Tensor
    """fp32: `[R, ceil(K / 128)]` of tiles, `[..., ceil(O / 128), ceil(K / 128)]` of blocks."""


def scales_of(largest: Tensor, power_of_two: bool) -> Tensor:
    """The scale with which `largest` (at least 0) becomes 448, or, as a power of two, the least with which it does not exceed that."""
    scale = (largest.float() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, 0.5 <= mantissa < 1
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(scale.isfinite(), rounded, scale)


def quantize_tiles(x: Tensor, *, power_of_two: bool = False) -> Quantized:
    """Rows `x [R, K]` in tiles of 1x128. What is not finite gives a scale that is not finite."""
    if triton := _gpu_kernels(x):
        return Quantized(*triton.quantize_tiles(x, power_of_two))
    tiles = _in_tiles(x.float(), -1)
    scales = scales_of(tiles.abs().amax(-1), power_of_two)
    data = (tiles / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return Quantized(data.flatten(-2)[..., : x.shape[-1]].contiguous(), scales)


def quantize_blocks(weight: Tensor, *, power_of_two: bool = False) -> Quantized:
    """`weight [..., O, K]` in blocks of 128x128, as the official files hold it."""
    blocks = _in_tiles(_in_tiles(weight.float(), -1), -3)  # [..., O / 128, 128, K / 128, 128]
    scales = scales_of(blocks.abs().amax((-3, -1)), power_of_two)
    data = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    rows, columns = weight.shape[-2:]
    return Quantized(data.flatten(-4, -3).flatten(-2)[..., :rows, :columns].contiguous(), scales)


def dequantize_tiles(x: Quantized) -> Tensor:
    """`[R, K]` fp32."""
    return decode(x.data).mul_(x.scales.repeat_interleave(TILE, -1)[..., : x.data.shape[-1]])


def dequantize_blocks(
    weight: Tensor, scale_inv: Tensor, *, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.float32
) -> Tensor:
    """`weight [O, I]` (float8_e4m3fn) times the scale of its block -> `[O, I]` in `dtype`.

    `scale_inv [ceil(O / block[0]), ceil(I / block[1])]` is what to multiply by, despite its name in the files; blocks on
    the right and lower edge may be partial. Raises `UserError` when the two shapes do not belong together.
    """
    rows, columns = weight.shape
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale_inv.shape) != blocks:
        raise UserError(
            f"FP8 scales have shape {list(scale_inv.shape)}, but {rows} x {columns} weights in blocks of {block[0]} x {block[1]} "
            f"need {list(blocks)}: check weight_block_size in config.json"
        )
    scale = scale_inv.to(torch.float32).repeat_interleave(block[1], 1)[:, :columns]
    out = weight.to(torch.float32)
    for i, row_scale in enumerate(scale):  # block rows one by one: the expanded scales never exist for the whole matrix
        out[i * block[0] : (i + 1) * block[0]] *= row_scale
    return out.to(dtype)


def decode(numbers: Tensor) -> Tensor:
    """float8_e4m3fn, or bytes that hold it (none of them NaN), as fp32; on a CPU several times as fast as torch's conversion."""
    wide = numbers.view(torch.uint8).to(torch.int16)
    # float16 has three mantissa bits at its top and an exponent whose bias is larger by 8.
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).view(torch.float16).float().mul_(2**8)


def product(x: Quantized, weight: Quantized, offsets: Tensor | None = None) -> Tensor:
    """`x [R, K]` (tiles) times `weight [O, K]` (blocks) transposed -> `[R, O]` fp32.

    With `offsets [E]`, where the rows of every group end, each group of rows has a weight of its own in `weight [E, O, K]`.
    """
    return _product(x, weight.data, weight.scales, offsets)


def input_gradient(grad: Quantized, weight: Quantized, offsets: Tensor | None = None) -> Tensor:
    """`grad [R, O]` (tiles) times `weight [O, K]` (blocks) -> `[R, K]` fp32; groups as for `product`."""
    return _product(grad, weight.data.mT, weight.scales.mT, offsets)


def _product(x: Quantized, weight: Tensor, weight_scales: Tensor, offsets: Tensor | None) -> Tensor:
    if triton := _gpu_kernels(x.data):
        if offsets is None:
            return triton.product(x.data, x.scales, weight, weight_scales, TILE)
        sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        sides = zip(x.data.split(sizes), x.scales.split(sizes), weight, weight_scales, strict=True)
        return torch.cat([triton.product(*side, TILE) for side in sides])
    values, weight, outputs = decode(x.data), decode(weight), weight.shape[-2]
    group = None if offsets is None else _group_of_rows(offsets, len(values))
    total: Tensor | None = None
    for t, (left, right) in enumerate(zip(values.split(TILE, -1), weight.split(TILE, -1), strict=True)):
        part = left @ right.T if offsets is None else kernels.grouped_linear(left, right, offsets)
        scales = weight_scales[..., t].repeat_interleave(TILE, -1)[..., :outputs]  # [O] or [E, O]
        part.mul_(x.scales[:, t, None]).mul_(scales if group is None else scales.index_select(0, group))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def weight_gradient(grad: Tensor, x: Tensor, *, power_of_two: bool = False, offsets: Tensor | None = None) -> Tensor:
    """`grad [R, O]` transposed times `x [R, K]`, both in tiles of 128 rows of one column -> `[O, K]` fp32, or `[E, O, K]`.

    The sum runs over rows, so these are the tiles along the sum; every group's tiles begin with its first row.
    """
    if triton := _gpu_kernels(x):
        sizes = [len(x)] if offsets is None else offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        pairs = zip(grad.split(sizes), x.split(sizes), strict=True)
        tiles = (tuple(triton.quantize_tiles(side.T, power_of_two) for side in pair) for pair in pairs)
        each = [triton.product(*left, *right, 1) for left, right in tiles]
        return each[0] if offsets is None else torch.stack(each)
    group: Tensor | None = None
    if offsets is not None:
        grad, x, group = _pad_groups(grad, x, offsets)
    left, right = (_quantize_columns(side, power_of_two) for side in (grad, x))  # data [tiles, 128, C], scales [tiles, C]
    outputs, columns = grad.shape[1], x.shape[1]
    total = grad.new_zeros(1 if offsets is None else len(offsets), outputs, columns, dtype=torch.float32)
    owners = [0] * len(left.data) if group is None else group.tolist()
    step = max(1, PARTIAL_SUMS // (outputs * columns))
    for first in range(0, len(left.data), step):
        last = first + step
        parts = torch.bmm(decode(left.data[first:last]).mT, decode(right.data[first:last]))
        parts.mul_(left.scales[first:last].unsqueeze(-1)).mul_(right.scales[first:last].unsqueeze(-2))
        for owner, part in zip(owners[first:last], parts, strict=True):
            total[owner].add_(part)
    return total[0] if offsets is None else total


def snap_to_blocks(grad: Tensor) -> Tensor:
    """`grad [R, O]` rounded to FP8 with one scale, a power of two, for 128x128 numbers, as fp32.

    This is what V3 found to harm training (appendix B.2); experiments use it as a negative control. Tiles of 1x128 hold the result exactly.
    """
    blocks = quantize_blocks(grad, power_of_two=True)
    scales = blocks.scales.repeat_interleave(TILE, 0)[: len(grad)]
    return dequantize_tiles(Quantized(blocks.data, scales))


def _gpu_kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels where `x` lies on a GPU that multiplies FP8."""
    if not multiplies_fp8(x.device):
        return None
    from ..kernels import fp8_triton

    return fp8_triton


def _in_tiles(x: Tensor, dim: int) -> Tensor:
    """Dimension `dim` (negative) as two, `[.., tiles, 128, ..]`; as `[.., 1, size, ..]` where it is shorter than a tile, but not empty."""
    size = x.shape[dim]
    if 0 < size <= TILE:
        return x.unsqueeze(dim - 1)
    short = -size % TILE
    if short:
        x = torch.nn.functional.pad(x, (0, 0) * (-dim - 1) + (0, short))
    return x.unflatten(dim, (x.shape[dim] // TILE, TILE))


def _quantize_columns(x: Tensor, power_of_two: bool) -> Quantized:
    """`x [R, C]` in tiles of 128x1: data `[tiles, 128, C]`, scales `[tiles, C]`."""
    tiles = _in_tiles(x.float(), -2)
    scales = scales_of(tiles.abs().amax(-2), power_of_two)
    return Quantized((tiles / scales.unsqueeze(-2)).to(torch.float8_e4m3fn), scales)


def _group_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """The group of every row, `[R]`."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)


def _pad_groups(grad: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with zero rows after every group, up to whole tiles; and the group of every tile."""
    ends = offsets.long()
    sizes = ends.diff(prepend=ends.new_zeros(1))
    tiles = (sizes + TILE - 1) // TILE
    shift = (tiles.cumsum(0) - tiles) * TILE - (ends - sizes)  # of each group's first row
    rows = torch.arange(len(x), device=x.device)
    place = rows + shift.index_select(0, _group_of_rows(offsets, len(x)))
    count = int(tiles.sum()) * TILE
    padded = [side.new_zeros(count, side.shape[1]).index_copy_(0, place, side) for side in (grad, x)]
    return padded[0], padded[1], torch.arange(len(tiles), device=x.device).repeat_interleave(tiles)
