"""Products of attention and feed-forward matrices in FP8, forward and backward (DeepSeek-V3, 2412.19437, section 3.3).

Embedding, output head, routers, norms, the attention core and `eh_proj` stay as they are; so do weights, gradients and optimizer.
What a layer keeps for its backward pass is FP8 too: inputs of products, and the inputs of SwiGLU, whose result is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import kernels
from ..config import FP8Config
from ..model import GQA, MLA, Transformer
from ..model.layers import SwiGLU
from ..model.moe import Experts
from ..numerics import fp8
from ..numerics.fp8 import Quantized


class Recipe:
    """The quantizers of a run."""

    def __init__(self, config: FP8Config) -> None:
        self.power_of_two = config.power_of_two_scales
        self.snaps = config.gradient_tiles == "128x128"

    def tiles(self, x: Tensor) -> Quantized:
        return fp8.quantize_tiles(x, power_of_two=self.power_of_two)

    def blocks(self, weight: Tensor) -> Quantized:
        return fp8.quantize_blocks(weight, power_of_two=self.power_of_two)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of an output, as the recipe hands it to its quantizers."""
        return fp8.snap_to_blocks(grad) if self.snaps else grad

    def weight_gradient(self, grad: Tensor, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        return fp8.weight_gradient(grad, x, power_of_two=self.power_of_two, offsets=offsets)


def result_dtype(x: Tensor) -> torch.dtype:
    """What a product of `x` gives under autocast, or without."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            tiles = recipe.tiles(x.flatten(0, -2))
            y = fp8.product(tiles, recipe.blocks(weight))
        ctx.recipe, ctx.shape, ctx.dtype = recipe, x.shape, x.dtype
        ctx.save_for_backward(tiles.data, tiles.scales, weight)
        return y.view(*x.shape[:-1], y.shape[-1]).to(result_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        data, scales, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        grad = recipe.gradient(grad.flatten(0, -2).float())
        grad_x = fp8.input_gradient(recipe.tiles(grad), recipe.blocks(weight)).view(ctx.shape).to(ctx.dtype)
        return grad_x, recipe.weight_gradient(grad, fp8.dequantize_tiles(Quantized(data, scales))).to(weight.dtype), None


class _FeedForward(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of one layer, or of rows `x [R, D]` sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor | None, recipe: Recipe) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            tiles = recipe.tiles(x.flatten(0, -2))
            gated, raised = (fp8.product(tiles, recipe.blocks(weight), offsets) for weight in (gate, up))
            kept = [recipe.tiles(gated), recipe.tiles(raised)]
            y = fp8.product(recipe.tiles(kernels.swiglu(gated, raised)), recipe.blocks(down), offsets)
        ctx.recipe, ctx.shape, ctx.dtype = recipe, x.shape, x.dtype
        ctx.save_for_backward(*(part for one in (tiles, *kept) for part in (one.data, one.scales)), gate, up, down, offsets)
        return y.view(*x.shape[:-1], y.shape[-1]).to(result_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, gate, up, down, offsets = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        x, gated, raised = (fp8.dequantize_tiles(Quantized(kept[i], kept[i + 1])) for i in (0, 2, 4))
        grad = recipe.gradient(grad.flatten(0, -2).float())
        grad_hidden = fp8.input_gradient(recipe.tiles(grad), recipe.blocks(down), offsets)
        with torch.enable_grad():
            inputs = gated.requires_grad_(), raised.requires_grad_()
            hidden = kernels.swiglu(*inputs)
        grads = [recipe.gradient(g) for g in torch.autograd.grad(hidden, inputs, grad_hidden)]
        grad_down = recipe.weight_gradient(grad, hidden.detach(), offsets)
        of_gate, of_up = (fp8.input_gradient(recipe.tiles(g), recipe.blocks(w), offsets) for g, w in zip(grads, (gate, up), strict=True))
        # Tiles are of one column, so that both can share those of x.
        grad_both = recipe.weight_gradient(torch.cat(grads, dim=1), x, offsets).chunk(2, dim=-2)
        weights = (g.to(w.dtype) for g, w in zip((*grad_both, grad_down), (gate, up, down), strict=True))
        return of_gate.add_(of_up).view(ctx.shape).to(ctx.dtype), *weights, None, None


class FP8Linear(nn.Linear):
    """A linear layer of attention; made from a plain one by `compute_in_fp8`."""

    recipe: Recipe

    def forward(self, x: Tensor) -> Tensor:
        y = _Linear.apply(x, self.weight, self.recipe)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FP8SwiGLU(SwiGLU):
    """A dense feed-forward layer, or the shared experts."""

    recipe: Recipe

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        return _FeedForward.apply(x, gate, up, down, None, self.recipe)


class FP8Experts(Experts):
    """The routed experts."""

    recipe: Recipe

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return _FeedForward.apply(x, self.gate_proj, self.up_proj, self.down_proj, offsets, self.recipe)


def compute_in_fp8(model: Transformer, config: FP8Config) -> None:
    """Have the matrices of attention and feed-forward layers multiply in FP8, MTP modules included; parameters stay what they are."""
    recipe = Recipe(config)
    for module in list(model.modules()):
        if isinstance(module, Experts):
            module.__class__ = FP8Experts
        elif isinstance(module, SwiGLU):
            module.__class__ = FP8SwiGLU
        elif isinstance(module, MLA | GQA):
            for linear in module.children():
                if isinstance(linear, nn.Linear):
                    linear.__class__ = FP8Linear
                    linear.recipe = recipe  # type: ignore[assignment]
            continue
        else:
            continue
        module.recipe = recipe  # type: ignore[assignment]
