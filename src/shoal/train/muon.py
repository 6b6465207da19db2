"""Muon: momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al., 2024; Moonlight, 2502.16982)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import newton_schulz
from ..parallel import SplitMatrices
from .moments import Moments
from .uncompiled import Uncompiled

UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW (Moonlight, section 2.2)."""

BATCH_BYTES = 16 << 20
"""Matrices of one shape are orthogonalised together up to this size: enough for all cores, and small enough that their copies stay in
the cache and in memory that malloc keeps."""


class Muon(Uncompiled):
    """For matrices `[m, n]` and stacks of them `[E, m, n]` (each expert's matrix is orthogonalised by itself).

    Weight decay is decoupled. All matrices of one shape and division are processed in batches.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float,
        steps: int,
        weight_decay: float,
        split: SplitMatrices | None = None,
        moments: Moments | None = None,
        blocks: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        """`split` knows which of `params` are some rows of a matrix, and where the others are.

        `blocks`: by the `id` of a parameter, how many rows each of the matrices has that it consists of; others are one matrix.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": weight_decay})
        self._split = split
        self._blocks = blocks or {}
        self._moments = moments or Moments()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments.load(self, state_dict)

    @torch.no_grad()
    def update(self, p: Tensor, group: dict) -> None:
        """Step of one parameter, which has a gradient and is whole."""
        self._update([p], group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None and (self._split is None or self._split.shape(p) is None):
                    alike[p.shape[-2:], self._blocks.get(id(p))].append(p)
            for same in alike.values():
                for batch in _batches(same):
                    self._update(batch, group)
            if self._split is not None:
                self._update_split(group, self._split)

    def _update(self, params: list[Tensor], group: dict) -> None:
        rows, columns = params[0].shape[-2:]
        counts = [p.numel() // (rows * columns) for p in params]
        directions = torch.empty(sum(counts), rows, columns, dtype=params[0].dtype, device=params[0].device)
        for p, direction in zip(params, directions.split(counts), strict=True):
            self._direction(p, group, direction.view(p.shape))
        updates = _orthogonal(directions, self._blocks.get(id(params[0])), group["steps"])
        for p, update in zip(params, updates.split(counts), strict=True):
            _apply(p, update, (rows, columns), group)

    def _update_split(self, group: dict, split: SplitMatrices) -> None:
        """The same for matrices of which every process holds some rows, perhaps none."""
        params = [p for p in group["params"] if split.shape(p) is not None and p.grad is not None]
        if not params:
            return
        directions = [torch.empty_like(p) for p in params]
        for p, direction in zip(params, directions, strict=True):
            self._direction(p, group, direction)
        shapes = [shape for p in params if (shape := split.shape(p)) is not None]
        blocks = [self._blocks.get(id(p)) for p in params]
        updates = split.apply(directions, shapes, lambda matrices, which: _each(matrices, [blocks[i] for i in which], group["steps"]))
        for p, update, shape in zip(params, updates, shapes, strict=True):
            _apply(p, update, shape, group)

    def _direction(self, p: Tensor, group: dict, out: Tensor) -> None:
        """Update the momentum of `p`; `out` becomes what is to be orthogonalised."""
        assert p.grad is not None
        if not self.state[p]:
            self.state[p]["momentum"] = self._moments.zeros(p)
        kept = self.state[p]["momentum"]
        momentum = kept.to(p.dtype)  # the same tensor where it is kept as it is computed
        momentum.lerp_(p.grad, 1 - group["momentum"])
        torch.lerp(p.grad, momentum, group["momentum"], out=out)  # Nesterov's look ahead
        if kept is not momentum:
            kept.copy_(momentum)
        self._moments.let_go(kept)


def _apply(p: Tensor, update: Tensor, shape: tuple[int, ...], group: dict) -> None:
    """Decay and move `p`, which is, or is a part of, a matrix (or stack of matrices) of `shape`."""
    scale = -group["lr"] * UPDATE_RMS * max(shape) ** 0.5
    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.reshape(p.shape), alpha=scale)


def _each(matrices: list[Tensor], blocks: list[tuple[int, ...] | None], steps: int) -> list[Tensor]:
    """`_orthogonal` of each, alike ones together."""
    results = list(matrices)
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        alike[matrix.shape, blocks[i]].append(i)
    for (_, same_blocks), same in alike.items():
        updates = _orthogonal(torch.stack([matrices[i] for i in same]), same_blocks, steps)
        for i, update in zip(same, updates, strict=True):
            results[i] = update.to(matrices[i].dtype)
    return results


def _orthogonal(matrices: Tensor, blocks: tuple[int, ...] | None, steps: int) -> Tensor:
    """Newton-Schulz of each of `matrices [K, m, n]`, or of each block of their rows: `blocks` sum to m.

    Blocks are scaled so that their updates, too, have the root mean square that `_apply` gives.
    """
    if matrices.is_cuda:
        matrices = matrices.bfloat16()
    if blocks is None:
        return newton_schulz(matrices, steps)
    rows, columns = matrices.shape[-2:]
    parts = list(matrices.split(blocks, dim=1))
    for size in set(blocks):
        places = [i for i, block in enumerate(blocks) if block == size]
        updates = newton_schulz(torch.stack([parts[i] for i in places], dim=1).flatten(0, 1), steps).unflatten(0, (-1, len(places)))
        updates *= (max(size, columns) / max(rows, columns)) ** 0.5
        for i, update in zip(places, updates.unbind(1), strict=True):
            parts[i] = update
    return torch.cat(parts, dim=1)


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
