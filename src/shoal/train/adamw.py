"""AdamW whose moments are kept in fewer bits than it computes with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Numbers that are updated at a time: their moments exist in fp32 for no more than these."""


class SmallAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (1711.05101); moments in `dtype` (DeepSeek-V3 keeps them in BF16: 2412.19437, section 3.3.3)."""

    def __init__(self, params: Iterable[Any], betas: tuple[float, float], eps: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=self.dtype) for _ in range(2))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        rate = group["lr"] / (1 - beta1**step)
        correction = (1 - beta2**step) ** 0.5
        flat = (t.view(-1).split(CHUNK) for t in (p, grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]))
        for w, g, first, second in zip(*flat, strict=True):
            mean = first.float().lerp_(g, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            first.copy_(mean)
            second.copy_(square)
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(mean, square.sqrt_().div_(correction).add_(group["eps"]), value=-rate)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; moments keep their dtype, which torch would change to the parameter's."""
        super().load_state_dict(state_dict)
        keep_dtype(self, ("exp_avg", "exp_avg_sq"), self.dtype)


def keep_dtype(optimizer: torch.optim.Optimizer, names: Iterable[str], dtype: torch.dtype) -> None:
    """Moments back in `dtype`; what was saved in it is changed by nothing on the way."""
    for state in optimizer.state.values():
        for name in names:
            if name in state:
                state[name] = state[name].to(dtype)
