"""Where experts lie when some are busier than others: redundant copies, placed so that devices have equal work (EPLB).

As DeepSeek-V3's serving does it (2412.19437, section 3.4): with as many expert groups on every node (hierarchical), groups are first
packed onto nodes, so that group-limited routing keeps its few destinations; then busy experts are copied within the node, and the
copies are packed onto its devices. Otherwise (global) all nodes count as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import UserError


@dataclass(frozen=True)
class Placement:
    """Which expert lies in every place of one layer; device d has the places `d * P / devices` and following."""

    experts: list[int]
    """`[P]`: the expert in every place."""
    copies: list[int]
    """`[E]`: places of every expert, among which its tokens divide."""

    def device_loads(self, load: list[float], devices: int) -> list[float]:
        """Expected load of every device when experts have `load [E]`."""
        each = len(self.experts) // devices
        shares = [load[expert] / self.copies[expert] for expert in self.experts]
        return [sum(shares[d * each : (d + 1) * each]) for d in range(devices)]


def place_experts(load: list[float], places: int, groups: int, nodes: int, devices: int) -> Placement:
    """Place experts of measured `load [E]` in `places`, as many on each of `devices`, which divide evenly among `nodes`.

    Raises `UserError` where the numbers do not divide.
    """
    experts = len(load)
    if groups % nodes:
        groups = nodes = 1  # global
    for name, number, parts in (
        ("experts", experts, groups), ("places", places, devices), ("devices", devices, nodes),
    ):  # fmt: skip
        if number % parts:
            raise UserError(f"{number} {name} do not divide by {parts}: choose numbers that do")
    if places < experts:
        raise UserError(f"{experts} experts do not fit into {places} places: give each at least one")
    size = experts // groups
    group_loads = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    placed: list[int] = []
    copies = [0] * experts
    for node_groups in pack(group_loads, nodes):
        mine = [g * size + i for g in node_groups for i in range(size)]
        replicas = _replicate([load[e] for e in mine], places // nodes)
        counts = [replicas.count(i) for i in range(len(mine))]
        for device in pack([load[mine[i]] / counts[i] for i in replicas], devices // nodes):
            placed += [mine[replicas[slot]] for slot in device]
        for i, count in enumerate(counts):
            copies[mine[i]] = count
    return Placement(placed, copies)


def pack(weights: list[float], packs: int) -> list[list[int]]:
    """Items into packs of equal size: the heaviest first, each into the lightest pack with room. Returns each pack's items in order."""
    room = len(weights) // packs
    filled: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((p for p in range(packs) if len(filled[p]) < room), key=total.__getitem__)
        filled[lightest].append(item)
        total[lightest] += weights[item]
    return filled


def _replicate(load: list[float], places: int) -> list[int]:
    """Every expert once, then, one at a time, another copy of the one whose copies are busiest; `[places]`."""
    replicas = list(range(len(load)))
    counts = [1] * len(load)
    while len(replicas) < places:
        busiest = max(range(len(load)), key=lambda i: load[i] / counts[i])
        replicas.append(busiest)
        counts[busiest] += 1
    return replicas
