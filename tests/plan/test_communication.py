"""Where tokens travel: exact expectations, simulation, and bytes on links."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.plan.communication import exchange, expected_places, groups, reach, simulated_places
from shoal.plan.hardware import MACHINES
from shoal.plan.models import BUILT_IN

V3, H800 = BUILT_IN["deepseek-v3"], MACHINES["h800"]


def drawn_places(model: ModelConfig, places: int, samples: int) -> float:
    """Monte Carlo estimate of `expected_places`: every choice of groups, and of experts in them, is equally likely."""
    experts = model.n_routed_experts or 0
    count, reachable = groups(model)
    size, random, reached = experts // count, Random(0), 0
    for _ in range(samples):
        allowed = random.sample(range(count), reachable)
        pool = random.sample([expert for g in allowed for expert in range(g * size, (g + 1) * size)], model.num_experts_per_tok)
        reached += len({expert // (experts // places) for expert in pool})
    return reached / samples


@pytest.mark.parametrize(("name", "places"), [("deepseek-v3", 8), ("deepseek-v3", 64), ("deepseek-v2", 8), ("deepseek-v2", 40)])
def test_exact_and_simulated_reach_agree(name: str, places: int) -> None:
    samples = 4000
    exact = expected_places(BUILT_IN[name], places)
    assert drawn_places(BUILT_IN[name], places, samples) == pytest.approx(exact, abs=4 * 1.5 / samples**0.5)


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_exact_and_simulated_reach_agree_for_any_grouping(groups: int, reachable: int, chosen: int, places: int) -> None:
    """Places that are smaller than groups, larger, and across their borders."""
    assume(reachable <= groups and chosen <= 24 // groups * reachable)
    model = ModelConfig(
        n_routed_experts=24, n_group=groups, topk_group=reachable, num_experts_per_tok=chosen, topk_method="group_limited_greedy"
    )
    exact = expected_places(model, places)
    assert drawn_places(model, places, 1500) == pytest.approx(exact, abs=0.25)
    assert exact <= min(places, chosen) + 1e-9


def test_node_limited_routing_bounds_the_nodes() -> None:
    """V3 reaches at most 4 nodes; without the limit 8 experts would spread over more."""
    limited, free = reach(V3, 64, 8), reach(replace(V3, topk_method="greedy"), 64, 8)
    assert 3.5 < limited.nodes <= 4 < free.nodes
    assert simulated_places(V3, 8, 300) <= 4


def test_two_hops_send_less_between_nodes_and_as_much_in_all() -> None:
    trip = reach(V3, 64, 8)
    assert trip.two_hop_inter == pytest.approx(trip.nodes * 7 / 8)
    assert trip.flat_inter == pytest.approx(trip.ranks * 56 / 64)
    assert trip.two_hop_inter < trip.flat_inter
    flat, hop = exchange(V3, 64, H800, "bf16", two_hop=False), exchange(V3, 64, H800, "bf16", two_hop=True)
    assert hop.seconds < flat.seconds
    assert hop.inter_bytes == pytest.approx(trip.two_hop_inter * 7168 * 2)
    assert hop.seconds == pytest.approx(max(hop.inter_bytes / 50e9, hop.intra_bytes / 160e9))


def test_fp8_dispatch_carries_a_scale_per_128_values() -> None:
    assert exchange(V3, 64, H800, "fp8").inter_bytes / exchange(V3, 64, H800, "bf16").inter_bytes == pytest.approx((1 + 4 / 128) / 2)


def test_a_single_node_needs_no_link_to_others() -> None:
    inside = exchange(V3, 8, replace(H800, inter_node_gb_s=0), "bf16")
    assert inside.inter_bytes == 0
    assert inside.seconds > 0
    with pytest.raises(UserError, match="does not have"):
        exchange(V3, 8, replace(H800, intra_node_gb_s=0), "bf16")


def test_impossible_expert_parallelism_is_refused() -> None:
    with pytest.raises(UserError, match="use 32"):
        expected_places(V3, 48)
    with pytest.raises(UserError, match="no routed experts"):
        expected_places(BUILT_IN["llama-3.1-8b"], 2)
