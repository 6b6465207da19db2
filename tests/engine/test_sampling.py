"""One token at a time: against transformers' own processors, and against exact probabilities."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import SamplingOptions, UserError
from shoal.engine import race as race_module
from shoal.engine.race import _GOLDEN, NEVER, Room, _draw, _times, race_start, race_times
from shoal.engine.sampling import Rows, Sampler, SamplingError, log_probabilities, most_likely
from shoal.kernels.serving import draw_rows

SIZE = 40
logits_of = st.integers(0, 10_000).map(lambda seed: np.random.default_rng(seed).normal(size=SIZE).astype(np.float32) * 3)


def sampler(prompt: Any = (1,), mask: Any = None, eos: Any = (0,), size: int = SIZE, **options: Any) -> Sampler:
    return Sampler(SamplingOptions(**options), prompt, size, eos, mask)


def of_rows(logits: torch.Tensor, *samplers: Sampler, position: int = 5) -> Rows:
    return Rows(logits, [(one, position) for one in samplers], Room())


def probabilities(one: Sampler, logits: np.ndarray) -> np.ndarray:
    ids, weights = one.candidates(one.adjust(logits))
    dense = np.zeros(len(logits))
    dense[ids] = weights / weights.sum()
    return dense


@settings(max_examples=150)
@given(
    logits_of,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 3, SIZE, 2 * SIZE]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([1.0, 0.7, 1.5]),
)
def test_the_distribution_is_that_of_transformers(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    chain = [processors.RepetitionPenaltyLogitsProcessor(penalty), processors.TemperatureLogitsWarper(temperature)]
    chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
    chain += [processors.TopPLogitsWarper(top_p), processors.MinPLogitsWarper(min_p)]
    seen, scores = torch.tensor([[3, 5, 5, 7]]), torch.from_numpy(logits)[None].double()
    for processor in chain:
        scores = processor(seen, scores)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": penalty}
    one = sampler([3, 5, 5], **options)
    one.accept(7)
    np.testing.assert_allclose(probabilities(one, logits), scores.softmax(-1)[0].numpy(), atol=1e-6)


def test_penalties_count_the_answer_and_not_the_prompt() -> None:
    logits = np.zeros(SIZE, np.float32)
    one = sampler([9, 9], presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0, 4: -math.inf})
    for token in (7, 7, 8):
        one.accept(token)
    adjusted = one.adjust(logits)
    assert adjusted[[7, 8, 9, 10, 4]].tolist() == [-1.0, -0.75, 2.0, 0.0, -math.inf]
    assert not logits.any(), "the model's logits stay as they are"


def test_greedy_takes_the_largest_also_in_rows_and_with_penalties() -> None:
    logits = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    assert [of_rows(logits, *[sampler(temperature=0)] * 3).choose(i) for i in range(3)] == best
    banned, tiny = sampler(temperature=0, logit_bias={best[0]: -100.0}), sampler(temperature=1e-6)
    assert of_rows(logits, banned).choose(0) == int(logits[0].topk(2).indices[1])
    assert of_rows(logits, tiny).choose(0) == best[0], "a tiny temperature must not overflow"


def test_stop_tokens_are_held_back_until_there_are_enough_tokens() -> None:
    logits = torch.zeros(1, SIZE)
    logits[0, [0, 6]] = 9.0
    one = sampler(temperature=0, min_tokens=2, stop_token_ids=(6,), eos=(0, 1))
    for _ in range(2):
        assert of_rows(logits, one).choose(0) not in (0, 6)
        one.accept(3)
    assert of_rows(logits, one).choose(0) in (0, 6)
    assert one.stops == {0, 1, 6}
    assert sampler(ignore_eos=True, stop_token_ids=(6,)).stops == {6}


class Digits:
    """Allows 3 and 4 in turn."""

    is_whole = True

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray | None:
        allowed = np.zeros(SIZE, bool)
        allowed[3 + len(self.accepted) % 2] = True
        return None if len(self.accepted) == 2 else allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_decides_until_it_lets_go(temperature: float) -> None:
    logits = torch.zeros(1, SIZE)
    logits[0, 20] = 50.0
    one, made = sampler(temperature=temperature, seed=1, mask=Digits()), []
    for position in range(4):
        made.append(of_rows(logits, one, position=position).choose(0))
        one.accept(made[-1])
    assert made == [3, 4, 20, 4]


@settings(max_examples=40)
@given(
    st.integers(0, 1000), st.lists(st.sampled_from([0.0, 0.05, 1.0, 2.5]), min_size=1, max_size=20), st.sampled_from([1, 3 * SIZE, 1 << 15])
)
def test_a_batch_drawn_at_once_is_each_drawn_by_itself(seed: int, temperatures: list[float], at_once: int) -> None:
    logits = torch.randn(len(temperatures), SIZE, generator=torch.Generator().manual_seed(seed)) * 4
    logits[:, seed % SIZE] = -math.inf
    special: list[dict[str, Any]] = [{}, {"top_k": 3}, {"min_tokens": 2}, {"logit_bias": {3: 9.0}}]
    places = [(sampler(temperature=t, seed=seed + i, **special[(seed + i) % 4]), 5 + i) for i, t in enumerate(temperatures)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race_module, "DRAWN_AT_ONCE", at_once)
        rows = Rows(logits, places, Room())
    expected = [one.choose(logits[i].numpy(), position) for i, (one, position) in enumerate(places)]
    assert [rows.choose(i) for i in range(len(places))] == expected


def test_rows_that_are_not_numbers_do_not_disturb_the_others() -> None:
    logits = torch.zeros(3, SIZE)
    logits[1] = math.nan
    places = [(sampler(temperature=1.0, seed=i), 5) for i in range(3)]
    rows = Rows(logits, places, Room())
    assert [rows.choose(i) for i in (0, 2)] == [places[i][0].choose(logits[i].numpy(), 5) for i in (0, 2)]
    with pytest.raises(SamplingError, match="not numbers"):
        rows.choose(1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_logits_from_which_nothing_can_be_chosen_are_an_error(value: float, temperature: float) -> None:
    logits = torch.zeros(2, SIZE)
    logits[0] = value
    rows = of_rows(logits, *[sampler(temperature=temperature)] * 2)
    with pytest.raises(SamplingError):
        rows.choose(0)
    assert 0 <= rows.choose(1) < SIZE


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for options in ({"logit_bias": {SIZE: 1.0}}, {"stop_token_ids": (-1,)}):
        with pytest.raises(UserError, match="not in the vocabulary"):
            sampler(**options)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations above its mean; rare outcomes are put together."""
    order = np.argsort(-expected)
    counts, expected = counts[order], expected[order]
    common = max(int((expected >= 8).sum()), 1)
    counts = np.append(counts[:common], counts[common:].sum())
    expected = np.append(expected[:common], expected[common:].sum())
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_probabilities(vary: str) -> None:
    logits = np.random.default_rng(0).normal(size=SIZE).astype(np.float32) * 2
    one = sampler(temperature=0.8, seed=0)
    counts = np.zeros(SIZE)
    for i in range(20_000):
        one.seed = i if vary == "seed" else 7
        counts[one.choose(logits, i if vary == "position" else 7)] += 1
    assert chi_square(counts, 20_000 * probabilities(one, logits)) < 4


