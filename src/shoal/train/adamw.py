"""AdamW that keeps its moments in fewer bits than it computes with, or in a file, and can update one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .moments import Moments
from .one_by_one import OneByOne

CHUNK = 1 << 20
"""Numbers that are updated at a time: their moments exist in fp32 for no more than these."""


class SmallAdamW(OneByOne):
    """Decoupled weight decay (1711.05101). DeepSeek-V3 keeps both moments in BF16 (2412.19437, section 3.3.3)."""

    def __init__(self, params: Iterable[Any], betas: tuple[float, float], eps: float, moments: Moments) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments = moments

    @torch.no_grad()
    def update(self, p: Tensor, group: dict) -> None:
        """Step of one parameter, which has a gradient."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (self.moments.zeros(p) for _ in range(2))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        rate = group["lr"] / (1 - beta1**step)
        correction = (1 - beta2**step) ** 0.5
        flat = (t.view(-1).split(CHUNK) for t in (p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]))
        for w, g, first, second in zip(*flat, strict=True):
            mean = first.float().lerp_(g, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            first.copy_(mean)
            second.copy_(square)
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(mean, square.sqrt().div_(correction).add_(group["eps"]), value=-rate)
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            self.moments.let_go(moment)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.moments.load(self, state_dict)
