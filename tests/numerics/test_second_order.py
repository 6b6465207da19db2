"""Rounding for known inputs: outputs change less than by rounding to nearest, and nothing breaks it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.numerics.grouped import Bits, dequantize, quantize
from shoal.numerics.second_order import output_error, quantize_for_inputs


def inputs(rows: int, columns: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Correlated inputs `[rows, columns]` whose channels differ in size, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or columns, columns, generator=generator) * torch.rand(columns, generator=generator) ** 3
    return torch.randn(rows, rank or columns, generator=generator) @ mix


@pytest.mark.parametrize("group", [32, 64])
def test_outputs_change_half_as_much_as_by_rounding_to_nearest(group: int) -> None:
    x = inputs(500, 192, 0)
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(1))
    moment = x.T @ x / len(x)
    nearest = quantize(weight, 4, group)
    careful = quantize_for_inputs(weight, moment, 4, group)
    before, after = (((dequantize(q) - weight) @ x.T).square().sum() for q in (nearest, careful))
    assert after < 0.5 * before
    assert output_error(weight, dequantize(careful), moment) < 0.5 * output_error(weight, dequantize(nearest), moment)


def test_every_sweep_lowers_the_error() -> None:
    x = inputs(300, 96, 2)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    moment = x.T @ x / len(x)
    errors = [output_error(weight, dequantize(quantize_for_inputs(weight, moment, 4, sweeps=n)), moment).item() for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    leading=st.sampled_from([(), (3,)]),
    columns=st.integers(1, 100),
    rank=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    exponent=st.floats(-5, 5),
)
def test_few_inputs_and_odd_sizes(seed: int, leading: tuple[int, ...], columns: int, rank: int, bits: Bits, exponent: float) -> None:
    weight = torch.randn(*leading, 7, columns, generator=torch.Generator().manual_seed(seed))
    x = torch.stack([inputs(4, columns, seed + i, rank) for i in range(3)])[: leading[0] if leading else 1] * 10**exponent
    moment = (x.mT @ x / 4).view(*leading, columns, columns)
    careful = quantize_for_inputs(weight, moment, bits)
    nearest = quantize(weight, bits)
    assert careful.quants.shape == nearest.quants.shape
    assert int(careful.quants.max()) < 1 << bits
    back = dequantize(careful)
    assert back.shape == weight.shape
    assert back.isfinite().all()
    assert (output_error(weight, back, moment) <= output_error(weight, dequantize(nearest), moment) * 1.01 + 1e-6).all()


def test_without_inputs_it_is_rounding_to_nearest() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    careful, nearest = quantize_for_inputs(weight, torch.zeros(40, 40), 4, sweeps=0), quantize(weight, 4)
    assert dequantize(careful).equal(dequantize(nearest))
    assert (dequantize(quantize_for_inputs(torch.zeros(5, 40), torch.eye(40), 4)) == 0).all()


def test_each_expert_is_rounded_for_its_own_inputs() -> None:
    weight = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    moments = torch.stack([(x := inputs(100, 64, seed)).T @ x / 100 for seed in (1, 2)])
    together = dequantize(quantize_for_inputs(weight, moments, 4))
    for e in range(2):
        alone = dequantize(quantize_for_inputs(weight[e], moments[e], 4))
        assert output_error(weight[e], together[e], moments[e]) == pytest.approx(
            output_error(weight[e], alone, moments[e]).item(), rel=0.05
        )
