"""How far tokens travel to their experts: nodes and ranks reached, bytes per link, time.

Experts lie on the ranks in order, as many on each. A token goes to `num_experts_per_tok` experts; under group-limited
routing (DeepSeek-V2, 2405.04434, section 2.2.2; V3, 2412.19437, section 2.1.2) they all come from `topk_group` of the
`n_group` groups. The exact figures take every admissible choice as equally likely, which is what a balanced router tends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import comb
from random import Random

from ..config import ModelConfig, UserError
from .hardware import Machine


def groups(model: ModelConfig) -> tuple[int, int]:
    """(number of expert groups, groups a token may reach); (1, 1) where routing is not limited."""
    if model.topk_method == "greedy":
        return 1, 1
    return model.n_group, model.topk_group


def expected_places(model: ModelConfig, places: int) -> float:
    """Expected number of distinct places (ranks or nodes, each with the same number of experts) that a token reaches.

    Exact: summed over places, one minus the chance that none of the place's experts is chosen, over all choices of groups.
    """
    return _expected_places(_experts(model, places), model.num_experts_per_tok, *groups(model), places)


@cache
def _expected_places(experts: int, chosen: int, count: int, reachable: int, places: int) -> float:
    size, per_place = experts // count, experts // places
    pool = reachable * size
    expected = Fraction(0)
    for place in range(places):
        inside = [len(_overlap(place, per_place, group, size)) for group in range(count)]
        missed = Fraction(0)
        for held, ways in _held_by_subsets(inside, reachable).items():
            missed += Fraction(ways * comb(pool - held, chosen), comb(count, reachable) * comb(pool, chosen))
        expected += 1 - missed
    return float(expected)


def _overlap(place: int, per_place: int, group: int, size: int) -> range:
    return range(max(place * per_place, group * size), min((place + 1) * per_place, (group + 1) * size))


def _held_by_subsets(inside: list[int], chosen: int) -> dict[int, int]:
    """Over all subsets of `chosen` groups: how often they hold how many of the place's experts."""
    ways: dict[tuple[int, int], int] = {(0, 0): 1}
    for held in inside:
        for (taken, total), count in list(ways.items()):
            if taken < chosen:
                key = (taken + 1, total + held)
                ways[key] = ways.get(key, 0) + count
    return {total: count for (taken, total), count in ways.items() if taken == chosen}


def simulated_places(model: ModelConfig, places: int, samples: int) -> float:
    """Places that a token reaches where the router chooses, by Monte Carlo.

    Groups and experts are taken by independent random scores (a group by its best score, or the sum of its best two for `noaux_tc`),
    where in `expected_places` every choice is equally likely.
    """
    experts = _experts(model, places)
    count, reachable = groups(model)
    size, per_place, chosen = experts // count, experts // places, model.num_experts_per_tok
    best = 2 if model.topk_method == "noaux_tc" else 1
    random = Random(0)
    reached = 0
    for _ in range(samples):
        scores = [random.random() for _ in range(experts)]
        strength = [sum(sorted(scores[g * size : (g + 1) * size])[-best:]) for g in range(count)]
        allowed = sorted(range(count), key=strength.__getitem__)[-reachable:]
        pool = sorted((expert for g in allowed for expert in range(g * size, (g + 1) * size)), key=scores.__getitem__)[-chosen:]
        reached += len({expert // per_place for expert in pool})
    return reached / samples


def _experts(model: ModelConfig, places: int) -> int:
    experts = model.n_routed_experts if model.uses_mla else None
    if not experts:
        raise UserError("the model has no routed experts: expert parallelism does not apply, use ep = 1")
    if experts % places:
        raise UserError(f"{experts} experts do not divide over {places} places: use {nearest_divisor(experts, places)}")
    return experts


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted` (the smaller of two)."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


@dataclass(frozen=True)
class Reach:
    """What a token's trip to its experts puts on the links, in copies of its hidden state, on average."""

    ranks: float
    """Distinct ranks reached."""
    nodes: float
    """Distinct nodes reached, its own included where an expert lies there."""
    flat_inter: float
    """Copies over the inter-node link if every rank is sent its own."""
    flat_intra: float
    two_hop_inter: float
    """Copies over the inter-node link if each node is sent one, to the rank of the same place (V3 report, 3.2.2)."""
    two_hop_intra: float
    """Copies forwarded inside nodes."""
    per_expert_inter: float = 0.0
    """Copies over the inter-node link if every expert is sent its own, as a plain all-to-all of tokens does."""


def reach(model: ModelConfig, expert_parallel: int, devices_per_node: int) -> Reach:
    """Expected copies per token and direction for `expert_parallel` ranks, packed into nodes."""
    if expert_parallel == 1:
        return Reach(1, 1, 0, 0, 0, 0)
    local = min(devices_per_node, expert_parallel)
    if expert_parallel % local:
        raise UserError(
            f"{expert_parallel} expert-parallel ranks do not fill nodes of {devices_per_node}: use a multiple of {devices_per_node}"
        )
    nodes = expert_parallel // local
    ranks_reached = expected_places(model, expert_parallel)
    nodes_reached = expected_places(model, nodes)
    elsewhere = (nodes - 1) / nodes
    return Reach(
        ranks=ranks_reached,
        nodes=nodes_reached,
        flat_inter=ranks_reached * elsewhere,
        flat_intra=ranks_reached * (local - 1) / expert_parallel,
        two_hop_inter=nodes_reached * elsewhere,
        two_hop_intra=ranks_reached * (local - 1) / local,
        per_expert_inter=model.num_experts_per_tok * elsewhere,
    )


@dataclass(frozen=True)
class Exchange:
    """Bytes per token and layer, one way, and seconds per token on the slower of the two links."""

    inter_bytes: float
    intra_bytes: float
    seconds: float


def exchange(
    model: ModelConfig, expert_parallel: int, machine: Machine, number_format: str, two_hop: bool = True, link_efficiency: float = 1.0
) -> Exchange:
    """One dispatch or combine of a MoE layer; `number_format` fp8 (with an fp32 scale per 128 values), bf16 or fp32.

    Links inside and between nodes work at the same time, so the slower one sets the pace.
    """
    per_value = {"fp8": 1 + 4 / 128, "bf16": 2.0, "fp32": 4.0}[number_format]
    trip = reach(model, expert_parallel, machine.devices_per_node)
    copies = (trip.two_hop_inter, trip.two_hop_intra) if two_hop else (trip.flat_inter, trip.flat_intra)
    inter, intra = (number * model.hidden_size * per_value for number in copies)
    seconds = max(_seconds(inter, machine.inter_node_gb_s), _seconds(intra, machine.intra_node_gb_s)) / link_efficiency
    return Exchange(inter, intra, seconds)


def _seconds(amount: float, gb_s: float) -> float:
    if amount == 0:
        return 0.0
    if gb_s <= 0:
        raise UserError("the layout sends data over a link that the machine does not have: state its rate, or use fewer devices or nodes")
    return amount / (gb_s * 1e9)
