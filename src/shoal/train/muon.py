"""Muon: momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al., 2024; Moonlight, 2502.16982)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz polynomial a x + b x^3 + c x^5 that lifts small singular values fastest."""

UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW (Moonlight, section 2.2)."""

BATCH_BYTES = 64 << 20
"""Matrices of one shape are orthogonalised together up to this size, which keeps scratch memory small."""


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Approximate U V^T of every matrix of `x [B, m, n]` by `steps` Newton-Schulz iterations; singular values end in about 0.7 to 1.2."""
    a, b, c = QUINTIC
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x


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
        momentum = group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)
        stacked = torch.cat([g.reshape(-1, rows, columns) for g in nesterov])
        if stacked.is_cuda:
            stacked = stacked.bfloat16()
        update = orthogonalize(stacked, group["steps"])
        scale = -group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        pieces = update.split([p.numel() // (rows * columns) for p in params])
        torch._foreach_add_(params, [u.reshape(p.shape).to(p.dtype) for u, p in zip(pieces, params, strict=True)], alpha=scale)


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
