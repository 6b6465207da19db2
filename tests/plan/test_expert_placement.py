"""Placement of experts (EPLB): the published example, invariants, what copies are worth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.plan.placement import pack, place_experts

LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


def test_the_published_example() -> None:
    expected = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
    for load, experts in zip(LOADS, expected, strict=True):
        assert place_experts(list(map(float, load)), 16, groups=4, nodes=2, devices=8).experts == experts


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int, int, int, int]:
    nodes, per_node, groups_per_node, size = (draw(st.integers(1, top)) for top in (3, 3, 2, 4))
    groups, devices = nodes * groups_per_node, nodes * per_node
    experts = groups * size
    each = -(-experts // devices) + draw(st.integers(0, 2))
    loads = draw(st.lists(st.floats(0, 1e4), min_size=experts, max_size=experts))
    return loads, each * devices, groups, nodes, devices


@given(cases())
def test_every_expert_has_a_place_and_groups_stay_on_one_node(case: tuple[list[float], int, int, int, int]) -> None:
    load, places, groups, nodes, devices = case
    placement = place_experts(load, places, groups, nodes, devices)
    assert len(placement.experts) == places
    assert [placement.experts.count(e) for e in range(len(load))] == placement.copies
    assert min(placement.copies) >= 1
    home = {}
    for place, expert in enumerate(placement.experts):
        group, node = expert * groups // len(load), place * nodes // places
        assert home.setdefault(group, node) == node
    assert sum(placement.device_loads(load, devices)) == pytest.approx(sum(load))


def test_redundant_experts_take_load_off_the_busiest_device() -> None:
    load = [1000.0] + [100.0] * 15
    plain = max(place_experts(load, 16, 1, 1, 8).device_loads(load, 8))
    spread = max(place_experts(load, 24, 1, 1, 8).device_loads(load, 8))
    assert spread < 0.5 * plain


def test_groups_that_do_not_divide_among_nodes_are_placed_globally() -> None:
    load = list(map(float, LOADS[0]))
    assert place_experts(load, 16, groups=3, nodes=2, devices=8) == place_experts(load, 16, groups=1, nodes=1, devices=8)


def test_numbers_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="17 places"):
        place_experts([1.0] * 12, 17, 4, 2, 8)
    with pytest.raises(UserError, match="do not fit"):
        place_experts([1.0] * 12, 8, 4, 2, 8)


@given(st.lists(st.floats(0, 100), min_size=6, max_size=6))
def test_packs_have_equal_sizes(weights: list[float]) -> None:
    packs = pack(weights, 3)
    assert sorted(i for each in packs for i in each) == list(range(6))
    assert {len(each) for each in packs} == {2}
