"""What rows look like on their way between processes: exact, BF16, or FP8 in tiles of 1x128 (DeepSeek-V3, 2412.19437, section 3.3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Format = Literal["exact", "bf16", "fp8"]
TILE = 128
"""Neighbouring values of a row that share a scale."""
FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""


def pack(x: Tensor, format: Format) -> Tensor:
    """Rows `x [R, D]` as bytes, `[R, row_bytes(...)]`."""
    if format == "fp8":
        tiles = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
        scales = (tiles.abs().amax(-1) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)  # [R, tiles]
        numbers = (tiles / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(1)[:, : x.shape[1]]
        return torch.cat([scales.view(torch.uint8), numbers.contiguous().view(torch.uint8)], dim=1)
    return x.to(torch.bfloat16 if format == "bf16" else x.dtype).contiguous().view(torch.uint8)


def unpack(packed: Tensor, format: Format, width: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `pack`, `[R, width]` in `dtype`, rounded as the format does."""
    if format == "fp8":
        scales_bytes = 4 * -(-width // TILE)
        scales = read(packed[:, :scales_bytes], torch.float32)
        numbers = torch.nn.functional.pad(from_fp8(packed[:, scales_bytes:]), (0, -width % TILE))
        return (numbers.unflatten(1, (-1, TILE)) * scales.unsqueeze(-1)).flatten(1)[:, :width].to(dtype)
    return read(packed, torch.bfloat16 if format == "bf16" else dtype).to(dtype)


def from_fp8(packed: Tensor) -> Tensor:
    """Bytes that hold float8_e4m3fn (none of them NaN) as fp32; on a CPU several times as fast as torch's conversion."""
    wide = packed.to(torch.int16)
    # float16 has three mantissa bits at its top and an exponent whose bias is larger by 8.
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).view(torch.float16).float() * 2**8


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
