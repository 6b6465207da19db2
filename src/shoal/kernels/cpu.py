"""The C++ kernels as differentiable functions. Each one here has its specification, with the same name, in `reference`.

Every function takes fp32 tensors on the CPU, for which `runs` has said yes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import QUINTIC
from .selection import BACKEND

if TYPE_CHECKING:
    from .counted import CountTables

_cpu: Any = BACKEND.cpu


def runs(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels can take these tensors: plain, fp32, on the CPU, not empty, and not being traced."""
    if _cpu is None or torch.compiler.is_compiling():
        return False
    return all(
        x is None or (x.dtype == torch.float32 and x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and x.numel() > 0)
        for x in tensors
    )


NARROWEST = {"avx512vnni": 2048, "avx512": 2048, "avx2": 256, "portable": 0}
"""Width of a matrix, the smaller one, up to which products with it are as fast as torch's, or faster (docs/experiments.md)."""
LONGEST = 8192
"""Its larger one, up to which a part of it stays in a core's cache."""


def multiplies(shape: Sequence[int], *tensors: Tensor) -> bool:
    """Whether products of `tensors` that have, or give, a matrix of `shape` [..., O, I] are best left to the C++ kernels."""
    return runs(*tensors) and min(shape[-2:]) <= NARROWEST[BACKEND.isa] and max(shape[-2:]) <= LONGEST


def looks_up(tensor: Tensor) -> bool:
    """Whether the C++ kernels can look something up in `tensor`."""
    return _cpu is not None and not torch.compiler.is_compiling() and tensor.device.type == "cpu"


def _rows(x: Tensor) -> Tensor:
    """[..., width] as [rows, width], contiguous in the last dimension."""
    return _dense(x.reshape(-1, x.shape[-1]))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _RmsNorm.apply(x, weight, eps) if _wants_grad(x, weight) else _RmsNorm.forward(None, x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        rows, y = _rows(x), _empty(x)
        _cpu.rms_norm(rows, weight, eps, _rows(y), torch.get_num_threads())
        if ctx:
            ctx.eps = eps
            ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = _empty(x)
        grad_weight = _empty(weight) if ctx.needs_input_grad[1] else None
        _cpu.rms_norm_backward(_rows(x), weight, ctx.eps, _rows(grad), _rows(grad_x), grad_weight, torch.get_num_threads())
        return grad_x, grad_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate, up) if _wants_grad(gate, up) else _SwiGLU.forward(None, gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        y = _empty(gate)
        _cpu.swiglu(_rows(gate), _rows(up), _rows(y), torch.get_num_threads())
        if ctx:
            ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = _empty(gate), _empty(up)
        _cpu.swiglu_backward(_rows(gate), _rows(up), _rows(grad), _rows(grad_gate), _rows(grad_up), torch.get_num_threads())
        return grad_gate, grad_up


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _Rope.apply(x, cos, sin, interleaved) if _wants_grad(x) else _Rope.forward(None, x, cos, sin, interleaved)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        if ctx:
            ctx.interleaved = interleaved
            ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.interleaved, -1.0), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float) -> Tensor:
    y = _empty(x)
    _cpu.rope(_dense(x), cos, sin, interleaved, direction, y, torch.get_num_threads())
    return y


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _Attention.apply(q, k, v, scale) if _wants_grad(q, k, v) else _Attention.forward(None, q, k, v, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = _dense(q), _dense(k), _dense(v)
        batch, time, heads, _ = q.shape
        y = q.new_empty(batch, time, heads, v.shape[-1])
        log_sum = q.new_empty(batch, heads, time)
        _cpu.attention(q, k, v, scale, y, log_sum, torch.get_num_threads())
        if ctx:
            ctx.scale = scale
            ctx.save_for_backward(q, k, v, y, log_sum)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, log_sum = ctx.saved_tensors
        grads = _empty(q), _empty(k), _empty(v)
        _cpu.attention_backward(q, k, v, ctx.scale, y, log_sum, _dense(grad), *grads, torch.get_num_threads())
        return *grads, None


def cross_entropy_rows(logits: Tensor, targets: Tensor, softcap: float | None, with_grad: bool) -> Tensor:
    nats = logits.new_empty(logits.shape[0])
    _cpu.cross_entropy(logits, targets.contiguous(), softcap, with_grad, nats, torch.get_num_threads())
    return nats


def sampled_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, log_weights: Tensor, shares: Tensor, more: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, nats = hidden.new_empty(2, len(hidden))
    grad_logits, grad_hidden = torch.empty_like(log_weights), _empty(hidden)
    _cpu.sampled_cross_entropy(
        _dense(hidden), weight, tokens, log_weights, shares, more, losses, nats, grad_logits, grad_hidden, torch.get_num_threads()
    )
    return losses, nats, grad_logits, grad_hidden


def add_to_rows(factors: Tensor, tokens: Tensor, x: Tensor, y: Tensor) -> None:
    _cpu.add_to_rows(factors, tokens, _dense(x), y, torch.get_num_threads())


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """x [R, I] times every group's weight, [E, O, I] if `transposed` or else [E, I, O]. Returns [R, O]."""
    y = x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])
    _cpu.grouped_product(x, weight, offsets, transposed, y, torch.get_num_threads())
    return y


