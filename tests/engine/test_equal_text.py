"""The same text whatever the batch, the pieces a prompt is read in, the prefix cache, preemption and speculation."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config import EngineOptions, SamplingOptions
from shoal.engine import Engine
from shoal.formats.huggingface import save_model
from shoal.model import Transformer

ANSWER = 20
GREEDY = SamplingOptions(max_tokens=ANSWER, temperature=0, ignore_eos=True)
SHARED = [3 * i % 61 + 2 for i in range(70)]
PROMPTS = [[7], [5, 9, 11], SHARED[:32], SHARED[:33], SHARED, [*SHARED[:64], 4], [*SHARED[:50], 9, 8], [6] * 30]


@torch.no_grad()
def whole_passes(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The greedy answer by forward passes over everything, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(model(torch.tensor([ids])).hidden[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def wanted(model: Transformer) -> list[list[int]]:
    return [whole_passes(model, prompt, ANSWER) for prompt in PROMPTS]


CASES: dict[str, dict[str, Any]] = {
    "as they come": {},
    "pieces of 3": {"step_tokens": 12, "max_running": 9},
    "pieces of 17": {"step_tokens": 25},
    "without prefix cache": {"prefix_cache": False},
    "small cache": {"cache_tokens": 128},
    "one at a time": {"max_running": 1},
    "no speculation": {"speculate": "off"},
    "three guesses": {"draft_tokens": 3},
    "three guesses, small cache, small pieces": {"draft_tokens": 3, "cache_tokens": 160, "step_tokens": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_eight_at_once_say_what_whole_passes_say(case: str, model: Transformer, make_runner: Any, wanted: list[list[int]]) -> None:
    options = EngineOptions(**{"max_running": 8, "speculate": "on", **CASES[case]})
    engine = Engine(make_runner(model), None, options)
    for turn in ("first", "again, from the prefix cache"):
        got = [result.ids for result in engine.generate(PROMPTS, GREEDY)]
        assert got == wanted, turn
    stats = engine.stats()
    assert (stats.cached_tokens > 0) == options.prefix_cache
    assert (stats.drafted_tokens > 0) == (options.speculate == "on" and model.config.num_nextn_predict_layers > 0)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_answers_go_on_where_they_were(prefix_cache: bool, model: Transformer, make_runner: Any) -> None:
    long = SamplingOptions(max_tokens=70, temperature=0, ignore_eos=True)
    prompts = [[7], [5, 9], [11, 3]]
    engine = Engine(make_runner(model), None, EngineOptions(cache_tokens=5 * 32, prefix_cache=prefix_cache, speculate="on"))
    assert [result.ids for result in engine.generate(prompts, long)] == [whole_passes(model, prompt, 70) for prompt in prompts]
    assert engine.stats().preemptions > 0


def test_seeded_samples_depend_on_nothing_else_either(v3: Transformer, make_runner: Any) -> None:
    def sampled(together: bool, **options: Any) -> list[list[int]]:
        engine = Engine(make_runner(v3), None, EngineOptions(max_running=8, **options))
        groups = [PROMPTS] if together else [[prompt] for prompt in PROMPTS]
        sampling = SamplingOptions(max_tokens=ANSWER, temperature=0.9, top_p=0.95, presence_penalty=0.3, seed=5, ignore_eos=True)
        return [result.ids for group in groups for result in engine.generate(group, sampling)]

    first = sampled(True, speculate="off")
    assert first == sampled(False, speculate="on", draft_tokens=2)
    assert first == sampled(True, speculate="on", step_tokens=19, cache_tokens=320)
    assert len({tuple(ids) for ids in first}) == len(first)


def test_a_copied_page_is_not_written_by_the_copy(v3: Transformer, make_runner: Any) -> None:
    engine = Engine(make_runner(v3), None, EngineOptions(speculate="on"))
    for cut in (70, 45, 70, 33, 62, 70):
        prompt = [*SHARED[:cut], *([1] if cut < 70 else [])]
        assert engine.generate([prompt], GREEDY)[0].ids == whole_passes(v3, prompt, ANSWER), cut
    assert engine.stats().hit_rate is not None
    assert engine.stats().hit_rate > 0.5  # type: ignore[operator]


@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_a_smaller_cache_format_stays_close(cache: Any, model: Transformer, make_runner: Any) -> None:
    exact = Engine(make_runner(model)).score([SHARED])[0]
    rough = Engine(make_runner(model), None, EngineOptions(cache=cache)).score([SHARED])[0]
    error = max(abs(a - b) for a, b in itertools.zip_longest(exact, rough))
    assert 0 < error < {"bf16": 0.1, "fp8": 0.8}[cache]


def test_transformers_generates_the_same(model: Transformer, make_runner: Any, wanted: list[list[int]]) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = Engine(make_runner(model))
    for prompt in PROMPTS[1::3]:
        options = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert engine.generate([prompt], GREEDY)[0].ids == theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
