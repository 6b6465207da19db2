"""Generation token by token against whole forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.config import MachineOptions, SamplingOptions, UserError
from shoal.engine import Loaded, complete, generate, load
from shoal.engine.generate import sample

GREEDY = SamplingOptions(max_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def loaded(trained: Path) -> Loaded:
    return load(str(trained), MachineOptions("cpu", "fp32", 1))


def test_cached_decoding_takes_the_tokens_of_whole_forward_passes(loaded: Loaded) -> None:
    ids = loaded.tokenizer.encode("the red fish", bos=True)
    got = list(generate(loaded.model, loaded.machine, ids, GREEDY, set()))
    wanted = list(ids)
    with torch.no_grad():
        for _ in range(20):
            wanted.append(int(loaded.model.logits(loaded.model(torch.tensor([wanted])).hidden[0, -1]).argmax()))
    assert ids + got == wanted


def test_generation_ends_with_a_stop_token_and_yields_it(loaded: Loaded) -> None:
    ids = loaded.tokenizer.encode("the", bos=True)
    free = list(generate(loaded.model, loaded.machine, ids, GREEDY, set()))
    stop = free[5]
    assert list(generate(loaded.model, loaded.machine, ids, GREEDY, {stop})) == free[: free.index(stop) + 1]


def test_the_context_is_filled_but_never_exceeded(loaded: Loaded) -> None:
    longest = loaded.model.config.max_position_embeddings
    many = SamplingOptions(max_tokens=1000, temperature=0)
    assert len(list(generate(loaded.model, loaded.machine, [5] * (longest - 3), many, set()))) == 3
    for length in (longest, longest + 1):
        with pytest.raises(UserError, match=f"{length} tokens, the model sees {longest}: shorten it"):
            list(generate(loaded.model, loaded.machine, [5] * length, many, set()))


def test_seeds_decide_the_text(loaded: Loaded) -> None:
    def text(seed: int | None, temperature: float = 1.0) -> str:
        return str(complete(loaded, "the", SamplingOptions(max_tokens=30, temperature=temperature, seed=seed))["text"])

    assert text(1) == text(1) != text(2)
    assert text(None) != text(None)
    assert text(None, 0) == text(7, 0)


def test_sampling_follows_the_softmax_at_a_temperature() -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[sample(logits, 0.5, generator)] += 1
    torch.testing.assert_close(counts / 4000, (logits / 0.5).softmax(-1), atol=0.03, rtol=0)
    assert sample(logits, 0, generator) == 2
    assert sample(logits, 1e-6, generator) == 2, "a tiny temperature must not overflow"


def test_complete_counts_and_says_why_it_ended(loaded: Loaded) -> None:
    result = complete(loaded, "the red\ufffd\nfish", SamplingOptions(max_tokens=5, temperature=0))
    assert (result["tokens"], result["finish_reason"]) == (5, "length")
    assert result["prompt_tokens"] == len(loaded.tokenizer.encode("the red\ufffd\nfish", bos=True))
    assert complete(loaded, "", SamplingOptions(max_tokens=1))["prompt_tokens"] == 1, "begin-of-text alone"


def test_complete_stops_at_end_of_text_without_printing_it(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    head = loaded.model.lm_head
    with monkeypatch.context() as patch:
        patch.setattr(head, "weight", torch.nn.Parameter(torch.zeros_like(head.weight)))
        with torch.no_grad():
            ids = loaded.tokenizer.encode("the", bos=True)
            head.weight[loaded.tokenizer.eos_id] = loaded.model(torch.tensor([ids])).hidden[0, -1]
        result = complete(loaded, "the", GREEDY)
    assert (result["text"], result["tokens"], result["finish_reason"]) == ("", 1, "stop")
