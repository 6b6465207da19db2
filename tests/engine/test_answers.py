"""What an answer holds and how it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_runner import FakeRunner, continuation
from hypothesis import given
from hypothesis import strategies as st
from tests.foreign import foreign

from shoal.config import EngineOptions, SamplingOptions, UserError
from shoal.data import Tokenizer, train_tokenizer
from shoal.engine import Engine, Increment, Request, Result
from shoal.engine.answer import stop_set
from shoal.engine.text import StopStrings
from shoal.model import Transformer

PROMPT = [3 * i % 61 + 2 for i in range(45)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the fish été 😀 swims over the reef " * 30], 330)


class Speaker(FakeRunner):
    """Says a text, whatever it is asked."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        super().__init__(vocab_size=tokenizer.vocab_size, mtp=False)
        self._ids = [*tokenizer.encode(text), tokenizer.eos_id]
        self.said = 0

    def logits(self, hidden: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        logits[:, self._ids[min(self.said, len(self._ids) - 1)]] = 9.0
        self.said += 1
        return logits


def say(tokenizer: Tokenizer, text: str, **options: Any) -> tuple[list[Increment], Result]:
    engine = Engine(Speaker(tokenizer, text), tokenizer)  # type: ignore[arg-type]
    engine.add_request(Request([5], SamplingOptions(temperature=0, **options)))
    increments, result = [], Result(1)
    while engine.has_work:
        for increment in engine.step().values():
            increments.append(increment)
            result.add(increment)
    assert engine.pool.in_use == 0
    return increments, result


def test_a_text_ends_with_end_of_text(tokenizer: Tokenizer) -> None:
    increments, result = say(tokenizer, "the été 😀 swims")
    assert (result.text, result.finish_reason, result.stopped_by) == ("the été 😀 swims", "stop", tokenizer.eos_id)
    assert result.ids[-1] == tokenizer.eos_id
    assert not any("\ufffd" in increment.text for increment in increments)
    assert sum(increment.text != "" for increment in increments) > 3, "it comes in pieces"
    assert [increment.finish_reason for increment in increments[:-1]] == [None] * (len(increments) - 1)


def test_what_is_said_goes_on_behind_the_prompt() -> None:
    tokenizer = foreign("prepend")
    engine = Engine(Speaker(tokenizer, "swims over"), tokenizer)  # type: ignore[arg-type]
    for prompt, text in (("the red fish", " swims over"), ("the red fish</s>", "swims over")):
        engine.runner.said = 0  # type: ignore[attr-defined]
        [result] = engine.run([Request(tokenizer.encode(prompt, bos=True, special=True), SamplingOptions(temperature=0))])
        assert result.text == text


def test_a_stop_string_across_tokens_never_shows(tokenizer: Tokenizer) -> None:
    increments, result = say(tokenizer, "the fish swims 😀 over", stop=("h sw", "zebra"))
    assert (result.text, result.finish_reason, result.stopped_by) == ("the fis", "stop", "h sw")
    shown = ""
    for increment in increments:
        shown += increment.text
        assert "the fis".startswith(shown)
    assert say(tokenizer, "the fish swims 😀 over", stop=("h swX",))[1].text == "the fish swims 😀 over"


def test_what_may_be_a_stop_string_is_shown_when_the_answer_ends(tokenizer: Tokenizer) -> None:
    result = say(tokenizer, "the fish", stop=("fish and more",))[1]
    assert (result.text, result.finish_reason) == ("the fish", "stop")
    result = say(tokenizer, "the fish swims", stop=(" swims over",), max_tokens=len(tokenizer.encode("the fish swims")))[1]
    assert (result.text, result.finish_reason, result.stopped_by) == ("the fish swims", "length", None)


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U0010ffff")
    assert say(tokenizer, "a\U0010ffff", max_tokens=len(ids) - 1)[1].text == tokenizer.decode(ids[:-1])


def test_stop_tokens_and_least_lengths(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fish swims over the reef")
    result = say(tokenizer, "the fish swims over the reef", stop_token_ids=(ids[2],))[1]
    assert (result.ids, result.text, result.stopped_by) == (ids[:3], tokenizer.decode(ids[:2]), ids[2])
    result = say(tokenizer, "the fish swims", min_tokens=8, max_tokens=20)[1]
    assert len(result.ids) >= 8
    assert say(tokenizer, "the", ignore_eos=True, max_tokens=9)[1].finish_reason == "length"
    assert "the" in say(tokenizer, "the fish swims the", min_tokens=3, stop=("the",))[1].text


def test_a_text_ends_with_any_token_that_the_model_names_as_an_end(tokenizer: Tokenizer) -> None:
    text = "the fish swims over the reef"
    ids = tokenizer.encode(text)
    runner = Speaker(tokenizer, text)
    runner.config = replace(runner.config, extra={"eos_token_id": [tokenizer.eos_id, ids[2]]})
    result = Engine(runner, tokenizer).generate([[5]], SamplingOptions(temperature=0, max_tokens=20))[0]  # type: ignore[arg-type]
    assert (result.ids, result.finish_reason) == (ids[:3], "stop")
    assert set(stop_set(tokenizer, runner.config)) == {tokenizer.eos_id, ids[2]}
    assert set(stop_set(tokenizer, replace(runner.config, extra={}, eos_token_id=ids[2]))) == {tokenizer.eos_id, ids[2]}
    assert set(stop_set(None, replace(runner.config, extra={}, eos_token_id=None))) == set()


pieces = st.lists(st.text(alphabet="abc", max_size=4), max_size=8)


@given(pieces, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_do_not_depend_on_how_a_text_is_cut(cuts: list[str], stops: list[str]) -> None:
    text = "".join(cuts)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    wanted = text
    if ends:
        first = min(ends)
        wanted = text[: min(first - len(stop) for stop in stops if text[:first].endswith(stop))]
    matcher, shown = StopStrings(stops), ""
    for piece in cuts:
        shown += matcher.push(piece)
        assert wanted.startswith(shown)
        if matcher.found is not None:
            break
    else:
        shown += matcher.finish()
    assert shown == wanted
    assert (matcher.found is not None) == bool(ends)


@torch.no_grad()
def reference(model: Transformer, ids: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([ids])).hidden[0]).log_softmax(-1)


def test_log_probabilities_are_those_of_a_plain_pass(model: Transformer, make_runner: Any) -> None:
    engine = Engine(make_runner(model), None, EngineOptions(step_tokens=16, max_running=2))
    sampling = SamplingOptions(max_tokens=6, temperature=0.7, seed=1, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    for _ in range(2):  # the second time the cache knows the prompt, which still has to be scored
        result = engine.generate([PROMPT], sampling)[0]
        wanted = reference(model, PROMPT + result.ids)
        report = result.prompt.logprobs
        assert report is not None
        assert report[0].logprob is None
        scored = [*report[1:], *result.tokens]
        assert [token.id for token in scored] == (PROMPT + result.ids)[1:]
        for i, token in enumerate(scored):
            assert token.logprob == pytest.approx(float(wanted[i, token.id]), abs=1e-4)
            values, ids = wanted[i].topk(len(token.top))
            assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert [name for name, _ in token.top] == ids.tolist()
        assert {len(token.top) for token in scored[:-6]} == {2}
        assert {len(token.top) for token in scored[-6:]} == {3}


@torch.no_grad()
def test_scores_and_embeddings_are_those_of_a_plain_pass(model: Transformer, make_runner: Any) -> None:
    engine = Engine(make_runner(model), None, EngineOptions(step_tokens=16, max_running=4))
    texts = [PROMPT, [5], PROMPT[:20]]
    for text, scores in zip(texts, engine.score(texts), strict=True):
        wanted = reference(model, text)[torch.arange(len(text) - 1), text[1:]]
        assert scores == pytest.approx(wanted.tolist(), abs=1e-4)
    embedded = engine.embed(texts)
    for text, vector in zip(texts, embedded, strict=True):
        np.testing.assert_allclose(vector, model(torch.tensor([text])).hidden[0].mean(0).numpy(), atol=1e-4)
    assert engine.stats().generated_tokens == 0
    assert engine.pool.in_use == 0


@torch.no_grad()
def test_the_experts_of_every_token_are_those_that_the_router_chose(v3: Transformer, make_runner: Any) -> None:
    engine = Engine(make_runner(v3), None, EngineOptions(step_tokens=16, max_running=2, speculate="on"))
    engine.generate([PROMPT], SamplingOptions(max_tokens=1, temperature=0))
    before = engine.stats().expert_load
    assert before is not None
    result = engine.run([Request(PROMPT, SamplingOptions(max_tokens=5, temperature=0, ignore_eos=True), experts=True)])[0]
    output = v3(torch.tensor([PROMPT + result.ids[:-1]]))
    wanted = torch.stack([stats.indices[0] for stats in output.routing]).sort(-1).values.numpy()
    assert result.prompt.experts is not None
    np.testing.assert_array_equal(np.sort(result.prompt.experts), wanted[:, : len(PROMPT)])
    for i, token in enumerate(result.tokens):
        assert token.experts is not None
        np.testing.assert_array_equal(np.sort(token.experts), wanted[:, len(PROMPT) - 1 + i])
    load = engine.stats().expert_load - before
    assert load.shape == (1, 8)
    assert load.sum() >= wanted.size


@torch.no_grad()
@pytest.mark.parametrize("speculate", ["off", "on"])
def test_a_prompt_is_reported_as_it_is_whatever_is_guessed(v3: Transformer, make_runner: Any, speculate: Any) -> None:
    """Its last piece is one token long, and guesses are checked in the same step."""
    engine = Engine(make_runner(v3), None, EngineOptions(step_tokens=len(PROMPT) - 1, max_running=2, speculate=speculate))
    sampling = SamplingOptions(max_tokens=4, temperature=0, ignore_eos=True, prompt_logprobs=1)
    report = engine.run([Request(PROMPT, sampling, experts=True, embed=True)])[0].prompt
    output = v3(torch.tensor([PROMPT]))
    wanted = torch.stack([stats.indices[0] for stats in output.routing]).sort(-1).values.numpy()
    assert report.experts is not None
    np.testing.assert_array_equal(np.sort(report.experts), wanted)
    assert report.embedding is not None
    np.testing.assert_allclose(report.embedding, output.hidden[0].mean(0).numpy(), atol=1e-4)
    assert report.logprobs is not None
    assert [token.id for token in report.logprobs] == PROMPT


BAD: list[tuple[list[int], dict[str, Any], str]] = [
    ([], {}, "empty"),
    ([1, 97], {}, "not in the vocabulary"),
    ([-1], {}, "not in the vocabulary"),
    ([5] * 400, {}, "400 tokens, the model sees 400: shorten it"),
    ([5] * 320, {}, "320 tokens, the cache holds 320"),
    ([5], {"stop": ("a",)}, "tokenizer"),
    ([5], {"temperature": -1.0}, "temperature"),
    ([5], {"logit_bias": {97: 1.0}}, "vocabulary"),
]


@pytest.mark.parametrize(("prompt", "options", "complaint"), BAD)
def test_what_can_never_be_served_is_refused_at_once(prompt: list[int], options: dict[str, Any], complaint: str) -> None:
    engine = Engine(FakeRunner(), None, EngineOptions(cache_tokens=320))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=complaint):
        engine.add_request(Request(prompt, SamplingOptions(**options)))
    assert not engine.has_work
    with pytest.raises(UserError, match=complaint):
        engine.run([Request([5]), Request(prompt, SamplingOptions(**options))])
    assert not engine.has_work


def test_a_full_cache_or_context_ends_an_answer() -> None:
    for tokens, end in ((64, 64), (1000, 400)):
        engine = Engine(FakeRunner(), None, EngineOptions(cache_tokens=tokens))  # type: ignore[arg-type]
        result = engine.generate([[5] * 10], SamplingOptions(max_tokens=10_000, temperature=0, ignore_eos=True))[0]
        assert (len(result.ids), result.finish_reason) == (end - 10, "length")


class Broken:
    """A grammar with a bug, or one that leads into a dead end."""

    is_whole = True

    def __init__(self, dead_end: bool) -> None:
        self.left, self.dead_end = 3, dead_end

    def allowed(self) -> np.ndarray | None:
        return np.zeros(97, bool) if self.dead_end and not self.left else None

    def accept(self, token: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("bug")


@pytest.mark.parametrize("dead_end", [True, False])
def test_what_breaks_one_request_does_not_disturb_another(dead_end: bool) -> None:
    engine = Engine(FakeRunner())  # type: ignore[arg-type]
    sampling = SamplingOptions(max_tokens=30, temperature=0, ignore_eos=True)
    broken, fine = engine.run([Request([5], sampling, mask=Broken(dead_end)), Request([6], sampling)])
    assert (broken.finish_reason, broken.ids[:3]) == ("error", continuation([5], 3, 97))
    assert ("no token is allowed" if dead_end else "bug") in str(broken.error)
    assert (fine.finish_reason, fine.ids) == ("length", continuation([6], 30, 97))
    assert engine.pool.in_use == 0


class EvenOnly:
    """Allows even tokens; counts what it was told."""

    is_whole = True

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray | None:
        return np.arange(64) % 2 == len(self.accepted) % 2

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_sees_chosen_tokens_only_whatever_is_guessed(v3: Transformer, make_runner: Any, temperature: float) -> None:
    answers = []
    for speculate in ("off", "on"):
        mask = EvenOnly()
        engine = Engine(make_runner(v3), None, EngineOptions(speculate=speculate, draft_tokens=2))  # type: ignore[arg-type]
        sampling = SamplingOptions(max_tokens=20, temperature=temperature, seed=3, ignore_eos=True)
        answers.append(engine.run([Request(PROMPT, sampling, mask=mask)])[0].ids)
        assert mask.accepted == answers[-1]
        assert [token % 2 for token in answers[-1]] == [0, 1] * 10
    assert answers[0] == answers[1]
