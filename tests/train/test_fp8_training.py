"""Training whose matrices multiply in FP8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal.cli import main
from shoal.config import FP8Config, ModelConfig
from shoal.model import Transformer
from shoal.model.layers import SwiGLU
from shoal.model.moe import Experts
from shoal.numerics import fp8
from shoal.train.fp8 import FP8Experts, FP8Linear, FP8SwiGLU, Recipe, compute_in_fp8

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 160, "num_hidden_layers": 2, "intermediate_size": 192, "num_attention_heads": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 144, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip


def in_fp8(module: Any, kind: type, config: FP8Config | None = None) -> nn.Module:
    module.__class__ = kind
    module.recipe = Recipe(config or FP8Config())
    return module


def gradients(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The result, and gradients of the first input and of the parameters."""
    x = inputs[0].clone().requires_grad_()
    y = module(x, *inputs[1:])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("config", [FP8Config(), FP8Config(power_of_two_scales=False)])
@pytest.mark.parametrize("kind", ["linear", "swiglu", "experts"])
def test_results_and_gradients_are_near_those_of_fp32(kind: str, config: FP8Config) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 150, 160, generator=draw)
    plain: nn.Module
    if kind == "experts":
        plain, x = Experts(3, 160, 144), x.flatten(0, 1)
        inputs: tuple[torch.Tensor, ...] = (x, torch.tensor([120, 120, 300], dtype=torch.int32))
        small = FP8Experts
    else:
        plain, small, inputs = (nn.Linear(160, 200), FP8Linear, (x,)) if kind == "linear" else (SwiGLU(160, 200), FP8SwiGLU, (x,))
    for p in plain.parameters():
        p.data = torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5
    expected = gradients(plain, *inputs)
    found = gradients(in_fp8(plain, small, config), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 0.09 * theirs.norm()


@pytest.mark.parametrize("config", [FP8Config(), FP8Config(gradient_tiles="128x128")])
def test_without_rows_nothing_is_learnt(config: FP8Config) -> None:
    """As where no token goes to the experts of a process."""
    nobody = torch.zeros(2, dtype=torch.int32)
    cases: list[tuple[nn.Module, type, tuple[torch.Tensor, ...]]] = [
        (nn.Linear(160, 144, bias=False), FP8Linear, ()),
        (SwiGLU(160, 144), FP8SwiGLU, ()),
        (Experts(2, 160, 144), FP8Experts, (nobody,)),
    ]
    for plain, kind, more in cases:
        y, grad_x, *of_weights = gradients(in_fp8(plain, kind, config), torch.zeros(0, 160), *more)
        assert y.shape == (0, 144 if kind is FP8Linear else 160)
        assert grad_x.shape == (0, 160)
        assert of_weights
        assert not any(gradient.any() for gradient in of_weights)


def test_what_goes_into_a_product_is_quantized_along_its_sum() -> None:
    """A linear layer's three products, taken apart."""
    draw = torch.Generator().manual_seed(0)
    layer = in_fp8(nn.Linear(300, 200, bias=False), FP8Linear)
    x, weight = torch.randn(140, 300, generator=draw), layer.get_parameter("weight").detach()
    y, grad_x, grad_weight = gradients(layer, x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    tiles, grads = (fp8.quantize_tiles(side, power_of_two=True) for side in (x, grad))
    blocks = fp8.quantize_blocks(weight, power_of_two=True)
    assert y.equal(fp8.product(tiles, blocks))
    assert grad_x.equal(fp8.input_gradient(grads, blocks))
    assert grad_weight.equal(fp8.weight_gradient(grad, fp8.dequantize_tiles(tiles), power_of_two=True))


def test_gradients_in_large_blocks_lose_what_is_small() -> None:
    """The negative control: a token whose gradient is small beside its neighbours'."""
    layer = nn.Linear(128, 128, bias=False)
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for config in (FP8Config(), FP8Config(gradient_tiles="128x128")):
        in_fp8(layer, FP8Linear, config)
        inputs = x.clone().requires_grad_()
        grad = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -7, 128).unsqueeze(1)
        (found,) = torch.autograd.grad(layer(inputs), inputs, grad)
        exact = grad @ layer.weight.detach()
        errors.append(float(((found - exact).norm(dim=1) / exact.norm(dim=1)).mean()))
    assert errors[0] < 0.05
    assert errors[1] > 0.3


def test_which_layers_multiply_in_fp8() -> None:
    model = Transformer(ModelConfig(**SHAPE))
    names = dict(model.named_parameters()).keys()
    compute_in_fp8(model, FP8Config())
    assert dict(model.named_parameters()).keys() == names
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain = {name.split(".")[-1] for name, module in linear.items() if not isinstance(module, FP8Linear)}
    assert plain == {"lm_head", "eh_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any(type(module) in (SwiGLU, Experts) for module in model.modules())


def test_under_bf16_autocast_results_are_bf16() -> None:
    layer = in_fp8(nn.Linear(160, 32), FP8Linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(4, 160))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.get_parameter("weight").grad is not None


def test_a_run_learns_and_resumes_to_the_bit(train_args: Callable[..., list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(train_args(run, "--precision", "fp8", "--optimizer.moments", "bf16", "--checkpoint.keep-last", "9")) == 0
    assert json.loads((run / "run.json").read_text())["precision"] == "fp8"

    def losses() -> list[float]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    first = losses()
    assert first[-1] < first[0]
    for step in (8, 12):  # as if the run had ended after the fourth step
        shutil.rmtree(run / "checkpoints" / f"step_{step:07d}")
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert losses() == first
