"""Guessing ahead changes the speed and nothing else, and stops where it does not pay."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_runner import FakeRunner, continuation
from test_sampling import chi_square
from torch import Tensor

from shoal.config import EngineOptions, ModelConfig, SamplingOptions
from shoal.engine import PAGE, Batch, Engine, Forward, Request
from shoal.engine.runner import guess_step_by_step
from shoal.engine.scheduler import Sequence
from shoal.engine.speculate import MOST_BEHIND, PROBE, REST, STALE, Switch, keep_behind

VOCABULARY = 5


class Chain:
    """A model whose next token depends on the last one, and an MTP module that is somewhat wrong about it."""

    device = torch.device("cpu")
    natural_cache = "fp32"
    config = ModelConfig(vocab_size=VOCABULARY, max_position_embeddings=64, num_nextn_predict_layers=1, eos_token_id=0)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.drafted = self.table + 0.7 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)

    def allocate(self, pages: int, cache: str) -> None: ...

    def forward(self, batch: Batch) -> Forward:
        return Forward(self.table[batch.ids], None)

    def logits(self, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        return hidden

    guess = guess_step_by_step

    def draft(self, batch: Batch, hidden: Tensor, next_ids: Tensor) -> Tensor:
        return self.drafted[next_ids]

    def copy_page(self, source: int, target: int) -> None: ...


def softmax(values: np.ndarray) -> np.ndarray:
    return np.exp(values - values.max()) / np.exp(values - values.max()).sum()


def exact(table: np.ndarray, prompt: int, length: int, temperature: float, top_k: int, frequency: float) -> dict[tuple[int, ...], float]:
    """Probability of every answer, from the definitions."""
    answers = {}
    for answer in itertools.product(range(VOCABULARY), repeat=length):
        probability, last = 1.0, prompt
        for i, token in enumerate(answer):
            logits = table[last] - frequency * np.bincount(answer[:i], minlength=VOCABULARY)
            kept = logits >= np.sort(logits)[-top_k]
            probability *= softmax(np.where(kept, logits / temperature, -np.inf))[token]
            last = token
        answers[answer] = probability
    return answers


@pytest.mark.parametrize(("temperature", "top_k", "frequency"), [(1.0, VOCABULARY, 0.0), (0.7, 3, 0.0), (1.3, 4, 0.8)])
def test_sampled_answers_have_exactly_their_probabilities(temperature: float, top_k: int, frequency: float) -> None:
    runner = Chain()
    engine = Engine(runner, None, EngineOptions(speculate="on", draft_tokens=2, cache_tokens=32 * 64))  # type: ignore[arg-type]
    options = {"temperature": temperature, "top_k": top_k, "frequency_penalty": frequency, "max_tokens": 4, "ignore_eos": True}
    results = engine.run([Request([2], SamplingOptions(seed=seed, **options)) for seed in range(6000)])  # type: ignore[arg-type]
    counts = Counter(tuple(result.ids) for result in results)
    wanted = exact(runner.table.numpy(), 2, 4, temperature, top_k, frequency)
    assert sum(wanted.values()) == pytest.approx(1)
    assert chi_square(np.array([counts[answer] for answer in wanted]), 6000 * np.array(list(wanted.values()))) < 4
    assert engine.stats().acceptance is not None
    assert 0.4 < engine.stats().acceptance < 0.95  # type: ignore[operator]


def test_a_good_module_saves_steps_and_is_counted() -> None:
    runner = FakeRunner(wrong_every=4)
    engine = Engine(runner, None, EngineOptions(speculate="on"))  # type: ignore[arg-type]
    sampling = SamplingOptions(max_tokens=120, temperature=0, ignore_eos=True)
    result = engine.generate([[5, 6]], sampling)[0]
    assert result.ids == continuation([5, 6], 120, 97)
    stats = engine.stats()
    fates = Counter(token.draft for token in result.tokens)
    assert (fates["accepted"], fates["rejected"]) == (stats.accepted_tokens, stats.drafted_tokens - stats.accepted_tokens)
    assert stats.steps == 120 - stats.accepted_tokens
    assert 0.6 < stats.acceptance < 0.9  # type: ignore[operator]


def test_deeper_guesses_save_more_steps() -> None:
    steps = []
    for depth in (1, 3):
        engine = Engine(FakeRunner(wrong_every=8), None, EngineOptions(speculate="on", draft_tokens=depth))  # type: ignore[arg-type]
        engine.generate([[5, 6]], SamplingOptions(max_tokens=120, temperature=0, ignore_eos=True))
        steps.append(engine.stats().steps)
    assert steps[1] < 0.75 * steps[0]


class BreaksOff:
    """A mask that fails after some tokens, as a grammar does that has become too large."""

    is_whole = True

    def __init__(self, after: int) -> None:
        self._left = after

    def allowed(self) -> None:
        if not self._left:
            raise RuntimeError("the grammar failed")

    def accept(self, token: int) -> None:
        self._left -= 1


@pytest.mark.parametrize("after", range(1, 6))
def test_a_mask_that_fails_ends_its_own_answer_alone(after: int) -> None:
    engine = Engine(FakeRunner(wrong_every=3), None, EngineOptions(speculate="on", draft_tokens=3))  # type: ignore[arg-type]
    sampling = SamplingOptions(max_tokens=30, temperature=0, ignore_eos=True)
    broken, other = engine.run([Request([5, 6], sampling, mask=BreaksOff(after)), Request([7, 8], sampling)])
    assert broken.finish_reason == "error"
    assert "the grammar failed" in (broken.error or "")
    assert broken.ids == continuation([5, 6], after, 97)
    assert other.ids == continuation([7, 8], 30, 97)


class Clock:
    """As the engine sees it, a step takes half a second however many tokens it computes, and a pass of the module `cost`."""

    def __init__(self, runner: FakeRunner) -> None:
        self.cost = 0.0
        self._runner, self._passes, self._now = runner, 0, 0.0

    def __call__(self) -> float:
        self._now += 0.5 + self.cost * (self._runner.draft_passes - self._passes)
        self._passes = self._runner.draft_passes
        return self._now


@pytest.mark.parametrize(("cost", "pays"), [(0.0, True), (1.0, False)])
def test_guessing_goes_on_only_where_it_saves_time(cost: float, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner(context=2000, wrong_every=5)
    clock = Clock(runner)
    clock.cost = cost
    monkeypatch.setattr("shoal.engine.engine.time.perf_counter", clock)
    engine = Engine(runner, None, EngineOptions(speculate="auto", draft_tokens=1))  # type: ignore[arg-type]
    result = engine.generate([[5, 6]], SamplingOptions(max_tokens=600, temperature=0, ignore_eos=True))[0]
    assert result.ids == continuation([5, 6], 600, 97)
    guessed = sum(token.draft is not None for token in result.tokens[100:])
    assert (guessed > 200) == pays
    assert (guessed < 60) == (not pays)
    assert guessed > 0, "it looks again now and then"
    assert runner.wrong_mtp_entries == 0, "the module has caught up with what it missed"


def test_guesses_follow_prompts_that_are_long_and_prompts_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner(context=4000, wrong_every=20)
    monkeypatch.setattr("shoal.engine.engine.time.perf_counter", Clock(runner))
    engine = Engine(runner, None, EngineOptions(speculate="auto"))  # type: ignore[arg-type]
    long = [i * 7 % 89 for i in range(800)]
    turn = [*long, *continuation(long, 600, 97), 5, 9]
    for prompt, known in ((long[:100], 0), (long[:100], 99), (long, 100), (long, 799), (turn, 1376)):
        before = engine.stats().steps
        result = engine.generate([prompt], SamplingOptions(max_tokens=600, temperature=0, ignore_eos=True))[0]
        assert result.ids == continuation(prompt, 600, 97)
        assert result.prompt.cached_tokens >= known - PAGE
        assert engine.stats().steps - before < 200, f"a prompt of {len(prompt)}, {result.prompt.cached_tokens} of them known"
    assert runner.wrong_mtp_entries == 0
    assert engine.pool.match(turn).origin == len(long) - MOST_BEHIND, "whoever asks next finds the entries too"


def test_an_answer_that_did_without_guesses_for_long_takes_them_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner(context=4000, wrong_every=20)
    clock = Clock(runner)
    monkeypatch.setattr("shoal.engine.engine.time.perf_counter", clock)
    engine = Engine(runner, None, EngineOptions(speculate="auto"))  # type: ignore[arg-type]
    engine.add_request(Request([5, 6], SamplingOptions(max_tokens=3500, temperature=0, ignore_eos=True)))
    clock.cost = 9.0
    while engine.stats().steps < 1500:
        engine.step()
    assert engine.stats().drafted_tokens < 150
    clock.cost = 0.0
    while engine.has_work:
        engine.step()
    assert engine.stats().drafted_tokens > 700
    assert engine.stats().steps < 2900
    assert runner.wrong_mtp_entries == 0


def test_what_is_kept_for_the_module_holds_no_more_memory_than_its_rows() -> None:
    sequence = Sequence(0, [7] * 3000, 3000)
    for step in range(400):
        count = 1 + step % 5
        sequence.computed += count
        keep_behind(sequence, torch.zeros(100, 8), 60, count)
        rows = sum(map(len, sequence.behind))
        assert rows == sequence.computed - sequence.ahead <= MOST_BEHIND
        assert sequence.origin == sequence.ahead
        assert sum(part.untyped_storage().nbytes() for part in sequence.behind) == rows * 8 * 4
    assert rows > MOST_BEHIND - 2 * PAGE


def answer(switch: Switch, steps: int, seconds: Callable[[int], float], right: float = 0.0, number: int = 7) -> Counter[int]:
    """So many steps of an answer that is alone; which ways they went. `right`: share of the guesses that are."""
    draws, taken = np.random.default_rng(0), Counter[int]()
    for _ in range(steps):
        way = switch.guesses([number])
        fates = draws.random(way) < right
        good = way if fates.all() else int(fates.argmin())
        switch.record(1, way, min(good + 1, way), good, seconds(way))
        taken[way] += 1
    return taken


def test_the_switch_follows_a_change_of_the_machine() -> None:
    switch = Switch("auto", 1)
    assert answer(switch, 2 * PROBE, lambda way: 2.0 - way) == {0: PROBE, 1: PROBE}
    assert answer(switch, REST, lambda way: 2.0 - way)[1] > 0.8 * REST
    answer(switch, 40 * REST, lambda way: 2.0 + way)
    assert answer(switch, REST, lambda way: 2.0 + way)[1] < 0.2 * REST
    taken = set()
    for _ in range(2 * PROBE):
        taken.add(switch.guesses(list(range(8))))
        switch.record(8, max(taken), 8, 8, 1.0)
    assert taken == {0, 1}, "another size of batch is another question"


def test_guesses_that_stop_being_right_end_soon() -> None:
    switch = Switch("auto", 3)
    assert answer(switch, 3 * PROBE + 8 * REST, lambda way: 1.0 + 0.6 * way, right=0.98)[3] > 7 * REST
    assert answer(switch, 2 * REST, lambda way: 1.0 + 0.6 * way, right=0.3)[0] > REST, "long before a look would be due"


def test_a_new_text_gets_its_chance_and_no_more() -> None:
    switch = Switch("auto", 3)
    for number, (right, pays) in enumerate([(0.3, False), (0.98, True), (0.3, False), (0.9, True)]):
        taken = answer(switch, 4 * REST, lambda way: 1.0 + 0.6 * way, right, number)
        assert (taken[0] < 0.2 * taken.total()) == pays, (number, taken)
        assert (taken[0] > 0.8 * taken.total()) == (not pays), (number, taken)
    switch.guesses([4])
    assert switch.guesses([4]) > 0, "whether guesses are right is seen first"


@pytest.mark.parametrize("fastest", [0, 1, 3])
def test_the_switch_finds_how_far_ahead_pays(fastest: int) -> None:
    tokens = {0: 1, 1: 1.5, 3: 1.875}
    taken = answer(Switch("auto", 3), 20 * REST, lambda way: tokens[way] * (0.7 if way == fastest else 1), right=0.5)
    assert taken[fastest] > 0.9 * taken.total()
    assert len(taken) == 3, "it looks again now and then"


def test_what_held_up_a_measurement_is_found_out() -> None:
    switch = Switch("auto", 3)
    answer(switch, 3 * PROBE, lambda way: 1.0 + 5.0 * (way == 3), right=0.95)
    answer(switch, 2 * STALE, lambda way: 1.0 + 0.3 * way, right=0.95)
    assert answer(switch, REST, lambda way: 1.0 + 0.3 * way, right=0.95)[3] > 0.8 * REST


@pytest.mark.parametrize(("mode", "guesses"), [("on", 3), ("off", 0)])
def test_the_switch_can_be_nailed_down(mode: Any, guesses: int) -> None:
    switch = Switch(mode, 3)
    for _ in range(100):
        switch.record(1, guesses, guesses, 0, 1.0)
        assert switch.guesses([7]) == guesses
