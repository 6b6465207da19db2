"""FP8 weights with one scale per block, as in the official DeepSeek-V3 files (2412.19437, section 3.3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import UserError


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
