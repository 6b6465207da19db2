"""The Triton kernels against their specification, in Triton's interpreter; on a GPU where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoal.numerics import fp8

SHAPES = [(1, 1, 1), (70, 300, 130), (16, 128, 128), (129, 256, 40)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * 10 ** (4 * torch.rand(shape[0], 1, generator=draw) - 2)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that multiplies FP8 (capability 8.9)"
)
def test_a_gpu_gives_what_the_simulation_gives() -> None:
    """Before the interpreter's tests, which load Triton in another mode."""
    x, weight, grad = (side.cuda() for side in (numbers(300, 512), numbers(256, 512, seed=1), numbers(300, 256, seed=2)))
    on_gpu, on_cpu = ([side.to(device) for side in (x, weight, grad)] for device in ("cuda", "cpu"))

    def results(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        tiles, blocks, grads = fp8.quantize_tiles(x), fp8.quantize_blocks(weight), fp8.quantize_tiles(grad)
        products = [fp8.product(tiles, blocks), fp8.input_gradient(grads, blocks), fp8.weight_gradient(grad, x)]
        return [tiles.data.view(torch.uint8), tiles.scales, *products]

    for i, (found, expected) in enumerate(zip(results(*on_gpu), results(*on_cpu), strict=True)):
        if i < 2:
            assert found.cpu().equal(expected)
        else:
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """The module as the interpreter runs it. Triton decides when functions are decorated, its own too: it is loaded anew for this."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    for name in list(sys.modules):
        if name.partition(".")[0] == "triton" or name == "shoal.kernels.fp8_triton":
            del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("shoal.kernels.fp8_triton")


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [shape[:2] for shape in SHAPES])
def test_quantized_tiles_are_equal_to_the_bit(kernels: Any, rows: int, columns: int, power_of_two: bool) -> None:
    x = numbers(rows, columns)
    x[0] = 0
    x[-1, ::3] *= 2**-12
    data, scales = kernels.quantize_tiles(x, power_of_two)
    expected = fp8.quantize_tiles(x, power_of_two=power_of_two)
    assert scales.equal(expected.scales)
    assert data.view(torch.uint8).equal(expected.data.view(torch.uint8))


def test_a_tile_with_nan_has_no_scale(kernels: Any) -> None:
    x = numbers(3, 200)
    x[1, 5], x[2, 150] = float("nan"), float("inf")
    for power_of_two in (False, True):
        scales = kernels.quantize_tiles(x, power_of_two)[1]
        assert scales.isfinite().equal(fp8.quantize_tiles(x, power_of_two=power_of_two).scales.isfinite())
        assert scales.isfinite().tolist() == [[True, True], [False, True], [True, False]]


@pytest.mark.parametrize(("rows", "columns", "outputs"), SHAPES)
def test_products_are_equal(kernels: Any, rows: int, columns: int, outputs: int) -> None:
    """To the bit where no partial sum is rounded, whatever its order; otherwise up to the rounding of 128 sums in fp32."""
    whole, weights = (torch.randint(-8, 9, (side, columns)).float() for side in (rows, outputs))
    whole[:, ::128], weights[:, ::128] = 8, 8
    for x, weight, exact in ((whole, weights, True), (numbers(rows, columns), numbers(outputs, columns, seed=1), False)):
        a, b = fp8.quantize_tiles(x, power_of_two=exact), fp8.quantize_blocks(weight, power_of_two=exact)
        found, expected = kernels.product(a.data, a.scales, b.data, b.scales, 128), fp8.product(a, b)
        if exact:
            assert found.equal(expected)
        else:
            size = fp8.product(*(fp8.Quantized(side.data.float().abs().to(torch.float8_e4m3fn), side.scales) for side in (a, b)))
            assert ((found - expected).abs() <= 2**-20 * size).all()


def test_gradients_are_products_too(kernels: Any) -> None:
    x, weight, grad = numbers(140, 200), numbers(150, 200, seed=1), numbers(140, 150, seed=2)
    blocks, grads = fp8.quantize_blocks(weight), fp8.quantize_tiles(grad)
    found = kernels.product(grads.data, grads.scales, blocks.data.mT, blocks.scales.mT, 128)
    torch.testing.assert_close(found, fp8.input_gradient(grads, blocks), rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    left, right = (kernels.quantize_tiles(side.T, False) for side in (grad, x))
    found = kernels.product(*left, *right, 1)
    torch.testing.assert_close(found, fp8.weight_gradient(grad, x), rtol=1e-4, atol=1e-4 * float(found.abs().max()))
