"""Candidates in training: they stand for the whole vocabulary, and a run with them is a run like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shoal.config import ModelConfig, SampledSoftmaxConfig, TrainConfig, UserError
from shoal.data import TokenShards
from shoal.model import Transformer, init_weights
from shoal.model.counted import count_ngrams
from shoal.plan.budget import step_flops
from shoal.plan.cost import flops_per_token
from shoal.train import Trained, train
from shoal.train.candidates import Sampler
from shoal.train.loss import compute_losses

V = 24
SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2, "model_type": "llama",
    "n_routed_experts": None, "initializer_range": 0.3,
}  # fmt: skip
TEXT = TokenShards((np.arange(4000) ** 2 % 23 % np.arange(1, 4001) % V).astype(np.uint16), np.arange(0, 4001, 100), np.full(40, 200))


class OneTeacher:
    """Says what a model's counts say."""

    share = 0.7
    repetitions = None

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def keys(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.model.model.counted is not None
        return self.model.model.counted.keys(ids, torch.arange(ids.shape[1])[None], None)


def model_that_counts(**more: Any) -> Transformer:
    counts = count_ngrams(TEXT.tokens, TEXT.documents, 2, V)
    model = Transformer(ModelConfig(**SHAPE, count_order=2, count_entries=len(counts.entries), **more))
    init_weights(model, 0)
    assert model.model.counted is not None
    model.model.counted.fill(counts)
    return model


def some_rows() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(TEXT.tokens[:240].astype(np.int64)).view(6, 40)
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("likeliest", [None, 0, 5])
def test_the_weights_make_a_sample_stand_for_all(likeliest: int | None) -> None:
    """In the mean: any sum over the vocabulary, and what a teacher says."""
    model = model_that_counts()
    counted = None if likeliest is None else model.model.counted
    teacher: Any = None if likeliest is None else OneTeacher(model)
    sampler = Sampler(SampledSoftmaxConfig(likeliest or 0, 6), TEXT, V, 0, counted, teacher, False)
    ids, targets = some_rows()
    values = torch.linspace(1, 3, V)
    sums, shares = [], []
    for step in range(400):
        sampler.begin(step)
        found = sampler(ids, targets, None)
        sums.append((found.log_weights.exp() * values[found.tokens]).sum(1))
        shares.append(found.shares.sum(1))
    found_sums = torch.stack(sums)
    error = found_sums.std(0) / len(sums) ** 0.5
    assert bool(((found_sums.mean(0) - values.sum()).abs() < 4.5 * error).all()), "of every position"
    torch.testing.assert_close(found_sums.mean(), values.sum(), rtol=0.01, atol=0)
    torch.testing.assert_close(torch.stack(shares).mean(), torch.tensor(1.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("likeliest", [None, 0, 4])
def test_no_token_counts_twice_among_those_that_are_certain(likeliest: int | None) -> None:
    model = model_that_counts(repeat_window=16, eos_token_id=V - 1)
    ids, targets = some_rows()
    keys = model(ids, before=torch.full((6, model.config.looks_back), -1)).keys
    counted, certain = (None, 2) if likeliest is None else (model.model.counted, 2 + likeliest)
    found = Sampler(SampledSoftmaxConfig(likeliest or 0, 9), TEXT, V, 0, counted, None, True)(ids, targets, keys)
    assert found.tokens.shape == (ids.numel(), certain + 9)
    assert found.tokens[:, 0].equal(targets.flatten())
    assert found.tokens[:, 1].equal(keys[..., -2].flatten()), "what a repetition hints at"
    for tokens, weights in zip(found.tokens.tolist(), found.log_weights.tolist(), strict=True):
        sure = [token for token, weight in zip(tokens[:certain], weights[:certain], strict=True) if weight == 0]
        assert len({*sure}) == len(sure) >= certain - 1
        assert all((weight == -np.inf) == (token in sure) for token, weight in zip(tokens[certain:], weights[certain:], strict=True))


def test_with_all_tokens_as_candidates_it_is_the_loss_of_all_logits() -> None:
    ids, targets = some_rows()
    model = model_that_counts()
    soft = model.model.counted.probabilities(OneTeacher(model).keys(ids))[0], OneTeacher.share  # type: ignore[union-attr]
    for teacher in (None, OneTeacher(model)):
        sampler = Sampler(SampledSoftmaxConfig(V - 1, 1), TEXT, V, 0, model.model.counted, teacher, False)  # type: ignore[arg-type]
        output = model(ids)
        ours = model.sampled_cross_entropy(output.hidden, sampler(ids, targets, output.keys), output.keys)
        theirs = model.cross_entropy(output.hidden, targets, output.keys, None if teacher is None else soft)
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.nats, theirs.nats)
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (ours.loss, theirs.loss)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_candidates_have_the_logits_that_the_model_gives_them() -> None:
    model = model_that_counts(repeat_window=16, eos_token_id=V - 1)
    ids, targets = some_rows()
    output = model(ids, before=torch.full((6, model.config.looks_back), -1))
    found = Sampler(SampledSoftmaxConfig(4, 9), TEXT, V, 0, model.model.counted, None, True)(ids, targets, output.keys)
    logits = model.logits(output.hidden, output.keys).flatten(0, 1).gather(1, found.tokens)
    network = output.hidden.flatten(0, 1)
    products = [network @ vector for vector in model.look_ups.trusts]
    added = model.look_ups.additions(found, output.keys.flatten(0, 1), products)
    plain = torch.einsum("nd,ncd->nc", network, model.lm_head.weight[found.tokens])
    counts = found.log_weights > -torch.inf
    torch.testing.assert_close((plain + added)[counts], logits[counts], atol=1e-4, rtol=1e-4)


def sampled(config: TrainConfig, kind: str) -> TrainConfig:
    if kind == "prior":
        config = replace(config, model=replace(config.model, count_order=3, repeat_window=32))
    if kind == "teacher":
        config = replace(config, teacher=replace(config.teacher, order=3))
    return replace(config, sampled_softmax=SampledSoftmaxConfig(0 if kind == "plain" else 8, 16))


@pytest.mark.parametrize("kind", ["plain", "teacher", "prior"])
def test_a_run_learns_about_as_much_and_resumes_to_the_same_bits(
    kind: str, config: TrainConfig, resumed: Callable[[TrainConfig], tuple[Trained, Trained]]
) -> None:
    config = sampled(config, kind)
    exact = train(replace(config, sampled_softmax=SampledSoftmaxConfig(), out=f"{config.out}-exact"))
    whole, _ = resumed(config)
    assert whole.summary["val_bpb"] < 1.1 * exact.summary["val_bpb"]
    assert whole.summary["train_flops"] == pytest.approx(whole.summary["steps"] * step_flops(config), rel=1e-9)
    assert whole.summary["train_flops"] < exact.summary["train_flops"]


def test_multi_token_prediction_learns_from_the_candidates_of_the_position_it_predicts() -> None:
    """With all tokens as candidates: the loss of all logits, where there are candidates."""
    model = Transformer(ModelConfig(**{**SHAPE, "model_type": "deepseek_v3"}, num_nextn_predict_layers=2))
    init_weights(model, 0)
    counting = model_that_counts()
    rows = torch.from_numpy(TEXT.tokens[:240].astype(np.int64)).view(6, 40)
    sampler = Sampler(SampledSoftmaxConfig(V - 1, 1), TEXT, V, 0, counting.model.counted, None, False)
    sampler._teacher = OneTeacher(counting)  # type: ignore[assignment]
    losses = compute_losses(model, rows, 0.3, 0.0, sampler=sampler)
    length = rows.shape[1] - 3
    output = model(rows[:, :length], mtp_ids=[rows[:, k : k + length] for k in (1, 2)])
    assert counting.model.counted is not None
    soft = counting.model.counted.probabilities(OneTeacher(counting).keys(rows[:, :length]))[0]
    learnt, nats = [], []
    for depth, hidden in enumerate(output.mtp_hidden, 1):
        targets = rows[:, 1 + depth : 1 + length]
        wanted = model.cross_entropy(hidden[:, : length - depth], targets, None, (soft[:, depth:], OneTeacher.share))
        learnt.append(wanted.loss / wanted.counted)
        nats.append(wanted.nats / wanted.counted)
    torch.testing.assert_close(losses.mtp, torch.stack(nats).mean())
    main = model.cross_entropy(output.hidden, rows[:, 1 : 1 + length], None, (soft, OneTeacher.share))
    torch.testing.assert_close(losses.total, main.loss / main.counted + 0.3 * torch.stack(learnt).mean())


@pytest.mark.parametrize("begins", [0.0, 0.6])
def test_a_run_with_multi_token_prediction_spends_what_was_planned(
    begins: float, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(config.model, num_nextn_predict_layers=1)
    config = replace(sampled(config, "teacher"), model=model, mtp=replace(config.mtp, begins=begins), steps=20)
    begun, begin = [], Sampler.begin
    monkeypatch.setattr(Sampler, "begin", lambda sampler, step: begun.append(step) or begin(sampler, step))
    run = train(config)
    assert begun == list(range(20))
    assert run.summary["train_flops"] == pytest.approx(20 * step_flops(config), rel=1e-9)
    wide = replace(config, model=replace(model, vocab_size=512))
    head = flops_per_token(wide.model, wide.sequence_length, training=True).head
    saved = step_flops(replace(wide, sampled_softmax=SampledSoftmaxConfig())) - step_flops(wide)
    assert saved == pytest.approx(config.tokens_per_step * head * (1 - (1 + 8 + 16) / 512) * (2 - begins)), "of both heads"


def test_the_head_costs_what_its_candidates_cost(config: TrainConfig) -> None:
    config = replace(sampled(config, "teacher"), model=replace(config.model, vocab_size=512))
    head = flops_per_token(config.model, config.sequence_length, training=True).head
    saved = step_flops(replace(config, sampled_softmax=SampledSoftmaxConfig())) - step_flops(config)
    assert saved == pytest.approx(config.tokens_per_step * head * (1 - (1 + 8 + 16) / 512))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"likeliest": 4}, "needs others beside it"),
        ({"drawn": -1}, "0 or more"),
        ({"likeliest": 4, "drawn": 4}, "only counts know"),
        ({"drawn": 4, "cap": 15.0}, "logit_softcap"),
        ({"likeliest": 10**6, "drawn": 4}, "there are only"),
    ],
)
def test_what_cannot_be_sampled_is_refused(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    model = replace(config.model, logit_softcap=settings.pop("cap", None))
    with pytest.raises(UserError, match=message):
        replace(config, model=model, sampled_softmax=SampledSoftmaxConfig(**settings)).validate()


def test_a_tokenizer_that_came_out_smaller_is_noticed(config: TrainConfig) -> None:
    model = replace(config.model, vocab_size=4096)
    with pytest.raises(UserError, match="there are only"):
        train(replace(sampled(config, "teacher"), model=model, sampled_softmax=SampledSoftmaxConfig(4000, 4)))
