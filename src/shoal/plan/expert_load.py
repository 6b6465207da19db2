"""How busy experts are: measured by a server or by a training run, and what it means for devices that share them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig, UserError
from .placement import Placement, place_experts

_COUNTED = re.compile(r'^shoal_expert_tokens_total\{expert="(\d+)",layer="(\d+)"\} (\S+)', re.MULTILINE)  # labels come sorted
_TOLD = "give what /metrics of a server said, or the folder of a run"


@dataclass(frozen=True)
class Balance:
    """Load of the busiest device over that of the mean one, layer by layer: so much longer do all wait for the experts."""

    devices: int
    nodes: int
    redundant: int
    in_order: list[float] | None
    """Experts laid out by number; None where they do not divide among the devices."""
    placed: list[float] | None
    """Each in the place that its load asks for, without copies."""
    with_copies: list[float]
    """With the redundant experts."""
    placements: list[Placement]
    """Of the latter, one a layer."""


def read_expert_load(name: str, experts: int) -> list[list[float]]:
    """Load of every expert in every layer that has seen tokens, `[L, E]`, in any unit.

    `name` is a file with the text of a server's `/metrics`, a run's `metrics.jsonl`, or the folder of a run (of whose rows the last
    counts). Raises `UserError` where it holds no loads, or loads of another number of experts.
    """
    path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_TOLD}") from None
    layers = [layer for layer in (_of_run if path.suffix == ".jsonl" else _of_server)(text) if sum(layer) > 0]
    if not layers:
        raise UserError(f"{path} holds no load of experts: {_TOLD}, after it has seen tokens")
    found = {len(layer) for layer in layers}
    if found != {experts}:
        raise UserError(f"{path} holds the load of {max(found)} experts, but the model has {experts}: {_TOLD} with this model")
    return layers


def _of_server(text: str) -> list[list[float]]:
    counts = {(int(layer), int(expert)): float(value) for expert, layer, value in _COUNTED.findall(text)}
    layers = sorted({layer for layer, _ in counts})
    return [[counts[key] for key in sorted(counts) if key[0] == layer] for layer in layers]


def _of_run(text: str) -> list[list[float]]:
    last: list[list[float]] = []
    for line in text.splitlines():
        try:
            last = json.loads(line).get("expert_load", last)
        except (ValueError, AttributeError):
            continue  # the last line of a run that was killed
    return last


def balance(model: ModelConfig, load: list[list[float]], devices: int, nodes: int, redundant: int) -> Balance:
    """What the placement of experts with `load [L, E]` on `devices` in `nodes` does, with `redundant` copies in every layer.

    Raises `UserError` where experts and copies do not divide among the devices.
    """
    experts, groups = len(load[0]), model.n_group
    shares = experts % devices == 0
    placements = [place_experts(layer, experts + redundant, groups, nodes, devices) for layer in load]
    in_order = Placement(list(range(experts)), [1] * experts)
    return Balance(
        devices=devices,
        nodes=nodes,
        redundant=redundant,
        in_order=[_imbalance(layer, in_order, devices) for layer in load] if shares else None,
        placed=[_imbalance(layer, place_experts(layer, experts, groups, nodes, devices), devices) for layer in load] if shares else None,
        with_copies=[_imbalance(layer, placement, devices) for layer, placement in zip(load, placements, strict=True)],
        placements=placements,
    )


def _imbalance(load: list[float], placement: Placement, devices: int) -> float:
    loads = placement.device_loads(load, devices)
    return max(loads) * devices / sum(loads)
