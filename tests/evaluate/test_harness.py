"""The adapter for lm-evaluation-harness says what transformers says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.engine import Request
from shoal.evaluate.harness import HarnessModel, register
from shoal.formats.huggingface import load_model
from shoal.formats.locate import locate_model


def ask(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def model(trained: Path) -> HarnessModel:
    return HarnessModel(str(trained), device="cpu", precision="fp32", threads=1)


def test_likelihoods_are_those_of_the_model(model: HarnessModel, trained: Path) -> None:
    plain = load_model(locate_model(trained), dtype=torch.float32)
    tokenizer = model.tokenizer
    for context, text in (("red fish", " swims over"), ("", "the reef"), ("red fish ", "swims")):
        [(logprob, greedy)] = model.loglikelihood([ask(context, text)])
        whole = tokenizer.encode(context + text, bos=True)
        start = len(tokenizer.encode(context.rstrip(), bos=True))
        with torch.no_grad():
            logprobs = plain.logits(plain(torch.tensor([whole])).hidden)[0].log_softmax(-1)
        wanted = sum(float(logprobs[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert logprob == pytest.approx(wanted, abs=1e-3)
        assert greedy == all(int(logprobs[i - 1].argmax()) == whole[i] for i in range(start, len(whole)))


def test_long_texts_count_every_token_once(model: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "red fish swims over the reef " * 30
    pieces: list[tuple[list[int], list[int]]] = []
    scored: list[tuple[float, bool]] = []
    score = model._score

    def note(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        pieces.extend(pairs)
        scored.extend(score(pairs))
        return scored

    monkeypatch.setattr(model, "_score", note)
    [total] = model.loglikelihood_rolling([ask(text)])
    ids, context = model.tokenizer.encode(text, bos=True), model.engine.context
    assert len(ids) > 2 * context
    at = 1
    for read, counted in pieces:
        assert read + counted == ids[at - len(read) : at + len(counted)]
        assert len(read) + len(counted) <= context
        assert len(read) >= context // 2 or at == 1
        at += len(counted)
    assert at == len(ids)
    assert total == pytest.approx(sum(logprob for logprob, _ in scored))


def test_generation_stops_where_it_is_told(model: HarnessModel) -> None:
    [whole] = model.generate_until([ask("red fish", {"until": [], "max_gen_toks": 12})])
    assert whole
    [cut] = model.generate_until([ask("red fish", {"until": [whole[3:6]], "max_gen_toks": 12})])
    assert cut == whole[: whole.index(whole[3:6])]


def test_a_long_answer_takes_no_more_than_half_of_the_context(model: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def run(requests: list[Request]) -> list[SimpleNamespace]:
        asked.extend(requests)
        return [SimpleNamespace(text="")] * len(requests)

    monkeypatch.setattr(model.engine, "run", run)
    text, context = "red fish swims over the reef " * 30, model.engine.context
    ids = model.tokenizer.encode(text, bos=True)
    model.generate_until([ask(text, {"max_gen_toks": most}) for most in (context // 4, context - 1, context, 9 * context)])
    assert [request.prompt for request in asked] == [ids[-(context - context // 4) :], *[ids[-(context // 2) :]] * 3]
    asked.clear()
    model.generate_until([ask("red fish", {"max_gen_toks": context})])
    assert [request.prompt for request in asked] == [model.tokenizer.encode("red fish", bos=True)]


def test_samples_of_one_prompt_differ_and_are_the_same_next_time(model: HarnessModel) -> None:
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    samples = model.generate_until([ask("red fish", options)] * 4)
    assert len(set(samples)) == 4
    assert model.generate_until([ask("red fish", options)] * 4) == samples


def test_it_registers_with_the_harness() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    register()
    assert issubclass(get_model("shoal"), HarnessModel)
