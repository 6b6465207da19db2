"""The small parts every block is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import kernels

LinearFactory = Callable[[int, int, bool], nn.Module]
"""Makes a linear layer from (in_features, out_features, bias); the number format of matrices is decided by who passes it in."""


class Linear(nn.Linear):
    """A linear layer whose products take the fastest kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)

    def matrix(self) -> Tensor:
        """What `forward` multiplies with, for those that multiply with parts of it."""
        return self.weight


def plain_linear(in_features: int, out_features: int, bias: bool = False) -> nn.Module:
    return Linear(in_features, out_features, bias=bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (1910.07467), in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class TokenTable(nn.Module):
    """A vector for every token, beside the embedding; starts at zero."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))

    def forward(self, ids: Tensor) -> Tensor:
        """`ids [...]` -> `[..., width]`."""
        return nn.functional.embedding(ids, self.weight)


class SwiGLU(nn.Module):
    """Gated feed-forward layer down(silu(gate(x)) * up(x)) (2002.05202): the dense layers and the shared experts."""

    def __init__(self, hidden_size: int, width: int, linear: LinearFactory) -> None:
        super().__init__()
        self.gate_proj = linear(hidden_size, width, False)
        self.up_proj = linear(hidden_size, width, False)
        self.down_proj = linear(width, hidden_size, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))
