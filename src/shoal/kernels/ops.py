"""The hot operations. Each takes its fastest kernel for the tensors it is given; `reference` says what it computes.

All are deterministic: the same inputs on the same number of threads give the same bits, gradients included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (1910.07467), computed in fp32.

    Args:
        x: [..., D].
        weight: [D], or None for no weights.

    Returns:
        [..., D] in x's dtype.
    """
    return (cpu if cpu.runs(x, weight) else reference).rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (2002.05202); both and the result [..., F]."""
    return (cpu if cpu.runs(gate, up) else reference).swiglu(gate, up)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of channels by their position's angles (2104.09864); the result keeps the layout of the pairs.

    Args:
        x: [B, T, H, R].
        cos, sin: [B or 1, T, R/2].
        interleaved: pairs are (2i, 2i+1), as in DeepSeek checkpoints; otherwise (i, i + R/2), as in Llama.

    Returns:
        [B, T, H, R].
    """
    return (cpu if cpu.runs(x, cos, sin) else reference).apply_rope(x, cos, sin, interleaved)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v where each position sees itself and those before it. No cache: all share one T.

    Args:
        q: [B, T, H, Dk], any strides with a contiguous last dimension, as for k and v.
        k: [B, T, Hkv, Dk]; Hkv divides H, and each key head serves H / Hkv neighbouring query heads.
        v: [B, T, Hkv, Dv].

    Returns:
        [B, T, H, Dv].
    """
    return (cpu if cpu.runs(q, k, v) else reference).causal_attention(q, k, v, scale)


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the N*K (token, slot) pairs by expert; pairs of one expert keep their order.

    Args:
        indices: [N, K], the experts of each token.

    Returns:
        order: [N*K], the token of each sorted row.
        inverse: [N*K], the sorted row of each pair.
        offsets: [E] int32, where the rows of each expert end.
    """
    return reference.sort_by_expert(indices, num_experts)


def permute_tokens(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Copy each token [N, D] to its experts' rows [N*K, D]; `order` and `inverse` come from `sort_by_expert`."""
    return (cpu if cpu.runs(x) else reference).permute_tokens(x, order, inverse)


def combine_tokens(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """Sum each token's K rows of y [N*K, D] with its weights [N, K]: the way back of `permute_tokens`. Returns [N, D]."""
    return (cpu if cpu.runs(y, weights) else reference).combine_tokens(y, weights, inverse)


@torch.no_grad()
def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Roughly U V^T of every matrix U S V^T by the quintic Newton-Schulz iteration of Muon (Jordan et al., 2024). Has no gradient.

    Each matrix is divided by its Frobenius norm (+ 1e-7). Five steps bring singular values above 0.2% of that norm to about 0.7 to 1.2.

    Args:
        x: [B, m, n].
        steps: iterations.

    Returns:
        [B, m, n] in x's dtype.
    """
    # The C++ kernel gives each thread matrices that fit in its cache; torch divides a single large one among the threads.
    fits = x.shape[0] >= torch.get_num_threads() and min(x.shape[1:]) <= 1024
    return (cpu if fits and cpu.runs(x) else reference).newton_schulz(x, steps)
