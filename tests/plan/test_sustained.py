"""Rates by size."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.sustained import Curve, product_size

rates = st.floats(1e6, 1e15)
sizes = st.lists(st.floats(1, 1e6), min_size=1, max_size=6, unique=True).map(sorted)


@given(sizes, st.lists(rates, min_size=6, max_size=6), st.floats(0.1, 1e7))
def test_a_curve_goes_through_its_points_and_never_leaves_them(at: list[float], measured: list[float], size: float) -> None:
    curve = Curve(tuple(zip(at, measured, strict=False)))
    low, high = min(measured[: len(at)]), max(measured[: len(at)])
    assert low * (1 - 1e-9) <= curve.at(size) <= high * (1 + 1e-9)
    assert all(abs(curve.at(x) / y - 1) < 1e-9 for x, y in curve.points)


@given(st.floats(1, 1e5), st.floats(1, 1e5), st.floats(1, 1e5))
def test_the_size_of_a_product_is_its_intensity(rows: float, inner: float, outer: float) -> None:
    moved = rows * inner + rows * outer + inner * outer
    assert abs(product_size(rows, inner, outer) * moved / (2 * rows * inner * outer) - 1) < 1e-9
    assert product_size(rows, inner, outer) <= 2 * min(rows, inner, outer)
