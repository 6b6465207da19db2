"""The specification of every kernel in plain torch, and the fallback where no faster one can run.

Shapes: B sequences, T positions, H heads, N tokens, K experts per token, E experts, R = N*K rows sorted by expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .hashes import hashes_back
from .packed import ZERO_POINT, PackedMatrix, unpack, unpack_integers

IGNORED = -100
"""Target that `linear_cross_entropy` does not count, as in `torch.nn.functional.cross_entropy`."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz polynomial a x + b x^3 + c x^5 that lifts small singular values fastest (Jordan et al., 2024)."""

ONCE, OTHERWISE, AGAIN = range(3)
"""What the place before that with the same tokens says about a repetition: there is none in the window, another token followed it, or the
same."""
_ODD = -4417276706812531889  # as a signed number: one of xxHash's multipliers


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B or 1, T, 1, R/2], the same for every head
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return y.to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    # torch's fused kernels want one head width for all three; zero channels change neither scores nor the values kept.
    width = max(q.shape[-1], v.shape[-1])
    q_BHTD, k_BHTD, v_BHTD = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    y = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale, enable_gqa=gqa)
    return y.transpose(1, 2)[..., : v.shape[-1]]


def sampled_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, log_weights: Tensor, shares: Tensor, more: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`losses [N]`, `nats [N]`, and the gradients of the sum of losses with respect to logits [N, C] and hidden [N, D]."""
    rows = weight[tokens]
    logits = torch.einsum("nd,ncd->nc", hidden, rows).to(log_weights.dtype)
    if more is not None:
        logits = logits + more
    weighted = logits + log_weights
    log_sum = weighted.logsumexp(-1)
    grad_logits = weighted.softmax(-1) - shares
    grad_hidden = torch.einsum("nc,ncd->nd", grad_logits.to(rows.dtype), rows)
    return log_sum - torch.linalg.vecdot(shares, logits), log_sum - logits[:, 0], grad_logits, grad_hidden


def add_to_rows(factors: Tensor, tokens: Tensor, x: Tensor, y: Tensor) -> None:
    """y[tokens[n, c]] += factors[n, c] x[n]."""
    y.index_add_(0, tokens.flatten(), (factors.unsqueeze(-1) * x.unsqueeze(1)).flatten(0, 1).to(y.dtype))


def cross_entropy_rows(logits: Tensor, targets: Tensor, softcap: float | None, with_grad: bool) -> Tensor:
    """Nats of each row of `logits` [n, V]; `with_grad` overwrites `logits` with the gradient of their sum.

    Rows whose target is `IGNORED` give 0 nats and no gradient.
    """
    raw = logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != IGNORED
    index = targets.clamp(min=0).unsqueeze(1)
    log_sum = logits.logsumexp(-1)
    nats = torch.where(counted, log_sum - logits.gather(1, index).squeeze(1), 0.0)
    if with_grad:
        grad = logits.softmax(-1)  # not exp(logits - log_sum), which rounds large logits before their difference is small
        grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
        if softcap is not None:
            grad *= 1 - (logits / softcap).square()
        raw.copy_(torch.where(counted.unsqueeze(1), grad, 0.0))
    return nats


def product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`out` [N, O] = x [N, I] times weight [I, O], which is contiguous or the transpose of a contiguous matrix."""
    return torch.mm(x, weight, out=out)


def add_outer(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """`out` [O, I] += the transpose of grad [N, O] times x [N, I]; `out` may be of a wider type."""
    if out.dtype == grad.dtype:
        out.addmm_(grad.T, x)
    else:
        out += grad.T @ x


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts, slots = torch.sort(indices.flatten(), stable=True)
    rows = torch.arange(slots.numel(), device=slots.device)
    inverse = torch.empty_like(slots).scatter_(0, slots, rows)
    bounds = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, bounds, right=True, out_int32=True)
    return slots // indices.shape[1], inverse, offsets


