from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.numerics import fp8
from shoal.numerics.fp8 import Quantized

E4M3 = sorted({m * 2.0**e for e in range(-9, 6) for m in range(16)} | {m * 2.0**5 for m in range(8, 15)})
E4M3 = [value for value in E4M3 if value <= 448]
"""Every number of the format that is not negative, from its definition: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""


def nearest(x: np.ndarray) -> np.ndarray:
    """E4M3 numbers nearest to `x` (float64), ties to even mantissas; beyond 448 the largest."""
    magnitude = np.minimum(np.abs(x), 448.0)
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(magnitude, 2.0**-20))), -6) - 3)
    return np.sign(x) * np.round(magnitude / step) * step


def emulated_scale(largest: float, power_of_two: bool) -> float:
    scale = float(np.float32(np.float32(largest) / np.float32(448.0)))
    if scale == 0:
        scale = float(np.finfo(np.float32).tiny)
    return 2.0 ** math.ceil(math.log2(scale)) if power_of_two else scale


def emulate(x: np.ndarray, high: int, wide: int, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """The recipe in float64: numbers and scales of blocks of `high` x `wide`."""
    rows, columns = x.shape
    numbers, scales = np.zeros_like(x), np.zeros((-(-rows // high), -(-columns // wide)))
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            block = x[i : i + high, j : j + wide]
            scale = emulated_scale(np.abs(block).max(), power_of_two)
            scales[i // high, j // wide] = scale
            # The quotient is rounded to fp32 first, as every implementation divides in fp32.
            numbers[i : i + high, j : j + wide] = nearest((block.astype(np.float32) / np.float32(scale)).astype(np.float64))
    return numbers, scales


def numbers(rows: int, columns: int, seed: int, spread: float = 3.0) -> Tensor:
    """Random, with rows and columns of very different sizes, and some zeros."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [10 ** (spread * (torch.rand(shape, generator=draw) - 0.5)) for shape in ((rows, 1), (1, columns))]
    x = torch.randn(rows, columns, generator=draw) * sizes[0] * sizes[1]
    return x * (torch.rand(rows, columns, generator=draw) > 0.1)


shapes = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(0, 999), st.booleans())


@settings(max_examples=30)
@given(shapes)
def test_operands_are_those_of_a_float64_emulation(shape: tuple[int, int, int, bool]) -> None:
    rows, columns, seed, power_of_two = shape
    x = numbers(rows, columns, seed)
    for quantize, high in ((fp8.quantize_tiles, 1), (fp8.quantize_blocks, 128)):
        found = quantize(x, power_of_two=power_of_two)
        expected, scales = emulate(x.double().numpy(), high, 128, power_of_two)
        assert np.array_equal(found.scales.double().numpy(), scales)
        assert np.array_equal(found.data.float().double().numpy(), expected)
        assert set(np.abs(expected).ravel()) <= set(E4M3)


@settings(max_examples=20)
@given(shapes, st.integers(1, 200))
def test_products_are_those_of_a_float64_emulation(shape: tuple[int, int, int, bool], outputs: int) -> None:
    rows, columns, seed, power_of_two = shape
    x, weight = numbers(rows, columns, seed), numbers(outputs, columns, seed + 1)
    found = fp8.product(fp8.quantize_tiles(x, power_of_two=power_of_two), fp8.quantize_blocks(weight, power_of_two=power_of_two))
    (a, sa), (b, sb) = (emulate(side.double().numpy(), high, 128, power_of_two) for side, high in ((x, 1), (weight, 128)))
    total, size = np.zeros((rows, outputs)), np.zeros((rows, outputs))
    for t in range(sa.shape[1]):
        cut = slice(128 * t, 128 * t + 128)
        scales = sa[:, t, None] * np.repeat(sb[:, t], 128)[:outputs]
        total += a[:, cut] @ b[:, cut].T * scales
        size += np.abs(a[:, cut]) @ np.abs(b[:, cut]).T * scales
    assert (np.abs(found.double().numpy() - total) <= 2**-20 * size).all()  # fp32 sums of at most 128 numbers, promoted


