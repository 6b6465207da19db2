"""Products with packed matrices against their specification, in every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import reference
from shoal.kernels.packed import ZERO_POINT, PackedMatrix, pack_floats, pack_integers
from shoal.kernels.selection import BACKEND

pytestmark = pytest.mark.skipif(BACKEND.cpu is None, reason=BACKEND.reason)
SETS = BACKEND.module.supported() if BACKEND.module else []
FORMATS = ["fp32", "bf16", "int8", "int4"]


def random_matrix(format: str, leading: tuple[int, ...], rows: int, columns: int, group: int) -> PackedMatrix:
    if format in ("fp32", "bf16"):
        return pack_floats(torch.randn(*leading, rows, columns), format)  # type: ignore[arg-type]
    groups = -(-columns // group)
    quants = torch.randint(0, 16 if format == "int4" else 256, (*leading, rows, groups * group), dtype=torch.uint8)
    scales = torch.rand(*leading, rows, groups) + 0.01
    return pack_integers(format, quants, scales, group=group, columns=columns)  # type: ignore[arg-type]


def multiply(isa: str, matrix: PackedMatrix, x: torch.Tensor, threads: int = 2) -> torch.Tensor:
    y = torch.empty(*matrix.leading, x.shape[0], matrix.rows)
    BACKEND.module.packed_linear(isa, matrix, x, y, threads)
    return y


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=12)
@given(
    leading=st.sampled_from([(), (3,)]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    tokens=st.integers(1, 19),
    group=st.sampled_from([32, 64]),
    size=st.sampled_from([0.0, 1e-30, 1.0, 1e20]),
)
def test_products_equal_the_specification(
    isa: str, kind: str, leading: tuple[int, ...], rows: int, columns: int, tokens: int, group: int, size: float
) -> None:
    matrix = random_matrix(kind, leading, rows, columns, group)
    x = torch.randn(tokens, columns) * size
    expected = reference.packed_linear(x, matrix)
    torch.testing.assert_close(multiply(isa, matrix, x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) + 1e-38)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_token_s_result_depends_on_nothing_but_the_token(isa: str, kind: str) -> None:
    matrix, x = random_matrix(kind, (), 100, 192, 32), torch.randn(23, 192)
    together = multiply(isa, matrix, x)
    for threads in (1, 2, 3):
        assert torch.cat([multiply(isa, matrix, row[None], threads) for row in x]).equal(together)


@pytest.mark.parametrize("isa", SETS)
def test_extreme_weights_do_not_overflow(isa: str) -> None:
    """Every product at its largest: without care 16-bit sums would saturate."""
    for format, stored in (("int8", 255), ("int8", 0), ("int4", 15), ("int4", 0)):
        quants = torch.full((16, 64), stored, dtype=torch.uint8)
        matrix = pack_integers(format, quants, torch.ones(16, 2), group=32)  # type: ignore[arg-type]
        for sign in (1.0, -1.0):
            assert multiply(isa, matrix, torch.full((1, 64), sign * 127)).unique().tolist() == [
                sign * (stored - ZERO_POINT[format]) * 127 * 64
            ]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("harm", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none_wherever_it_stands(isa: str, kind: str, harm: float) -> None:
    matrix, x = random_matrix(kind, (), 20, 75, 32), torch.randn(76, 75)
    x[range(75), range(75)] = harm
    y = multiply(isa, matrix, x)
    assert not y[:75].isfinite().any()
    assert y.isnan().equal(reference.packed_linear(x, matrix).isnan())
    assert y[75].isfinite().all()


@pytest.mark.parametrize("isa", SETS)
def test_shares_of_millions_of_items(isa: str) -> None:
    tokens, threads = (1 << 23) + 5, 2  # each thread's share of them has more than 2^22
    x = torch.arange(tokens, dtype=torch.float32)[:, None]
    y = multiply(isa, pack_floats(torch.full((1, 1), 3.0), "fp32"), x, threads)
    assert y.equal(3 * x)


def test_matrices_that_are_not_what_they_say_are_refused() -> None:
    good = random_matrix("int4", (), 32, 64, 32)
    x, y = torch.randn(1, 64), torch.empty(1, 32)
    for bad in (
        {"rows": 33},
        {"columns": 65},
        {"group": 48},
        {"data": good.data.int()},
        {"scales": None},
        {"scales": good.data},
        {"data": good.data[:, ::2]},
    ):
        broken = PackedMatrix(**{**good.__dict__, **bad})  # type: ignore[arg-type]
        with pytest.raises((ValueError, TypeError)):
            BACKEND.module.packed_linear(SETS[0], broken, x, y, 1)
