"""The small parts every block is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels


class Linear(nn.Linear):
    """A linear layer whose products take the fastest kernel.

    Other number formats are classes derived from it, which whoever trains or serves in them gives to the layers of a finished model.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)

    def matrix(self) -> Tensor:
        """What `forward` multiplies with, for those that multiply with parts of it."""
        return self.weight


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

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))