def test_products_of_small_integers_are_exact() -> None:
    """No partial sum is rounded then, so that any order of summation gives the same bits."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-8, 9, shape, generator=draw).float() for shape in ((70, 500), (150, 500)))
    x[:, ::128], weight[::128, ::128] = 8, 8  # the largest of every tile
    got = fp8.product(fp8.quantize_tiles(x, power_of_two=True), fp8.quantize_blocks(weight, power_of_two=True))
    assert got.equal(x @ weight.T)


@settings(max_examples=20)
@example([0, 0], 130, 40, 0)  # as where no token goes to the experts of a process
@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 200), st.integers(1, 200), st.integers(0, 99))
def test_groups_of_rows_are_multiplied_as_each_by_itself(sizes: list[int], columns: int, outputs: int, seed: int) -> None:
    x, weight = numbers(sum(sizes), columns, seed, 1.0), numbers(len(sizes) * outputs, columns, seed + 1, 1.0).unflatten(0, (-1, outputs))
    grad = numbers(sum(sizes), outputs, seed + 2, 1.0)
    offsets = torch.tensor(sizes).cumsum(0).int()
    tiles, blocks, grads = fp8.quantize_tiles(x), fp8.quantize_blocks(weight), fp8.quantize_tiles(grad)
    found = (fp8.product(tiles, blocks, offsets), fp8.input_gradient(grads, blocks, offsets), fp8.weight_gradient(grad, x, offsets=offsets))
    first = 0
    for e, size in enumerate(sizes):
        rows = slice(first, first + size)
        mine = Quantized(blocks.data[e], blocks.scales[e])
        first += size
        if size:
            alone = fp8.product(Quantized(tiles.data[rows], tiles.scales[rows]), mine)
            torch.testing.assert_close(found[0][rows], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
            alone = fp8.input_gradient(Quantized(grads.data[rows], grads.scales[rows]), mine)
            torch.testing.assert_close(found[1][rows], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
            # The same operands; how torch adds up a batch of products depends on how many there are.
            alone = fp8.weight_gradient(grad[rows], x[rows])
            torch.testing.assert_close(found[2][e], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
        else:
            assert not found[2][e].any()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(300, 200, 150), (64, 96, 40), (129, 128, 256)])
def test_three_products_are_near_the_exact_ones(rows: int, columns: int, outputs: int, power_of_two: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=draw) for shape in ((rows, columns), (outputs, columns), (rows, outputs)))
    tiles, grads = (fp8.quantize_tiles(side, power_of_two=power_of_two) for side in (x, grad))
    blocks = fp8.quantize_blocks(weight, power_of_two=power_of_two)
    for found, exact in (
        (fp8.product(tiles, blocks), x @ weight.T),
        (fp8.input_gradient(grads, blocks), grad @ weight),
        (fp8.weight_gradient(grad, x, power_of_two=power_of_two), grad.T @ x),
    ):
        assert found.shape == exact.shape
        assert (found - exact).norm() / exact.norm() < 0.045  # two roundings to 4 bits


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(3, 200)
    x[1, 150], x[2, 0] = torch.nan, torch.inf
    y = fp8.product(fp8.quantize_tiles(x), fp8.quantize_blocks(torch.ones(4, 200)))
    assert y[0].isfinite().all()
    assert not y[1:].isfinite().any()
    assert not fp8.weight_gradient(torch.ones(3, 4), x)[:, [0, 150]].isfinite().any()


@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=20)
def test_tiles_with_powers_of_two_hold_what_was_snapped_to_blocks(rows: int, columns: int, seed: int) -> None:
    snapped = fp8.snap_to_blocks(numbers(rows, columns, seed))
    assert fp8.dequantize_tiles(fp8.quantize_tiles(snapped, power_of_two=True)).equal(snapped)


@given(st.floats(2.0**-120, 2.0**120, allow_nan=False))
def test_powers_of_two_are_the_least_that_suffice(largest: float) -> None:
    exact, rounded = (float(fp8.scales_of(torch.tensor([largest]), power)) for power in (False, True))
    assert math.frexp(rounded)[0] == 0.5
    assert rounded / 2 < exact <= rounded
