"""Optimizers that can update any parameter by itself."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .uncompiled import Uncompiled


class OneByOne(Uncompiled):
    """Its step is the update of every parameter that has a gradient, one after the other."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    @abstractmethod
    def update(self, p: Tensor, group: dict) -> None:
        """Step of one parameter, which has a gradient."""