def permute_tokens(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return _Permute.apply(x, order, inverse)


def combine_tokens(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    return _Combine.apply(y, weights, inverse)


class _Permute(torch.autograd.Function):
    # Autograd's own backward of a gather adds rows in no fixed order on a GPU; here each token gathers its K gradients.
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = x.shape
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        tokens, width = ctx.shape
        return grad.index_select(0, inverse).view(tokens, -1, width).sum(1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, inverse)
        rows = y.index_select(0, inverse).view(*weights.shape, -1)
        return (rows * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weights, inverse = ctx.saved_tensors
        grad_rows = (weights.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1).to(y.dtype)
        grad_y = torch.empty_like(y).index_copy_(0, inverse, grad_rows)  # a permutation: no row is written twice
        rows = y.index_select(0, inverse).view(*weights.shape, -1)
        grad_weights = (rows * grad.unsqueeze(1)).sum(-1).to(weights.dtype)
        return grad_y, grad_weights, None


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([rows @ w.T for rows, w in zip(x.split(sizes), weight, strict=True)])


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    a, b, c = QUINTIC
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x


def counted_prior(entries: Tensor, counts: Tensor, token_bits: int, discounts: Tensor, base: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    rows, orders = keys.shape
    probabilities = base.repeat(rows, 1)
    lengths = torch.zeros(rows, dtype=torch.int64, device=keys.device)
    for n in range(orders):
        wanted = keys[:, n].clamp(min=0)
        first, end = (torch.searchsorted(entries, (wanted + more) << token_bits) for more in (0, 1))
        sizes = torch.where((keys[:, n] >= 0) & (lengths == n), end - first, 0)
        row = torch.arange(rows, device=keys.device).repeat_interleave(sizes)
        at = torch.arange(len(row), device=keys.device) + (first - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
        count = counts[at].float()
        discount = discounts[n][counts[at].long().clamp(max=3)]
        total = torch.zeros(rows, device=keys.device).index_add_(0, row, count)
        discounted = torch.zeros(rows, device=keys.device).index_add_(0, row, discount)
        probabilities *= torch.where(total > 0, discounted / total, 1.0)[:, None]
        tokens = entries[at] & ((1 << token_bits) - 1)
        probabilities.view(-1).index_add_(0, row * base.numel() + tokens, (count - discount) / total[row])
        lengths += sizes > 0
    return probabilities, lengths


def candidates_of(probabilities: Tensor, lengths: Tensor, certain: Tensor, likeliest: int, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `counted_candidates`; `probabilities [R, V]`, of which what has been taken becomes 0."""

    def take(tokens: Tensor) -> Tensor:
        taken = probabilities.gather(1, tokens)
        probabilities.scatter_(1, tokens, 0.0)
        return taken

    first = [take(token) for token in certain.split(1, dim=1)]
    best = probabilities.topk(likeliest).indices
    return torch.cat([certain, best, drawn], dim=1), torch.cat([*first, take(best), probabilities.gather(1, drawn)], dim=1), lengths


def find_repeats(texts: Tensor, numbers: Tensor, fresh: int, window: int, lengths: Sequence[int]) -> Tensor:
    places = torch.arange(texts.shape[1], device=texts.device)[-fresh:]
    following = torch.nn.functional.pad(texts[:, 1:], (0, 1))
    token, kind = (texts.new_zeros(len(texts), fresh) for _ in range(2))
    nothing = texts.new_full((len(texts), lengths[-1] - 1), -1)
    marks = numbers * _ODD
    for length, mixed in enumerate(hashes_back(texts, nothing, lengths[-1]), 1):
        if length not in lengths:
            continue
        # Equal runs of tokens become neighbours, and those of one kind keep their order: the one to the left is the latest before.
        keys, order = (mixed ^ marks).sort(dim=1, stable=True)
        left = torch.where(keys[:, 1:] == keys[:, :-1], order[:, :-1], -1)
        latest = torch.full_like(order, -1).scatter_(1, order[:, 1:], left)
        first, second = latest[:, -fresh:], latest.gather(1, latest[:, -fresh:].clamp(min=0))
        found, twice = ((place >= 0) & (places - place <= window) for place in (first, second))
        told, earlier_told = (following.gather(1, place.clamp(min=0)) for place in (first, second))
        state = torch.where(twice, torch.where(told == earlier_told, AGAIN, OTHERWISE), ONCE)
        token = torch.where(found, told, token)
        kind = torch.where(found, 1 + 3 * lengths.index(length) + state, kind)
    return torch.stack([token, kind], dim=-1)


def packed_linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """See `serving.packed_linear`: what the kernels compute, their rounding of the activations included."""
    if matrix.format in ("fp32", "bf16"):
        return x @ unpack(matrix).mT
    quants, scales = unpack_integers(matrix)
    padded = torch.nn.functional.pad(x, (0, quants.shape[-1] - x.shape[-1])).unflatten(-1, (-1, matrix.group))  # [N, G, group]
    top = padded.abs().amax(-1, keepdim=True)
    # Not 127 / top, which torch computes as a reciprocal times 127.
    inverse = torch.where(top > 0, torch.full_like(top, 127).div(top), 0)
    rounded = (padded * inverse).round()  # integers up to 127
    grouped = quants.unflatten(-1, (-1, matrix.group)).float()
    # Products of integers, exact in fp32; then the scales of weight and activation.
    sums = torch.einsum("...ogk,ngk->...nog", grouped - ZERO_POINT[matrix.format], rounded)
    total = sums * scales.float().unsqueeze(-3) * (top / 127).squeeze(-1).unsqueeze(-2)
    return total.sum(-1)
