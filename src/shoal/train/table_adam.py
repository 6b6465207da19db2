"""Adam for tables of which a step reads few rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .one_by_one import OneByOne


class TableAdam(OneByOne):
    """Adam without momentum (beta1 = 0; 1412.6980), whose work is proportional to the rows that have a gradient.

    A row without one does not move, and its second moment is brought up to date when it is next read: the result is that of the dense
    optimizer. Momentum would move every row in every step. Takes sparse gradients `[R, D]` and dense ones.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})

    @torch.no_grad()
    def update(self, p: Tensor, group: dict) -> None:
        """One step of one table, which has a gradient."""
        grad = p.grad
        assert grad is not None
        state, beta = self.state[p], group["beta"]
        if not state:
            state["step"] = torch.zeros(())
            state["square"] = torch.zeros_like(p)
            state["seen"] = torch.zeros(len(p), device=p.device)
        state["step"] += 1
        step = float(state["step"])
        if grad.is_sparse:
            grad = grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
        else:
            rows, values = torch.arange(len(p), device=p.device), grad
        square, seen = state["square"], state["seen"]
        passed = beta ** (step - seen[rows])
        moment = square[rows] * passed.unsqueeze(1) + (1 - beta) * values.square()
        square[rows] = moment
        seen[rows] = step
        p.index_add_(0, rows, values / ((moment / (1 - beta**step)).sqrt() + group["eps"]), alpha=-group["lr"])
