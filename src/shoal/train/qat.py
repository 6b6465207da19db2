"""Quantization-aware fine-tuning: the forward pass multiplies with weights as the engine's int4 format will hold them, and gradients go to
the weights themselves, as if nothing had been rounded (the straight-through estimator, 1308.3432).

Rounded is what `shoal quantize --bits 4` rounds to 4 bits, in the same groups with the same scales: matrices of attention, feed-forward
layers and experts of the main model.
"""

from __future__ import annotations

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
SCALES_LAST = 8
"""Training passes for which the scales of a matrix are kept: searching them costs more than rounding."""


class Rounding:
    """One matrix, or stack of matrices, as int4 would hold it."""

    def __init__(self) -> None:
        self._scales: Tensor | None = None
        self._passes = 0

    def __call__(self, weight: Tensor, training: bool) -> Tensor:
        """`weight [..., O, I]` rounded; its gradient is that of the result."""
        with torch.no_grad():
            if self._scales is None or self._passes >= SCALES_LAST or not training:
                self._scales, self._passes = find_scales(weight, 4, GROUP)[0], 0
            self._passes += training
            quants = round_to(weight, self._scales, None, 4, GROUP)
            change = dequantize(Grouped(quants, self._scales, None, 4, GROUP, weight.shape[-1])) - weight
        return weight + change


class RoundedLinear(nn.Linear):
    """A linear layer; made from a plain one by `round_weights`."""

    rounding: Rounding

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.rounding(self.weight, self.training), self.bias)


class RoundedKVUp(nn.Linear):
    """`kv_b_proj`, whose two parts the engine rounds along different dimensions."""

    shape: ModelConfig
    rounding: tuple[Rounding, Rounding]

    def forward(self, x: Tensor) -> Tensor:
        parts = split_kv_up(self.weight, self.shape)
        return nn.functional.linear(x, join_kv_up(*(r(part, self.training) for r, part in zip(self.rounding, parts, strict=True))))


class RoundedExperts(Experts):
    """Routed experts."""

    rounding: tuple[Rounding, Rounding, Rounding]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = (r(weight, self.training) for r, weight in zip(self.rounding, weights, strict=True))
        hidden = kernels.swiglu(kernels.grouped_linear(x, gate, offsets), kernels.grouped_linear(x, up, offsets))
        return kernels.grouped_linear(hidden, down, offsets)


def round_weights(model: Transformer) -> None:
    """Have the matrices that `shoal quantize --bits 4` holds in 4 bits rounded in every forward pass; parameters stay what they are."""
    for block in model.blocks:
        for module in list(block.modules()):
            if isinstance(module, Experts):
                module.__class__ = RoundedExperts
                module.rounding = (Rounding(), Rounding(), Rounding())  # type: ignore[assignment]
            elif isinstance(module, MLA | GQA | SwiGLU):
                for name, linear in module.named_children():
                    if not isinstance(linear, nn.Linear):
                        continue
                    if name == "kv_b_proj":
                        linear.__class__ = RoundedKVUp
                        linear.shape = model.config  # type: ignore[assignment]
                        linear.rounding = (Rounding(), Rounding())  # type: ignore[assignment]
                    else:
                        linear.__class__ = RoundedLinear
                        linear.rounding = Rounding()  # type: ignore[assignment]