def test_neighbouring_draws_are_independent() -> None:
    """Pairs (this position, the next; this seed, the next) fill the square evenly."""
    ids = np.arange(4)
    for step in ((0, 1), (1, 0), (1, 1)):
        pairs: Counter[tuple[int, int]] = Counter()
        for i in range(16_000):
            here, there = race_times(race_start(5 + i, 3 * i), ids), race_times(race_start(5 + i + step[0], 3 * i + step[1]), ids)
            pairs[int(here.argmin()), int(there.argmin())] += 1
        counts = np.array([pairs[a, b] for a in range(4) for b in range(4)])
        assert chi_square(counts, np.full(16, 1000.0)) < 4


def test_the_numbers_of_a_race_are_exponential() -> None:
    times = np.sort(race_times(race_start(3, 4), np.arange(100_000)))
    uniform = 1 - np.exp(-times)
    assert np.abs(uniform - np.linspace(0, 1, len(times))).max() < 1.63 / math.sqrt(len(times)), "Kolmogorov-Smirnov, 1%"
    assert times[0] > 0
    assert np.isfinite(times[-1])


def test_log_probabilities_and_the_most_likely() -> None:
    logits = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32) * 20
    wanted = torch.from_numpy(logits).log_softmax(-1)
    np.testing.assert_allclose(log_probabilities(logits), wanted.numpy(), rtol=1e-5, atol=1e-5)
    values, ids = wanted[0].topk(5)
    top = most_likely(log_probabilities(logits)[0], 5)
    assert [token for token, _ in top] == ids.tolist()
    assert [value for _, value in top] == pytest.approx(values.tolist(), rel=1e-4)
    assert most_likely(log_probabilities(logits)[0], 0) == ()
    assert len(most_likely(log_probabilities(logits)[0], 2 * SIZE)) == SIZE


def race(table: np.ndarray, temperatures: list[float], starts: list[int]) -> np.ndarray:
    """How fast every token of every row is, in double precision: the largest wins."""
    counters = np.arange(table.shape[1], dtype=np.uint64) * np.uint64(_GOLDEN) + np.array(starts, np.uint64)[:, None]
    heats = np.array(temperatures)[:, None]
    scores = (table - table.max(1, keepdims=True)).astype(np.float64) / heats
    return np.where(scores < -NEVER, 0.0, np.exp(scores) / _times(counters))


@given(
    vocab=st.sampled_from([1, 2, 15, 16, 100, 127, 128, 129, 1000, 4096, 5003]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]),
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0, 100.0]),
    rows=st.lists(st.integers(0, 5), min_size=4, max_size=6),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150)
def test_the_kernel_draws_what_numpy_draws(vocab: int, spread: float, temperature: float, rows: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    table = (spread * draw.standard_normal((6, vocab))).astype(np.float32)
    temperatures = [temperature] * len(rows)
    starts = [int(start) for start in draw.integers(0, 2**64, len(rows), np.uint64)]
    winners = draw_rows(table, rows, temperatures, starts)
    if winners is None:
        pytest.skip("no C++ kernels")
    specified = _draw(table, rows, temperatures, starts, Room())
    if not temperature:
        assert winners == specified == table[rows].argmax(1).tolist()
        return
    speeds = race(table[rows], temperatures, starts)
    for speed, here, there in zip(speeds, winners, specified, strict=True):
        assert speed[here] == pytest.approx(speed[there], rel=1e-6)  # the same token, or one that is as fast but for rounding


def test_the_kernel_leaves_out_rows_without_a_finite_maximum() -> None:
    table = np.zeros((5, 300), np.float32)
    table[1, 7], table[2, 299], table[3], table[4, 1:] = np.nan, np.inf, -np.inf, -np.inf
    winners = draw_rows(table, [0, 1, 2, 3, 4], [1.0] * 5, [5] * 5)
    if winners is None:
        pytest.skip("no C++ kernels")
    assert winners[0] >= 0
    assert winners[1:] == [-1, -1, -1, 0]
    assert _draw(table, [0, 1, 2, 3, 4], [1.0] * 5, [5] * 5, Room()) == winners
