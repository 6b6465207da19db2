"""How replies and choices become a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.cli import main
from shoal.data import Tokenizer, train_tokenizer
from shoal.engine import Engine
from shoal.post.choices import Choices, examine_choices
from shoal.post.tasks import half_interval


def test_the_interval_is_that_of_the_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 1.0]
    assert half_interval(values) == pytest.approx(1.96 * np.std(values, ddof=1) / np.sqrt(5))
    assert half_interval([1.0]) == 0


def test_replies_are_drawn_as_asked(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda engine, requests: asked.extend(requests) or run(engine, requests))
    options = ["--problems", "2", "--samples", "2", "--max-tokens", "3", "--temperature", "0.3"]
    assert main(["eval", str(trained), "--tasks", "strings", *options]) == 0
    assert [(request.sampling.temperature, request.sampling.max_tokens) for request in asked] == [(0.3, 3)] * 4
    assert len({request.sampling.seed for request in asked}) == 4


class MadeUpLikelihoods:
    """An engine that finds questions unlikely and holds of every choice what it was told."""

    context = 1000

    def __init__(self, tokenizer: Tokenizer, told: dict[str, list[float]]) -> None:
        self._told = {tuple(tokenizer.encode(choice)): logprobs for choice, logprobs in told.items()}

    def score(self, texts: list[list[int]]) -> list[list[float]]:
        scored = []
        for ids in texts:
            [(choice, logprobs)] = [(choice, logprobs) for choice, logprobs in self._told.items() if tuple(ids[-len(choice) :]) == choice]
            scored.append([-100.0] * (len(ids) - 1 - len(choice)) + logprobs)
        return scored


def test_the_choice_that_is_likeliest_per_byte_is_taken(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["red"], 280)
    told = {
        "fi": [-1.0, -1.0], "swims": [-2.0, -0.5, -0.5, -0.2, 0.0],  # in all fi, per byte swims
        "ab": [-0.1, -0.1], "vwxyz": [-2.0, -1.0, -0.5, 0.0, 0.0],  # ab, though the other ends better, and the question is as unlikely
    }  # fmt: skip
    assert all(len(tokenizer.encode(choice)) == len(logprobs) for choice, logprobs in told.items())
    rows = [{"question": "what?", "choices": ["fi", "swims"], "answer": 1}, {"question": "who?", "choices": ["ab", "vwxyz"], "answer": 0}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine: Any = MadeUpLikelihoods(tokenizer, told)
    assert examine_choices(engine, tokenizer, Choices(str(tmp_path / "c.jsonl")), 2).accuracy == 1
