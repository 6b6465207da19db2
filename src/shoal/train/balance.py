"""Expert load over one optimizer step: what is reported, and what the routing bias follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..model import Block, MoE, RoutingStats, Transformer
from ..parallel import Team


class StepRouting:
    """Sums the routing of a step's micro-batches. L MoE layers, E experts."""

    def __init__(self) -> None:
        self.load: Tensor | None = None
        """Tokens per layer and expert, `[L, E]`, int64."""
        self._entropy: list[Tensor] = []

    def add(self, routing: list[RoutingStats]) -> None:
        if not routing:
            return
        load = torch.stack([stats.load for stats in routing])
        # Late in training the MTP layers may no longer run; all micro-batches of a step run the same layers.
        self.load = load if self.load is None else self.load + load
        self._entropy.append(torch.stack([stats.entropy for stats in routing]))

    @classmethod
    def of_stages(
        cls, passes: Iterable[tuple[list[int], list[RoutingStats]]], shape: tuple[int, int], micro_batches: int, device: torch.device
    ) -> StepRouting:
        """Of a process that has some of the MoE layers: the numbers of those in each pass, and their routing; `shape` is `[L, E]`."""
        step = cls()
        if not shape[0]:
            return step
        step.load, entropy = torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape[0], device=device)
        for layers, routing in passes:
            for layer, stats in zip(layers, routing, strict=True):
                step.load.select(0, layer).add_(stats.load)
                entropy.select(0, layer).add_(stats.entropy / micro_batches)
        step._entropy.append(entropy)
        return step

    def share(self, team: Team) -> None:
        """From this process's sequences to those of all: `load` is summed, entropies are averaged."""
        if team.is_alone or self.load is None:
            return
        self.load = team.sum(self.load)
        self._entropy = [team.sum(torch.stack(self._entropy).mean(0)) / team.layout.data]

    def figures(self) -> list[Tensor]:
        """MaxVio = (max - mean) / mean of the load (2408.15664, equation 4) of every layer `[L]`, and its routing entropy `[L]`; of a
        model without experts nothing."""
        if self.load is None:
            return []
        load = self.load.float()
        return [load.amax(1) / load.mean(1) - 1, torch.stack(self._entropy).mean(0)]

    def shares(self) -> list[list[float]]:
        """Share of a layer's tokens that went to each expert, `[L, E]`."""
        assert self.load is not None
        return [[round(share, 5) for share in layer] for layer in (self.load / self.load.sum(1, keepdim=True)).tolist()]


def routing_row(figures: list[float]) -> dict[str, Any]:
    """What `StepRouting.figures` gives, one after the other, under its names in `metrics.jsonl`."""
    layers = len(figures) // 2
    max_vio, entropy = figures[:layers], figures[layers:]
    return {"max_vio": sum(max_vio) / layers, "max_vio_layers": max_vio, "entropy_layers": entropy}


def update_biases(model: Transformer, routing: StepRouting, speed: float) -> None:
    """Auxiliary-loss-free balancing of every router that has a bias, from the load of the whole step."""
    if routing.load is None or not speed or model.config.topk_method != "noaux_tc":
        return
    mixtures = [layer for i, layer in enumerate(model.model.layers) if model.config.is_moe_layer(i)]
    for layer, load in zip(mixtures, routing.load, strict=False):
        if isinstance(layer, Block) and isinstance(layer.mlp, MoE):  # elsewhere another pipeline stage has it
            layer.mlp.gate.update_bias(load, speed)
