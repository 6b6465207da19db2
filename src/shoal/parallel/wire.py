"""What rows look like on their way between processes: exact, BF16, or FP8 in tiles of 1x128 (DeepSeek-V3, 2412.19437, section 3.3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..numerics.fp8 import TILE, decode, quantize_tiles

Format = Literal["exact", "bf16", "fp8"]


def pack(x: Tensor, format: Format) -> Tensor:
    """Rows `x [R, D]` as bytes, `[R, row_bytes(...)]`."""
    if format == "fp8":
        tiles = quantize_tiles(x)
        return torch.cat([tiles.scales.view(torch.uint8), tiles.data.view(torch.uint8)], dim=1)
    return x.to(torch.bfloat16 if format == "bf16" else x.dtype).contiguous().view(torch.uint8)


def unpack(packed: Tensor, format: Format, width: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `pack`, `[R, width]` in `dtype`, rounded as the format does."""
    if format == "fp8":
        scales_bytes = 4 * -(-width // TILE)
        scales = read(packed[:, :scales_bytes], torch.float32)
        numbers = torch.nn.functional.pad(decode(packed[:, scales_bytes:]), (0, -width % TILE))
        return (numbers.unflatten(1, (-1, TILE)) * scales.unsqueeze(-1)).flatten(1)[:, :width].to(dtype)
    return read(packed, torch.bfloat16 if format == "bf16" else dtype).to(dtype)


def read(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers `[R, C]` that lie in bytes `[R, B]`."""
    numbers = torch.empty(len(packed), packed.shape[1] // dtype.itemsize, dtype=dtype, device=packed.device)
    if numbers.numel():  # what is empty may have strides that do not divide
        numbers.view(torch.uint8).copy_(packed)
    return numbers


def row_bytes(width: int, format: Format, dtype: torch.dtype) -> int:
    """Bytes of a row of `width` values."""
    if format == "fp8":
        return width + 4 * -(-width // TILE)
    return width * (2 if format == "bf16" else dtype.itemsize)