def grouped_outer(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """The transpose of every group's rows of grad [R, O], times those of x [R, I]. Returns [E, O, I]."""
    y = x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])
    _cpu.grouped_outer(grad, x, offsets, y, False, torch.get_num_threads())
    return y


def product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    transposed = not weight.is_contiguous()
    matrix = (weight.T if transposed else weight)[None]
    _cpu.grouped_product(_dense(x), matrix, _one_group(x), transposed, out, torch.get_num_threads())
    return out


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """The transpose of grad [N, O] times x [N, I]. Returns [O, I]."""
    return grouped_outer(_dense(grad), _dense(x), _one_group(x))[0]


def add_outer(grad: Tensor, x: Tensor, out: Tensor) -> None:
    _cpu.grouped_outer(_dense(grad), _dense(x), _one_group(x), out[None], True, torch.get_num_threads())


def _one_group(x: Tensor) -> Tensor:
    return torch.full((1,), x.shape[0], dtype=torch.int32)


def permute_tokens(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return _Permute.apply(x, order, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.tokens = x.shape[0]
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        grad_x = grad.new_empty(ctx.tokens, grad.shape[1])
        _cpu.combine(_dense(grad), None, inverse, grad_x, torch.get_num_threads())
        return grad_x, None, None


def combine_tokens(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    return _Combine.apply(y, weights, inverse) if _wants_grad(y, weights) else _Combine.forward(None, y, weights, inverse)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
        y, weights = _dense(y), weights.contiguous()
        out = y.new_empty(weights.shape[0], y.shape[1])
        _cpu.combine(y, weights, inverse, out, torch.get_num_threads())
        if ctx:
            ctx.save_for_backward(y, weights, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weights, inverse = ctx.saved_tensors
        grad_y, grad_weights = _empty(y), _empty(weights)
        _cpu.combine_backward(y, weights, inverse, _dense(grad), grad_y, grad_weights, torch.get_num_threads())
        return grad_y, grad_weights, None


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    y = _empty(x)
    _cpu.newton_schulz(x.contiguous(), *QUINTIC, steps, y, torch.get_num_threads())
    return y


def _parts(tables: CountTables) -> tuple[Any, ...]:
    """What both of the next two read."""
    return tables.entries, tables.counts, tables.index, tables.index_shift, tables.token_bits, tables.discounts, tables.base


def counted_prior(tables: CountTables, keys: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = torch.empty(len(keys), tables.base.numel())
    lengths = torch.empty(len(keys), dtype=torch.int64)
    _cpu.counted_prior(*_parts(tables), keys.contiguous(), probabilities, lengths, torch.get_num_threads())
    return probabilities, lengths


def counted_candidates(tables: CountTables, keys: Tensor, certain: Tensor, likeliest: int, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.cat([certain, certain.new_zeros(len(keys), likeliest), drawn], dim=1)
    probabilities = torch.empty(tokens.shape)
    lengths = torch.empty(len(keys), dtype=torch.int64)
    choice = tables.frequent, certain.shape[1], likeliest
    _cpu.counted_candidates(*_parts(tables), keys.contiguous(), *choice, tokens, probabilities, lengths, torch.get_num_threads())
    return tokens, probabilities, lengths


def find_repeats(texts: Tensor, numbers: Tensor, fresh: int, window: int, lengths: Sequence[int]) -> Tensor:
    found = torch.empty(len(texts), fresh, 2, dtype=torch.int64)
    _cpu.find_repeats(texts.contiguous(), numbers.contiguous(), window, list(lengths), found, torch.get_num_threads())
    return found
