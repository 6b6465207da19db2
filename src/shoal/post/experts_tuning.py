"""Expert-specialised fine-tuning (2407.01906): train the experts that the data uses, leave everything else as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Transformer
from ..runtime import Machine, inference
from .packing import Row


@dataclass(frozen=True)
class Kept:
    """How many experts are trained."""

    trained: int
    experts: int


def train_only_used_experts(model: Transformer, rows: Sequence[Row], share: float, machine: Machine) -> Kept:
    """Leave trainable only the fewest experts of every MoE layer that together get `share` of the tokens of `rows` (section 3.3)."""
    load: Tensor | None = None
    with inference(machine):
        for row in rows:
            moved = row.to(machine.device)
            output = model(moved.ids, mtp_ids=moved.mtp_ids, documents=moved.documents)
            stacked = torch.stack([stats.load for stats in output.routing]).cpu()
            load = stacked if load is None else load + stacked
    model.requires_grad_(False)
    trained = total = 0
    for layer, counts in zip(model.moe_layers, load if load is not None else (), strict=True):
        order = counts.argsort(descending=True)
        reached = counts[order].cumsum(0) / counts.sum()
        chosen = order[: int((reached < share).sum()) + 1]
        mask = torch.zeros(len(counts)).index_fill(0, chosen, 1.0)
        for parameter in layer.experts.parameters():
            parameter.requires_grad_(True)
            parameter.register_hook(_masked(mask.to(parameter)))
        trained += len(chosen)
        total += len(counts)
    return Kept(trained, total)


def _masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask.view(-1, 1, 1)
