"""Grouped integers: the error is never above that of simpler rules, and no input breaks the arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.numerics.grouped import Bits, dequantize, find_scales, quantize


def absmax_q4(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric groups of 32 whose scale maps the largest weight to -8, as the format that is called Q4_0 has them."""
    groups = weight.unflatten(-1, (-1, 32))
    largest = groups.gather(-1, groups.abs().max(-1, keepdim=True).indices)
    inverse = torch.where(largest == 0, 0.0, -8 / largest)
    q = (groups * inverse + 8.5).floor().clamp(0, 15)
    return ((q - 8) * (largest / -8).half().float()).flatten(-2)


def error(approximation: torch.Tensor, weight: torch.Tensor) -> float:
    return float((approximation - weight).double().square().sum())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    columns=st.integers(1, 130),
    leading=st.sampled_from([(), (3,)]),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64]),
    exponent=st.floats(-6, 4),
    tail=st.sampled_from(["normal", "heavy", "constant", "zeros in places"]),
)
def test_every_weight_is_within_a_step(
    seed: int, rows: int, columns: int, leading: tuple[int, ...], bits: Bits, group: int, exponent: float, tail: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*leading, rows, columns, generator=generator)
    if tail == "heavy":
        weight = weight**3
    elif tail == "constant":
        weight = torch.ones_like(weight)
    elif tail == "zeros in places":
        weight = weight * (torch.rand(weight.shape, generator=generator) < 0.3)
    weight = (weight * 10**exponent).clamp(-6e4, 6e4)
    matrix = quantize(weight, bits, group)
    assert matrix.quants.dtype == torch.uint8
    assert matrix.quants.shape[-1] % group == 0
    assert int(matrix.quants.max()) < 1 << bits
    back = dequantize(matrix)
    assert back.shape == weight.shape
    assert back.isfinite().all()
    # Least squares may clip the largest weights of a group, but in the mean a weight is within half a step.
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).unflatten(-1, (-1, group))
    worst = padded.abs().amax(-1) / (8 if bits == 4 else 128) * 0.51 + 1e-7
    mean = torch.nn.functional.pad(back - weight, (0, -columns % group)).unflatten(-1, (-1, group)).square().mean(-1).sqrt()
    assert (mean <= worst + padded.abs().amax(-1) * 1e-3).all()


@pytest.mark.parametrize("tail", [1, 2, 3])
def test_search_beats_the_absolute_maximum_by_more_than_a_twentieth(tail: int) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(tail)) ** tail
    plain = error(absmax_q4(weight), weight)
    assert error(dequantize(quantize(weight, 4)), weight) < 0.95 * plain


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_no_group_is_worse_than_with_the_absolute_maximum(seed: int, exponent: float) -> None:
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    ours = (dequantize(quantize(weight, 4)) - weight).square().sum(-1)
    plain = (absmax_q4(weight) - weight).square().sum(-1)
    assert (ours <= plain * 1.002 + 1e-12).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros_and_extremes_stay_finite(bits: Bits) -> None:
    assert (dequantize(quantize(torch.zeros(3, 40), bits)) == 0).all()
    for value in (1e-30, 1e-8, 1e-5, 3e4, 1e5, 1e30, -1e38):
        weight = torch.full((2, 32), value)
        weight[0, 3] = -value
        back = dequantize(quantize(weight, bits))
        assert back.isfinite().all()
        if 1e-4 <= abs(value) <= 5e4:
            assert torch.allclose(back, weight, rtol=0.08)
    # A group whose largest weight is positive uses the extra step below zero by a negative scale.
    scales = find_scales(torch.tensor([[8.0] + [-7.0, 7.0, 1.0] * 10 + [0.0]]), 4)
    assert scales.item() == -1


def test_a_matrix_without_columns_or_rows() -> None:
    for shape in ((0, 32), (3, 0, 32)):
        assert dequantize(quantize(torch.zeros(shape), 4)).shape == shape
