"""A learned mixture of a layer's input and the embedding, so that no layer has to carry the token along (as in public speed runs)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EmbeddingSkip(nn.Module):
    """Weights [2] of the stream and of the embedding; they start as (1, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0]))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to where it starts."""
        self.weight.copy_(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        """Both `[B, T, D]`."""
        return self.weight[0] * x + self.weight[1] * start
