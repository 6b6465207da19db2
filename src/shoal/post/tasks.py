"""What a model is asked, and how its replies are judged: built-in environments by name, in training and in evaluation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..config import UserError
from ..data import Tokenizer
from ..data.chat_template import render_chat
from .environments import ENVIRONMENTS
from .problems import Environment, Problem, Split, answer_of, problems
from .rollouts import Sample, Sampler

SPEC = re.compile(r"(\w+)(?::(\d+)(?:-(\d+))?)?")


@dataclass(frozen=True)
class Task:
    """An environment at some difficulties."""

    name: str
    environment: Environment
    difficulties: range

    @classmethod
    def parse(cls, text: str) -> Task:
        """`NAME`, `NAME:DIFFICULTY` or `NAME:FROM-TO`. Raises `UserError` for anything else."""
        match = SPEC.fullmatch(text)
        if match is None or match[1] not in ENVIRONMENTS:
            raise UserError(f"there is no task {text!r}: use NAME, NAME:DIFFICULTY or NAME:FROM-TO with one of {', '.join(ENVIRONMENTS)}")
        environment = ENVIRONMENTS[match[1]]
        if match[2] is None:
            return cls(text, environment, environment.difficulties)
        first, last = int(match[2]), int(match[3] or match[2])
        if not 2 <= first <= last <= 20:
            raise UserError(f"the difficulty of {text!r} must lie between 2 and 20, the first before the last")
        return cls(text, environment, range(first, last + 1))

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return problems(self.environment, split, seed, self.difficulties)

    def grade(self, problem: Problem, sample: Sample) -> float:
        """0 for a reply that was cut off or has no answer."""
        answer = answer_of(sample.text) if sample.finished else None
        return 0.0 if answer is None else self.environment.grade(problem, answer)


def prompt_of(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The question as a chat, up to where the model begins to write."""
    return tokenizer.encode(render_chat(tokenizer, [{"role": "user", "content": problem.question}]), special=True)


@dataclass(frozen=True)
class Score:
    """pass@1 on one task: mean grade of samples at temperature 1."""

    task: str
    problems: int
    samples: int
    accuracy: float
    error: float
    """Half of the 95% interval, over problems."""
    length: float
    """Mean tokens of a reply."""
    finished: float
    """Share of replies that ended by themselves."""

    def row(self) -> dict[str, Any]:
        return vars(self).copy()


def examine(sampler: Sampler, tokenizer: Tokenizer, task: Task, *, count: int, samples: int, max_tokens: int, seed: int) -> Score:
    """Ask the first `count` held-out problems of `seed`, each `samples` times."""
    asked = list(islice(task.problems("test", seed), count))
    groups = sampler.sample([prompt_of(tokenizer, problem) for problem in asked], samples, max_tokens, seed, experts=False)
    grades = [[task.grade(problem, sample) for sample in group] for problem, group in zip(asked, groups, strict=True)]
    means = [sum(of_one) / samples for of_one in grades]
    everything = [sample for group in groups for sample in group]
    return Score(
        task.name,
        len(asked),
        samples,
        mean(means),
        half_interval(means),
        mean([len(sample.ids) for sample in everything]),
        mean([float(sample.finished) for sample in everything]),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean of independent `values`, by the normal approximation."""
    if len(values) < 2:
        return math.inf
    middle = mean(values)
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return 1.96 * math.sqrt(variance / len(values))
