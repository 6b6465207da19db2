"""The training loss against full logits, and the sums over micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shoal.config import BalanceConfig, ModelConfig
from shoal.model import RoutingStats, Transformer, init_weights
from shoal.parallel.pipeline import Seen
from shoal.train.balance import StepRouting, routing_row, update_biases
from shoal.train.loss import compute_losses
from shoal.train.passes import PipelinePasses

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "initializer_range": 0.2,
}  # fmt: skip


def make(**changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, **changes}))
    init_weights(model, 0)
    return model


def rows(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


def naive(model: Transformer, ids: Tensor, mtp_weight: float, balance_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Total, main and MTP loss from whole logits, every target looked up by its position."""
    depth = model.config.num_nextn_predict_layers
    length = ids.shape[1] - 1 - depth
    output = model(ids[:, :length], mtp_ids=[ids[:, k : k + length] for k in range(1, depth + 1)] if mtp_weight else [])

    def mean_nats(hidden: Tensor, ahead: int) -> Tensor:
        log_probabilities = model.logits(hidden).log_softmax(-1)
        picked = [log_probabilities[b, i, ids[b, i + ahead]] for b in range(ids.shape[0]) for i in range(length)]
        return -torch.stack(picked).mean()

    main = mean_nats(output.hidden, 1)
    mtp = sum((mean_nats(hidden, k + 2) for k, hidden in enumerate(output.mtp_hidden)), torch.zeros(()))
    mtp = mtp / max(len(output.mtp_hidden), 1)
    balance = sum((stats.balance_loss for stats in output.routing), torch.zeros(()))
    return main + mtp_weight * mtp + balance_weight * balance, main, mtp


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({}, 0.0),
        ({"num_nextn_predict_layers": 1}, 0.3),
        ({"num_nextn_predict_layers": 2}, 0.3),
        ({"num_nextn_predict_layers": 2}, 0.0),
        ({"model_type": "llama"}, 0.0),
        ({"tie_word_embeddings": True}, 0.0),
    ],
)
def test_losses_and_gradients_equal_those_of_whole_logits(changes: dict[str, Any], weight: float, cap: float | None) -> None:
    model = make(**changes, logit_softcap=cap)
    ids = rows(3, 10)
    losses = compute_losses(model, ids, weight, 0.01)
    losses.total.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    total, main, mtp = naive(model, ids, weight, 0.01)
    total.backward()
    for got, wanted in ((losses.total, total), (losses.main, main), (losses.mtp, mtp)):
        torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        assert (ours[name] is None) == (p.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_token_beyond_the_targets_of_a_depth_changes_nothing_before_it() -> None:
    # The last token of a row is the target of the deepest module alone.
    model = make(num_nextn_predict_layers=1)
    ids = rows(2, 10)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 64
    first, second = (compute_losses(model, x, 0.3, 0.0) for x in (ids, other))
    assert first.main == second.main
    assert first.mtp != second.mtp


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 1}, {"model_type": "llama"}])
def test_micro_batches_give_the_gradients_and_loads_of_the_whole_batch(changes: dict[str, Any]) -> None:
    model = make(**changes)
    ids = rows(6, 18)

    def gradients(size: int) -> tuple[dict[str, Tensor], StepRouting]:
        model.zero_grad(set_to_none=True)
        routing = StepRouting()
        parts = ids.split(size)
        for part in parts:
            losses = compute_losses(model, part, 0.3 if model.mtp_modules else 0.0, 0.01)
            (losses.total / len(parts)).backward()
            routing.add(losses.routing)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, routing

    (whole, routing), (parts, routing_parts) = gradients(6), gradients(2)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    if model.moe_layers:
        assert routing.load is not None
        assert routing_parts.load is not None
        assert torch.equal(routing.load, routing_parts.load)
        torch.testing.assert_close(routing.figures(), routing_parts.figures(), rtol=1e-5, atol=1e-5)


def stats(load: list[int], entropy: float = 0.5) -> RoutingStats:
    return RoutingStats(torch.tensor(load), torch.tensor(1.0), torch.tensor(entropy), torch.tensor([]))


def test_the_figures_of_a_step_count_all_its_micro_batches() -> None:
    routing = StepRouting()
    routing.add([stats([6, 2], 0.4), stats([4, 4], 1.0)])
    routing.add([stats([0, 4], 0.6), stats([4, 4], 1.0)])
    assert routing.load is not None
    assert routing.load.tolist() == [[6, 6], [8, 8]]
    row = routing_row(torch.cat(routing.figures()).tolist())
    assert (row["max_vio"], row["max_vio_layers"]) == (0.0, [0.0, 0.0])
    assert row["entropy_layers"] == pytest.approx([0.5, 1.0])
    assert routing.shares() == [[0.5, 0.5], [0.5, 0.5]]
    routing.add([stats([12, 0]), stats([0, 0])])
    assert routing.figures()[0].tolist() == pytest.approx([18 / 12 - 1, 0])


def test_what_a_step_tells_lies_on_the_device_that_computes_it() -> None:
    """On pretended tensors of a GPU: of the stages of a pipeline, the last one or another; and of a model without experts."""
    device = torch.device("cuda")
    config = SimpleNamespace(model=ModelConfig(**SHAPE), balance=BalanceConfig())
    with FakeTensorMode():
        scalar = torch.zeros((), device=device)
        load, indices = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(1, 1, 2, device=device)
        for losses in ([], [SimpleNamespace(main=scalar, mtp=scalar)]):
            passes = object.__new__(PipelinePasses)
            passes.config, passes.device, passes.parts, passes.count = cast(Any, config), device, 1, 1

            def step(*args: Any, passes: Any = passes, losses: list[Any] = losses) -> list[Seen]:
                passes.losses = losses
                return [Seen([1], [RoutingStats(load, scalar, scalar, indices)], scalar), Seen([], [], torch.zeros(()))]

            passes.pipeline = cast(Any, SimpleNamespace(step=step))
            figures, routing = passes(cast(Any, mock.Mock()), 0.3)
            assert torch.cat([figures, scalar.unsqueeze(0), *routing.figures()]).device.type == "cuda"
        assert torch.cat([scalar.unsqueeze(0), *StepRouting().figures()]).device.type == "cuda"


def test_biases_follow_the_load_of_the_whole_step_and_not_of_a_micro_batch() -> None:
    model = make(num_hidden_layers=2)
    routing = StepRouting()
    routing.add([stats([9, 1, 5, 5])])
    routing.add([stats([0, 3, 5, 12])])  # sums: 9, 4, 10, 17; mean 10
    update_biases(model, routing, 0.5)
    assert model.moe_layers[0].gate.e_score_correction_bias.tolist() == [0.5, 0.5, 0.0, -0.5]
    update_biases(model, routing, 0.0)
    assert model.moe_layers[0].gate.e_score_correction_bias.tolist() == [0.5, 0.5, 0.0, -0.5]


def test_models_without_a_routing_bias_or_without_experts_are_left_alone() -> None:
    routing = StepRouting()
    routing.add([stats([1, 2, 3, 4])])
    update_biases(make(num_hidden_layers=2, topk_method="greedy"), routing, 0.5)
    dense = StepRouting()
    dense.add(compute_losses(make(n_routed_experts=None), rows(1, 5), 0.0, 0.1).routing)
    assert dense.load is None
    assert dense.figures() == []
