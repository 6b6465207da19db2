"""Low-rank adapters (LoRA, 2106.09685) on attention and on every expert, and how they become part of the weights.

A matrix W `[..., O, I]` becomes W + scale * B A, with A `[..., r, I]` and B `[..., O, r]`; B starts at zero. Experts have one pair each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import kernels
from ..model import GQA, MLA, Transformer
from ..model.layers import Linear, SwiGLU
from ..model.moe import Experts

PARTS = ("gate_proj", "up_proj", "down_proj")


class AdaptedLinear(Linear):
    """A linear layer with an adapter; made from a plain one by `adapt`."""

    adapter_a: nn.Parameter
    adapter_b: nn.Parameter
    adapter_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter_scale * ((x @ self.adapter_a.T) @ self.adapter_b.T)

    def matrix(self) -> Tensor:
        return self.weight + self.adapter_scale * (self.adapter_b @ self.adapter_a)


class AdaptedExperts(Experts):
    """Routed experts with an adapter for each of their matrices."""

    adapter_scale: float

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        gate, up = self._linear(x, "gate_proj", offsets), self._linear(x, "up_proj", offsets)
        return self._linear(kernels.swiglu(gate, up), "down_proj", offsets)

    def _linear(self, x: Tensor, part: str, offsets: Tensor) -> Tensor:
        low = kernels.grouped_linear(x, getattr(self, f"{part}_a"), offsets)
        low_rank = kernels.grouped_linear(low, getattr(self, f"{part}_b"), offsets)
        return kernels.grouped_linear(x, getattr(self, part), offsets) + self.adapter_scale * low_rank


def adapt(model: Transformer, rank: int, alpha: float, seed: int = 0) -> None:
    """Put adapters on all matrices of attention and feed-forward layers, MTP modules included; only they stay trainable."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Experts):
            module.__class__ = AdaptedExperts
            module.adapter_scale = alpha / rank  # type: ignore[assignment]
            for part in PARTS:
                a, b = _pair(getattr(module, part), rank, generator)
                module.register_parameter(f"{part}_a", a)
                module.register_parameter(f"{part}_b", b)
        elif isinstance(module, MLA | GQA | SwiGLU):
            for linear in module.children():
                if isinstance(linear, nn.Linear):
                    linear.__class__ = AdaptedLinear
                    linear.adapter_scale = alpha / rank  # type: ignore[assignment]
                    linear.adapter_a, linear.adapter_b = _pair(linear.weight, rank, generator)


def _pair(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    *leading, rows, columns = weight.shape
    a = torch.empty(*leading, rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
    return nn.Parameter(a.to(weight)), nn.Parameter(weight.new_zeros(*leading, rows, rank))


def is_adapted(model: nn.Module) -> bool:
    """Whether there are adapters that are not merged."""
    return any(isinstance(module, AdaptedLinear | AdaptedExperts) for module in model.modules())


def merged_weight(module: nn.Module, name: str) -> Tensor:
    """A weight of a module with its adapter added, if it has one; without gradient."""
    if isinstance(module, AdaptedLinear) and name == "weight":
        return module.matrix().detach()
    weight = getattr(module, name).detach()
    if isinstance(module, AdaptedExperts) and name in PARTS:
        return weight + module.adapter_scale * (getattr(module, f"{name}_b") @ getattr(module, f"{name}_a")).detach()
    return weight


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Add every adapter to its weights and take it away: the model is plain again, all of it trainable."""
    for module in model.modules():
        if isinstance(module, AdaptedExperts):
            for part in PARTS:
                getattr(module, part).copy_(merged_weight(module, part))
                delattr(module, f"{part}_a")
                delattr(module, f"{part}_b")
            module.__class__ = Experts  # type: ignore[assignment]
        elif isinstance(module, AdaptedLinear):
            module.weight.copy_(merged_weight(module, "weight"))
            del module.adapter_a, module.adapter_b
            module.__class__ = Linear  # type: ignore[assignment]
    model.requires_grad_(True)
