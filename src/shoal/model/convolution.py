"""Short causal convolution over time, every channel for itself (as before the projections of Mamba, 2312.00752, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """Adds to every token weighted copies of the `width` tokens before it; weights [D, width] start at zero, as the identity."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x [B, T, D]` at `positions [B or 1, T]`, of which no token sees beyond position 0 of its text."""
        mixed = x
        for back in range(1, self.weight.shape[1] + 1):
            earlier = nn.functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
            seen = (positions >= back).unsqueeze(-1)
            mixed = torch.addcmul(mixed, earlier, self.weight[:, back - 1] * seen)
        return mixed
