"""`complete`: one prompt on a loaded model, against whole forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.config import MachineOptions, RunOptions, SamplingOptions, UserError
from shoal.engine import Loaded, TorchRunner, complete, load
from shoal.engine.command import engine_for_one
from shoal.engine.native import NativeRunner
from shoal.kernels.selection import BACKEND

GREEDY = SamplingOptions(max_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def loaded(trained: Path) -> Loaded:
    return load(str(trained), MachineOptions("cpu", "fp32", 1))


def test_cached_decoding_takes_the_tokens_of_whole_forward_passes(loaded: Loaded) -> None:
    ids = loaded.tokenizer.encode("the red fish", bos=True)
    got = engine_for_one(loaded, RunOptions()).generate([ids], GREEDY)[0].ids
    wanted = list(ids)
    with torch.no_grad():
        for _ in got:
            wanted.append(int(loaded.model.logits(loaded.model(torch.tensor([wanted])).hidden[0, -1]).argmax()))
    assert ids + got == wanted


def test_the_context_is_filled_but_never_exceeded(loaded: Loaded) -> None:
    longest = loaded.model.config.max_position_embeddings
    many = SamplingOptions(max_tokens=1000, temperature=0, ignore_eos=True)
    engine = engine_for_one(loaded, RunOptions())
    assert len(engine.generate([[5] * (longest - 3)], many)[0].ids) == 3
    for length in (longest, longest + 1):
        with pytest.raises(UserError, match=f"{length} tokens, the model sees {longest}: shorten it"):
            engine.generate([[5] * length], many)


def test_seeds_decide_the_text(loaded: Loaded) -> None:
    def text(seed: int | None, temperature: float = 1.0) -> str:
        return str(complete(loaded, "the", SamplingOptions(max_tokens=30, temperature=temperature, seed=seed))["text"])

    assert text(1) == text(1) != text(2)
    assert text(None) != text(None)
    assert text(None, 0) == text(7, 0)


def test_complete_counts_and_says_why_it_ended(loaded: Loaded) -> None:
    result = complete(loaded, "the red\ufffd\nfish", SamplingOptions(max_tokens=5, temperature=0))
    assert (result["tokens"], result["finish_reason"]) == (5, "length")
    assert result["prompt_tokens"] == len(loaded.tokenizer.encode("the red\ufffd\nfish", bos=True))
    assert complete(loaded, "", SamplingOptions(max_tokens=1))["prompt_tokens"] == 1, "begin-of-text alone"


def test_guesses_are_reported(loaded: Loaded) -> None:
    sampling = SamplingOptions(max_tokens=20, temperature=0, ignore_eos=True)
    result = complete(loaded, "the red", sampling, RunOptions(speculate="on"))
    assert result["drafted_tokens"] > 0
    assert 0 <= result["acceptance"] <= 1
    assert complete(loaded, "the red", sampling, RunOptions(speculate="off"))["acceptance"] is None


def test_complete_stops_at_end_of_text_without_printing_it(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    head = loaded.model.lm_head
    with monkeypatch.context() as patch:
        patch.setattr(loaded, "runner", TorchRunner(loaded.model, loaded.machine))
        patch.setattr(head, "weight", torch.nn.Parameter(torch.zeros_like(head.weight)))
        with torch.no_grad():
            ids = loaded.tokenizer.encode("the", bos=True)
            head.weight[loaded.tokenizer.eos_id] = loaded.model(torch.tensor([ids])).hidden[0, -1]
        result = complete(loaded, "the", GREEDY)
    assert (result["text"], result["tokens"], result["finish_reason"]) == ("", 1, "stop")


@pytest.mark.skipif(BACKEND.cpu is None, reason=BACKEND.reason)
def test_the_kernels_are_taken_beside_a_gpu_too(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(load(str(trained), MachineOptions("auto", "fp32", 1)).runner, NativeRunner)
    assert "--device cuda" in capsys.readouterr().err
