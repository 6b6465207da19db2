"""Computing again in the backward pass what would take memory to keep (2205.05198; DeepSeek-V3, 2412.19437, section 3.2.3)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .. import kernels
from ..config import Recomputed
from ..model import Block, RoutingStats, Transformer
from ..model.attention import Context, LayerCache
from ..model.layers import SwiGLU
from ..model.moe import Experts
from ..model.mtp import MTPModule


class RecomputingBlock(Block):
    """Keeps of a half of its layer only what goes into it; made from a plain one by `recompute`."""

    recomputed: frozenset[Recomputed]

    def attend(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        if "attention" not in self.recomputed or not torch.is_grad_enabled():
            return super().attend(x, context, cache)
        return _CHECKPOINT(super().attend, x, context, cache, **_CHEAPLY)

    def feed(self, x: Tensor, chosen: Tensor | None) -> tuple[Tensor, RoutingStats | None]:
        if "feed_forward" not in self.recomputed or not torch.is_grad_enabled():
            return super().feed(x, chosen)
        return _CHECKPOINT(super().feed, x, chosen, **_CHEAPLY)


class RecomputingMTPModule(RecomputingBlock, MTPModule):
    """The same of a multi-token prediction module."""


_CHECKPOINT = inspect.unwrap(checkpoint)
"""Without what tells torch's compiler not to compile it, for which torch imports it (see uncompiled.py)."""
_CHEAPLY: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
"""Kernels repeat their bits and nothing is drawn at random: there is nothing to remember or to check."""


class LeanSwiGLU(SwiGLU):
    """A dense feed-forward layer that keeps the inputs of SwiGLU and not its result."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        weight: Tensor = self.down_proj.get_parameter("weight")
        return _Down.apply(gate.flatten(0, -2), up.flatten(0, -2), weight, None).view(*x.shape[:-1], -1)


class LeanExperts(Experts):
    """Routed experts that do so."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        gate = kernels.grouped_linear(x, self.gate_proj, offsets)
        up = kernels.grouped_linear(x, self.up_proj, offsets)
        return _Down.apply(gate, up, self.down_proj, offsets)


class _Down(torch.autograd.Function):
    """(silu(gate) * up) times a weight, `[R, F]` and `[D, F]` or `[E, D, F]` -> `[R, D]`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight, offsets)
        hidden = kernels.swiglu(gate, up)
        return kernels.linear(hidden, weight.to(hidden.dtype)) if offsets is None else kernels.grouped_linear(hidden, weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gate, up, weight, offsets = ctx.saved_tensors
        with torch.enable_grad():
            inputs = gate.detach().requires_grad_(), up.detach().requires_grad_()
            hidden = kernels.swiglu(*inputs)
        rows, matrix = hidden.detach(), weight.to(hidden.dtype)
        if offsets is None:
            grad_hidden, grad_weight = kernels.linear_gradients(grad, rows, matrix)
        else:
            grad_hidden, grad_weight = kernels.grouped_linear_gradients(grad, rows, matrix, offsets)
        grad_gate, grad_up = torch.autograd.grad(hidden, inputs, grad_hidden)
        return grad_gate, grad_up, grad_weight.to(weight.dtype), None


def recompute(model: Transformer, what: Sequence[Recomputed]) -> None:
    """Have the layers of `model`, MTP modules included, compute `what` again; results and gradients keep their bits."""
    for module in list(model.modules()):
        if isinstance(module, Block) and {"attention", "feed_forward"} & set(what):
            module.__class__ = RecomputingMTPModule if isinstance(module, MTPModule) else RecomputingBlock
            module.recomputed = frozenset(what)  # type: ignore[assignment]
        elif "swiglu" in what and type(module) is Experts:
            module.__class__ = LeanExperts
        elif "swiglu" in what and type(module) is SwiGLU:
            module.__class__ = LeanSwiGLU
