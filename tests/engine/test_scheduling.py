"""Long random lives of an engine: no page is lost, nobody starves, nobody gets somebody else's pages."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_runner import FakeRunner, check_pages, continuation
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.config import EngineOptions, SamplingOptions, UserError
from shoal.engine import PAGE, Engine, Request, Result

BEGINNINGS = [[i * 7 % 89 for i in range(length)] for length in (0, 20, 31, 32, 33, 64, 90, 128)]


class Life:
    """An engine with a fake runner, what was asked of it and what it answered."""

    def __init__(self, options: EngineOptions, mtp: bool) -> None:
        self.runner = FakeRunner(mtp=mtp)
        self.engine = Engine(self.runner, None, options)  # type: ignore[arg-type]
        self.open: dict[int, tuple[Request, Result]] = {}
        self.finished = 0

    def add(self, beginning: int, ending: list[int], max_tokens: int) -> None:
        prompt = [*BEGINNINGS[beginning], *ending]
        request = Request(prompt, SamplingOptions(max_tokens=max_tokens, temperature=0, ignore_eos=True))
        room = self.engine.pool.pages * PAGE
        if not prompt or len(prompt) + 1 > room:
            with pytest.raises(UserError):
                self.engine.add_request(request)
            return
        self.open[self.engine.add_request(request)] = request, Result(len(prompt))

    def step(self) -> None:
        before = self.engine.stats()
        oldest = min(self.open, default=None)
        progress = self._progress(oldest)
        for number, increment in self.engine.step().items():
            request, result = self.open[number]
            result.add(increment)
            if increment.finish_reason:
                del self.open[number]
                self.check(request, result)
        if before.running + before.waiting:
            assert self.engine.stats().steps == before.steps + 1
        # Whoever is the oldest gets on with every step, so everybody is served in the end.
        assert oldest is None or oldest not in self.open or self._progress(oldest) > progress

    def _progress(self, number: int | None) -> int:
        if number is None:
            return 0
        sequence = self.engine._answers[number].sequence
        return sequence.computed + len(sequence.tokens)

    def check(self, request: Request, result: Result) -> None:
        self.finished += 1
        count = min(request.sampling.max_tokens, min(400, self.engine.pool.pages * PAGE) - len(request.prompt))
        assert result.finish_reason == "length"
        assert result.ids == continuation(list(request.prompt), count, 97)

    def abort(self, which: int) -> None:
        if self.open:
            number = sorted(self.open)[which % len(self.open)]
            del self.open[number]
            last = self.engine.abort(number)
            assert last is not None
            assert last.finish_reason == "abort"
            assert self.engine.abort(number) is None

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.open:
                break
            self.step()
        assert not self.open
        assert not self.engine.has_work
        check_pages(self.engine)
        assert self.runner.wrong_mtp_entries == 0


SETUPS: list[dict[str, Any]] = [
    {"cache_tokens": 12 * PAGE, "max_running": 6, "step_tokens": 16, "speculate": "on"},
    {"cache_tokens": 9 * PAGE, "max_running": 9, "step_tokens": 64, "speculate": "on", "draft_tokens": 4},
    {"cache_tokens": 20 * PAGE, "max_running": 4, "step_tokens": 7, "speculate": "off"},
    {"cache_tokens": 10 * PAGE, "max_running": 8, "step_tokens": 40, "speculate": "auto", "prefix_cache": False},
    {"cache_tokens": 6 * PAGE, "max_running": 2, "step_tokens": 3, "speculate": "auto", "draft_tokens": 2},
]


class EngineMachine(RuleBasedStateMachine):
    @initialize(setup=st.sampled_from(SETUPS), mtp=st.booleans())
    def start(self, setup: dict[str, Any], mtp: bool) -> None:
        self.life = Life(EngineOptions(**setup), mtp)

    @rule(beginning=st.integers(0, 7), ending=st.lists(st.integers(0, 96), max_size=5), max_tokens=st.integers(1, 80))
    def add(self, beginning: int, ending: list[int], max_tokens: int) -> None:
        self.life.add(beginning, ending, max_tokens)

    @precondition(lambda self: self.life.open)
    @rule(which=st.integers(0, 50))
    def abort(self, which: int) -> None:
        self.life.abort(which)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.life.step()

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "life"):
            check_pages(self.life.engine)

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.finish()


EngineMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, suppress_health_check=list(HealthCheck), derandomize=True
)
test_any_life = EngineMachine.TestCase


def test_guesses_leave_prompts_half_of_a_step() -> None:
    engine = Engine(FakeRunner(wrong_every=0), None, EngineOptions(speculate="on", max_running=16, step_tokens=64))  # type: ignore[arg-type]
    for i in range(15):
        engine.add_request(Request([i, 3], SamplingOptions(max_tokens=300, temperature=0, ignore_eos=True)))
    for _ in range(12):
        engine.step()
    prompt = engine.add_request(Request([5] * 300, SamplingOptions(max_tokens=1, temperature=0)))
    before = engine.stats().generated_tokens
    steps = 1
    while prompt not in engine.step():
        steps += 1
    assert steps <= 300 / ((64 - 16) / 2) + 1
    assert (engine.stats().generated_tokens - before) / steps > 2 * 15  # and answers still gain by guesses


@pytest.mark.parametrize("setup", range(len(SETUPS)))
def test_ten_thousand_operations(setup: int) -> None:
    draw = random.Random(setup)
    life = Life(EngineOptions(**SETUPS[setup]), mtp=setup != 2)
    for operation in range(10_000):
        kind = draw.random()
        if kind < 0.15 and len(life.open) < 20:
            ending = [draw.randrange(97) for _ in range(draw.randrange(6))]
            life.add(draw.randrange(8), ending, draw.choice([1, 2, 5, 20, 70]))
        elif kind < 0.19:
            life.abort(draw.randrange(100))
        else:
            life.step()
        if operation % 20 == 0:
            check_pages(life.engine)
    life.finish()
    assert life.finished > 250
    assert life.engine.stats().preemptions > 0 or setup in (2, 4)
    assert (life.runner.draft_passes > 0) == (setup != 2)
    life.engine.pool.forget_all()
    assert life.engine.pool.known == 0
    check_pages(life.engine)


@pytest.mark.parametrize(
    "setup", [{"cache_tokens": 20 * PAGE, "max_running": 4}, {"cache_tokens": 60 * PAGE, "max_running": 6, "draft_tokens": 1}]
)
def test_whenever_guesses_are_wanted_the_module_sees_right_entries_alone(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    draw, way = random.Random(0), 0

    def guesses(switch: object, answering: list[int]) -> int:
        nonlocal way
        if draw.random() < 0.03:
            way = draw.choice((0, 1, setup.get("draft_tokens", 3)))
        return way

    monkeypatch.setattr("shoal.engine.engine.Switch.guesses", guesses)
    monkeypatch.setattr("shoal.engine.speculate.MOST_BEHIND", 40)
    life = Life(EngineOptions(**{"step_tokens": 50, "max_running": 6} | setup), mtp=True)
    for _ in range(3000):
        if draw.random() < 0.05 and len(life.open) < 8:
            life.add(draw.randrange(8), [draw.randrange(2) for _ in range(draw.randrange(6))], draw.choice([1, 20, 150]))
        life.step()
    life.finish()
    assert life.runner.draft_passes > 500
