"""Muon: momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al., 2024; Moonlight, 2502.16982)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels import newton_schulz

UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW (Moonlight, section 2.2)."""

BATCH_BYTES = 16 << 20
"""Matrices of one shape are orthogonalised together up to this size: enough for all cores, and small enough that their copies stay in
the cache and in memory that malloc keeps."""


class Muon(torch.optim.Optimizer):
    """For matrices `[m, n]` and stacks of them `[E, m, n]` (each expert's matrix is orthogonalised by itself).

    Weight decay is decoupled. All matrices of one shape are processed in batches.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, steps: int, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape[-2:])].append(p)
            for same in by_shape.values():
                for batch in _batches(same):
                    self._update(batch, group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        rows, columns = params[0].shape[-2:]
        counts = [p.numel() // (rows * columns) for p in params]
        directions = torch.empty(sum(counts), rows, columns, dtype=params[0].dtype, device=params[0].device)
        grads = [p.grad for p in params if p.grad is not None]
        for p, grad, direction in zip(params, grads, directions.split(counts), strict=True):
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(grad, 1 - group["momentum"])
            torch.lerp(grad, momentum, group["momentum"], out=direction.view(p.shape))  # Nesterov's look ahead
        updates = newton_schulz(directions.bfloat16() if directions.is_cuda else directions, group["steps"])
        scale = -group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5
        for p, update in zip(params, updates.split(counts), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.reshape(p.shape), alpha=scale)


def _batches(params: list[Tensor]) -> Iterable[list[Tensor]]:
    batch: list[Tensor] = []
    size = 0
    for p in params:
        if batch and size + p.numel() * 4 > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(p)
        size += p.numel() * 4
    yield batch
