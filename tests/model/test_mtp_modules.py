from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.model import Transformer

Make = Callable[..., Transformer]
LENGTH = 12


def run(model: Transformer, ids: Tensor, depths: int) -> list[Tensor]:
    """Hidden states of every depth for the positions that have all their tokens: `ids [1, LENGTH + depths]`."""
    return model(ids[:, :LENGTH], mtp_ids=[ids[:, k : LENGTH + k] for k in range(1, depths + 1)]).mtp_hidden


@torch.no_grad()
@pytest.mark.parametrize("depths", [1, 2])
def test_module_k_sees_position_i_plus_k_and_nothing_later(make_model: Make, depths: int) -> None:
    model = make_model(num_nextn_predict_layers=depths)
    ids = torch.randint(0, 50, (1, LENGTH + depths))
    before = run(model, ids, depths)
    for changed_at in range(1, LENGTH + depths):
        changed = ids.clone()
        changed[0, changed_at] = (ids[0, changed_at] + 1) % 50
        for k, (old, new) in enumerate(zip(before, run(model, changed, depths), strict=True), start=1):
            difference = (old - new).abs().amax(-1)[0]
            first = max(changed_at - k, 0)  # position i = changed_at - k is the first that may know this token
            assert (difference[:first] < 1e-5).all(), (changed_at, k)
            if first < LENGTH:
                assert difference[first] > 1e-4, (changed_at, k)


@torch.no_grad()
def test_depth_is_run_only_when_asked_for_and_leaves_the_main_model_alone(make_model: Make) -> None:
    model = make_model(num_nextn_predict_layers=2)
    ids = torch.randint(0, 50, (1, LENGTH + 2))
    plain = model(ids[:, :LENGTH])
    assert plain.mtp_hidden == []
    one = model(ids[:, :LENGTH], mtp_ids=[ids[:, 1 : LENGTH + 1]])
    two = run(model, ids, 2)
    assert torch.equal(plain.hidden, one.hidden)
    assert torch.equal(one.mtp_hidden[0], two[0])
    assert len(model.mtp_modules) == 2
    assert len(model.blocks) == model.config.num_hidden_layers
    assert len(one.routing) == len(plain.routing) + 1


def test_an_mtp_loss_trains_the_main_model_embedding_and_head(make_model: Make) -> None:
    model = make_model(num_nextn_predict_layers=1)
    ids = torch.randint(0, 50, (1, LENGTH + 1))
    model.logits(run(model, ids, 1)[0]).logsumexp(-1).sum().backward()
    for parameter in (model.model.embed_tokens.weight, model.lm_head.weight, model.blocks[0].self_attn.o_proj.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
