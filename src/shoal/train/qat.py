"""Quantization-aware fine-tuning: the forward pass multiplies with weights as the engine's int4 format will hold them, and gradients go to
the weights themselves, as if nothing had been rounded (the straight-through estimator, 1308.3432).

Rounded is what `shoal quantize --bits 4` rounds to 4 bits, in the same groups with the same scales: matrices of attention, feed-forward
layers and experts of the main model. Scales are searched once, when fine-tuning begins: another scale moves all weights of its group at
once, and what training has made of them is lost. Checkpoints hold the rounded weights, for which quantizing finds the
same scales, but for groups whose largest weights have shrunk so far (by a third) that a finer grid fits them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from ..formats.parts import join_kv_up, split_kv_up
from ..model import GQA, MLA, Transformer
from ..model.layers import SwiGLU
from ..model.moe import Experts
from ..numerics.grouped import Grouped, dequantize, find_scales, round_to

GROUP = 32


class Rounding(nn.Module):
    """One matrix, or stack of matrices, as int4 holds it, with the scales that fit `weight [..., O, I]` best."""

    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", find_scales(weight.detach(), 4, GROUP), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """`weight [..., O, I]` rounded; its gradient is that of the result."""
        with torch.no_grad():
            quants = round_to(weight, self.scales, 4, GROUP)
            change = dequantize(Grouped(quants, self.scales, 4, GROUP, weight.shape[-1])) - weight
        return weight + change


class RoundedLinear(nn.Linear):
    """A linear layer; made from a plain one by `round_weights`."""

    rounding: Rounding

    def rounded(self) -> dict[str, Tensor]:
        """Weights of the forward pass, by parameter."""
        return {"weight": self.rounding(self.weight)}

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.rounded()["weight"], self.bias)


class RoundedKVUp(nn.Linear):
    """`kv_b_proj`, whose two parts the engine rounds along different dimensions."""

    shape: ModelConfig
    rounding: nn.ModuleList

    def rounded(self) -> dict[str, Tensor]:
        parts = split_kv_up(self.weight, self.shape)
        return {"weight": join_kv_up(*(rounding(part) for rounding, part in zip(self.rounding, parts, strict=True)))}

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.rounded()["weight"])


class RoundedExperts(Experts):
    """Routed experts."""

    rounding: nn.ModuleDict

    def rounded(self) -> dict[str, Tensor]:
        return {name: rounding(getattr(self, name)) for name, rounding in self.rounding.items()}

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        weights = self.rounded()
        gate, up = (kernels.grouped_linear(x, weights[name], offsets) for name in ("gate_proj", "up_proj"))
        return kernels.grouped_linear(kernels.swiglu(gate, up), weights["down_proj"], offsets)


def round_weights(model: Transformer) -> None:
    """Have the matrices that `shoal quantize --bits 4` holds in 4 bits rounded in every forward pass; parameters stay what they are."""
    for block in model.blocks:
        for module in list(block.modules()):
            if isinstance(module, Experts):
                names = ("gate_proj", "up_proj", "down_proj")
                module.__class__ = RoundedExperts
                module.rounding = nn.ModuleDict({name: Rounding(getattr(module, name)) for name in names})
            elif isinstance(module, MLA | GQA | SwiGLU):
                for name, linear in module.named_children():
                    if not isinstance(linear, nn.Linear):
                        continue
                    if name == "kv_b_proj":
                        linear.__class__ = RoundedKVUp
                        linear.shape = model.config  # type: ignore[assignment]
                        linear.rounding = nn.ModuleList(map(Rounding, split_kv_up(linear.weight, model.config)))
                    else:
                        linear.__class__ = RoundedLinear
                        linear.rounding = Rounding(linear.weight)


@contextmanager
def on_grid(model: Transformer) -> Iterator[dict[str, Any]]:
    """Within the block, parameters are what the forward pass makes of them; yields the `state` from which `go_on` goes on."""
    held: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, RoundedLinear | RoundedKVUp | RoundedExperts):
            for name, weight in module.rounded().items():
                held[f"{path}.{name}"] = module.get_parameter(name).data
                module.get_parameter(name).data = weight.detach()
    try:
        yield {"weights": held, "scales": _scales(model)}
    finally:
        for name, weight in held.items():
            model.get_parameter(name).data = weight


@torch.no_grad()
def go_on(model: Transformer, state: dict[str, Any]) -> None:
    """Weights and scales of a model with `round_weights` as they were when `on_grid` gave `state`."""
    for name, weight in state["weights"].items():
        model.get_parameter(name).copy_(weight)
    for name, scales in _scales(model).items():
        scales.copy_(state["scales"][name])


def _scales(model: Transformer) -> dict[str, Tensor]:
    return {path: module.scales for path, module in model.named_modules() if isinstance(module, Rounding)}
