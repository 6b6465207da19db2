"""torch's optimizers without torch's compiler, which they import at their first step to tell it that they are not to be compiled."""

from __future__ import annotations

import inspect

import torch


class Uncompiled(torch.optim.Optimizer):
    """What torch's wrappers of these methods load takes 150 MB of memory and seconds of time, and nothing here is compiled."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Uncompiled, torch.optim.AdamW):
    """torch's, fused: all parameters in a few calls."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
