"""Updating each parameter as soon as its gradient is complete, so that no two large gradients exist at once (2306.09782)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .muon import Muon
from .one_by_one import OneByOne
from .optimizer import Optimizers


class EarlyUpdates:
    """Steps of `optimizers`, taken inside the backward pass; what is left of a gradient is its norm.

    All gradients must arrive in one backward pass, and nothing can be done to them that depends on all of them, as clipping does.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self._squares: list[Tensor] = []
        for optimizer in optimizers.all:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(self._updater(optimizer, group))

    def _updater(self, optimizer: torch.optim.Optimizer, group: dict) -> Callable[[Tensor], None]:
        assert isinstance(optimizer, Muon | OneByOne)

        def update(p: Tensor) -> None:
            assert p.grad is not None
            square = torch.linalg.vector_norm(p.grad.coalesce().values() if p.grad.is_sparse else p.grad).square()
            self._squares.append(square)
            if square.isfinite():  # a gradient that is not leaves its parameter as it was
                optimizer.update(p, group)
            p.grad = None

        return update

    def norm(self) -> Tensor:
        """Of all gradients since the last call; not finite where one of them was not."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
