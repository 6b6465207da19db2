"""Short causal convolution over time, every channel for itself (as before the projections of Mamba, 2312.00752, section 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Behind:
    """A layer's cache that also keeps what its convolution reads, behind what attention keeps (see `LayerCache`)."""

    def __init__(self, cache: Any, inputs: Tensor, width: int) -> None:
        """`inputs [B, T, D]` are what the convolution gets of the new tokens; attention keeps `width` values of each."""
        self._cache, self._inputs, self._width = cache, inputs, width

    def history(self, positions: Tensor) -> Tensor:
        """Inputs `[B, S, D]` of everything so far, the new tokens included; what attention keeps of those is still to come."""
        empty = self._inputs.new_zeros(*self._inputs.shape[:2], self._width)
        return self._cache.extend(torch.cat([empty, self._inputs], dim=-1), positions)[..., self._width :]

    def extend(self, values: Tensor, positions: Tensor) -> Tensor:
        """See `LayerCache`."""
        return self._cache.extend(torch.cat([values, self._inputs], dim=-1), positions)[..., : self._width]


class ShortConvolution(nn.Module):
    """Adds to every token weighted copies of the `width` tokens before it; weights [D, width] start at zero, as the identity."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))

    def forward(self, x: Tensor, positions: Tensor, history: Tensor | None = None) -> Tensor:
        """`x [B, T, D]` at `positions [B or 1, T]`, of which no token sees beyond position 0 of its text.

        `history [B, S, D]` holds the inputs at all positions up to these; None: the T tokens are all there are.
        """
        mixed = x
        for back in range(1, self.weight.shape[1] + 1):
            seen = (positions >= back).unsqueeze(-1)
            if history is None:
                earlier = nn.functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
            else:
                earlier = history.gather(1, (positions - back).clamp(min=0).unsqueeze(-1).expand_as(x)).to(x.dtype)
            mixed = torch.addcmul(mixed, earlier, self.weight[:, back - 1] * seen)
        return mixed
