"""A teacher that tells of repetitions within the row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import SampledSoftmaxConfig, TrainConfig, UserError
from shoal.data import TokenShards
from shoal.kernels import Candidates
from shoal.model import Transformer, init_weights
from shoal.plan.budget import step_flops
from shoal.train import Trained
from shoal.train.candidates import Sampler
from shoal.train.counting import Counting, Teacher
from shoal.train.repetitions import KINDS, Repetitions, fit_trust

END = 1


def text_that_repeats(documents: int = 40, length: int = 120, vocabulary: int = 60) -> TokenShards:
    """Documents that each say a phrase of their own again and again, with other words between."""
    random = np.random.default_rng(0)
    parts = []
    for _ in range(documents):
        phrase = random.integers(2, vocabulary, 8)
        document = np.concatenate([np.concatenate([phrase, random.integers(2, vocabulary, 4)]) for _ in range(length // 12)])
        parts.append(np.append(document, END))
    tokens = np.concatenate(parts).astype(np.uint16)
    return TokenShards(tokens, np.cumsum([0, *map(len, parts)]), np.full(documents, length))


@pytest.fixture
def taught(config: TrainConfig) -> TrainConfig:
    teacher = replace(config.teacher, order=3, repetitions=True)
    return replace(config, teacher=teacher, model=replace(config.model, vocab_size=64, eos_token_id=END), sequence_length=60)


@pytest.fixture
def teacher(taught: TrainConfig) -> Teacher:
    return Teacher.of(taught, Counting(taught, text_that_repeats()))


@settings(max_examples=30)
@given(trust=st.floats(0.05, 0.9), seed=st.integers(0, 100))
def test_the_trust_is_that_of_the_mixture_that_the_text_was_drawn_from(trust: float, seed: int) -> None:
    """A hint is followed with this probability; otherwise one of 20 tokens comes, each as likely as the next."""
    random = torch.Generator().manual_seed(seed)
    number = 20_000
    followed = torch.rand(number, generator=random) < trust
    right = followed | (torch.rand(number, generator=random) < 1 / 20)
    kinds = torch.full((number,), 3)
    found = fit_trust(kinds, right, torch.full((number,), 1 / 20))
    assert found[3] == pytest.approx(trust, abs=0.03)
    assert found[0] == 0, "no hint, no trust"
    assert found.sum() == found[3], "nor in kinds that never came"


def test_no_other_trust_makes_the_text_likelier() -> None:
    random = torch.Generator().manual_seed(0)
    kinds, right = torch.randint(1, KINDS, (5000,), generator=random), torch.rand(5000, generator=random) < 0.4
    otherwise = torch.rand(5000, generator=random)
    found = fit_trust(kinds, right, otherwise)

    def likelihood(trust: torch.Tensor) -> float:
        return float((trust[kinds] * right + (1 - trust[kinds]) * otherwise).log().sum())

    best = likelihood(found)
    for change in (-0.05, 0.05):
        assert likelihood((found + change).clamp(0.001, 0.999)) < best


def test_it_trusts_long_repetitions_of_a_text_that_repeats(teacher: Teacher) -> None:
    assert teacher.repetitions is not None
    phrase = torch.tensor([[5, 9, 33, 21, 50, 7, 40, 12, 8, 8, 3, 5, 9, 33, 21, 50]])
    hints, trust = teacher.repetitions(phrase)
    assert hints[0, -4:].tolist() == [33, 21, 50, 7]
    assert (trust[0, :8] == 0).all()
    assert trust[0, -1] > 0.5
    probabilities, share = teacher(phrase)
    assert share == 0.95
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 16))
    assert probabilities[0, -1, 7] > trust[0, -1]
    counts = Teacher(teacher._config, teacher._counting)(phrase)[0]
    assert counts[0, :8].equal(probabilities[0, :8]), "what counts say where nothing is repeated"


def test_a_repetition_ends_with_its_text(teacher: Teacher) -> None:
    assert teacher.repetitions is not None
    _, trust = teacher.repetitions(torch.tensor([[5, 9, 33, END, 5, 9]]))
    assert (trust == 0).all()


@pytest.mark.parametrize("tokens", [3, 61, 130])
def test_any_text_can_be_fitted_to(tokens: int, teacher: Teacher) -> None:
    text = text_that_repeats()
    short = TokenShards(text.tokens[:tokens], np.array([0, tokens]), np.array([tokens]))
    trust = Repetitions.fit(teacher._counting.module, short, 60, END).trust
    assert trust.isfinite().all()
    assert bool(((trust >= 0) & (trust < 1)).all())


def test_with_all_tokens_as_candidates_it_is_the_loss_of_all_logits(taught: TrainConfig, teacher: Teacher) -> None:
    model = Transformer(replace(taught.model, initializer_range=0.3))
    init_weights(model, 0)
    rows = torch.from_numpy(text_that_repeats().tokens[: 5 * 61].astype(np.int64)).view(5, 61)
    ids, targets = rows[:, :-1], rows[:, 1:]
    assert teacher.repetitions is not None
    hints, trust = teacher.repetitions(ids)
    assert bool(((hints == targets) & (trust > 0.1)).any())
    assert bool(((hints != targets) & (trust > 0.1)).any()), "both kinds are there"
    sampler = Sampler(SampledSoftmaxConfig(62, 1), text_that_repeats(), 64, 0, teacher._counting.module, teacher, False)
    found = sampler(ids, targets, None)
    assert found.tokens[:, 1].equal(hints.flatten())
    probabilities, share = teacher(ids)
    right = (hints == targets).flatten()
    of_targets = share * probabilities.gather(-1, targets.unsqueeze(-1)).flatten() + 1 - share
    torch.testing.assert_close(found.shares[:, 0], of_targets)
    assert bool((found.shares[right, 1] == 0).all())
    # Where a hint is right, one of 64 tokens is left to be drawn.
    some = Candidates(*(part[~right] for part in found))
    hidden = model(ids).hidden.flatten(0, 1)[~right]
    ours = model.sampled_cross_entropy(hidden, some)
    theirs = model.cross_entropy(hidden, targets.flatten()[~right], None, (probabilities.flatten(0, 1)[~right], share))
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.nats, theirs.nats)
    one, other = (torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0] for loss in (ours.loss, theirs.loss))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("drawn", [0, 16])
def test_resumed_it_is_the_run_that_was_never_stopped(
    drawn: int, config: TrainConfig, resumed: Callable[[TrainConfig], tuple[Trained, Trained]]
) -> None:
    candidates = SampledSoftmaxConfig(8 if drawn else 0, drawn)
    config = replace(config, teacher=replace(config.teacher, order=3, repetitions=True), sampled_softmax=candidates)
    resumed(config)


def test_a_hint_is_one_candidate_more(config: TrainConfig) -> None:
    plain = replace(config, teacher=replace(config.teacher, order=3), sampled_softmax=SampledSoftmaxConfig(8, 16))
    hinted = replace(plain, teacher=replace(plain.teacher, repetitions=True))
    assert step_flops(hinted) - step_flops(plain) == pytest.approx(6 * config.model.hidden_size * config.tokens_per_step)


@pytest.mark.parametrize("changes", [{"teacher": {"order": 0}}, {"model": {"repeat_window": 16}}])
def test_where_it_has_no_place_it_is_refused(config: TrainConfig, changes: dict[str, Any]) -> None:
    teacher = replace(config.teacher, **{"order": 3, "repetitions": True, **changes.get("teacher", {})})
    with pytest.raises(UserError, match=r"set teacher\.repetitions false"):
        replace(config, teacher=teacher, model=replace(config.model, **changes.get("model", {}))).validate()
