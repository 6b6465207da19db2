"""What only the engine runs: products with packed matrices, and the C++ decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from .packed import PackedMatrix
from .selection import BACKEND


def packed_linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """`x [N, I]` times packed weights `[..., O, I]` -> `[..., N, O]`, fp32.

    With quantized weights the activations are quantized too: to int8 per row and group, scale max|x| / 127. Products are summed exactly
    within a group and in fp32 over the groups, in an order that does not depend on N. A row with an infinity or NaN gives NaN.
    """
    if BACKEND.cpu is None:
        return reference.packed_linear(x, matrix)
    y = torch.empty(*matrix.leading, x.shape[0], matrix.rows)
    BACKEND.module.packed_linear(BACKEND.isa, matrix, x.contiguous(), y, torch.get_num_threads())
    return y


def decoder(shape: dict[str, Any], top: dict[str, Any], layers: list[dict[str, Any]], main_layers: int) -> Any | None:
    """The C++ decoder over packed weights (csrc/decoder_module.cpp), or None without C++ kernels."""
    if BACKEND.cpu is None:
        return None
    return BACKEND.module.Decoder(BACKEND.isa, shape, top, layers, main_layers)


def draw_rows(table: np.ndarray, rows: Sequence[int], temperatures: Sequence[float], starts: Sequence[int]) -> list[int] | None:
    """A token of each of these rows of logits `table [M, V]` fp32, as `engine.race.draw` specifies it: -1 where the row has no finite
    maximum. `starts`: where the random numbers of each begin. None without C++ kernels."""
    if BACKEND.cpu is None:
        return None
    drawn: list[int] = BACKEND.cpu.draw(torch.from_numpy(table), rows, temperatures, starts, torch.get_num_threads())
    return drawn


def pin_threads(cores: list[int]) -> None:
    """Bind the calling thread and those with which it runs the decoder to one core each."""
    BACKEND.module.pin_threads(cores)
