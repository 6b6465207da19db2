"""What fine-tuning's optimizer makes of gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from shoal.config import TuneOptions
from shoal.post.tuning import Tuner

OPTIONS = TuneOptions(lr=0.1, weight_decay=0.5, clip=1.0)


def give(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_update_is_that_of_adamw_on_clipped_gradients(clip: float) -> None:
    model = nn.Linear(3, 2)
    peer = copy.deepcopy(model)
    groups = [{"params": [peer.weight], "weight_decay": 0.5}, {"params": [peer.bias], "weight_decay": 0.0}]
    adam, tuner = torch.optim.AdamW(groups, betas=(0.9, 0.95)), Tuner(model, TuneOptions(lr=0.1, weight_decay=0.5, clip=clip), 3)
    for step, value in enumerate((5.0, 0.01, 5.0), 1):  # Adam does not see a scale that all gradients share
        give(model, value)
        give(peer, value)
        norm = nn.utils.clip_grad_norm_(peer.parameters(), clip or math.inf)
        for group in adam.param_groups:
            group["lr"] = tuner.rate(step)
        adam.step()
        assert tuner.step(step) == pytest.approx(norm.item())
        for one, other in zip(model.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(one, other)
            assert one.grad is None
    assert tuner.rate(3) < tuner.rate(2)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    model = nn.Linear(3, 2)
    peer, tuner = copy.deepcopy(model), Tuner(model, OPTIONS, 10)
    other = Tuner(peer, OPTIONS, 10)
    give(model, 1.0)
    model.bias.grad[0] = math.inf  # type: ignore[index]
    assert not math.isfinite(tuner.step(4))
    assert all(torch.equal(*both) for both in zip(model.parameters(), peer.parameters(), strict=True))
    give(model, 1.0)
    give(peer, 1.0)
    assert tuner.step(5) == other.step(5)
    assert all(torch.equal(*both) for both in zip(model.parameters(), peer.parameters(), strict=True))
