"""What a model is asked, and how its replies are judged; the same in training and in evaluation."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from ..config import UserError
from ..data import Tokenizer
from ..data.chat_template import encode_chat
from ..engine import Engine
from .environments import ENVIRONMENTS
from .file_tasks import GSM8K, FileTask, HumanEval
from .problems import Environment, Problem, Split, answer_of, problems
from .rollouts import Sample, draw

SPEC = re.compile(r"(\w+)(?::(\d+)(?:-(\d+))?)?")
FILES: dict[str, type[FileTask]] = {"gsm8k": GSM8K, "humaneval": HumanEval}
LOWEST, HIGHEST = 2, 20
"""Difficulties."""


class Task(Protocol):
    """A source of problems that knows how to judge replies."""

    name: str
    continues: bool
    stops: tuple[str, ...]

    def problems(self, split: Split, seed: int) -> Iterator[Problem]: ...

    def grade(self, problem: Problem, sample: Sample) -> float:
        """0 to 1; 0 for a reply that was cut off."""
        ...


@dataclass
class EnvironmentTask:
    """A built-in environment at some difficulties."""

    name: str
    environment: Environment
    difficulties: range
    continues: bool = False
    stops: tuple[str, ...] = ()

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return problems(self.environment, split, seed, self.difficulties)

    def grade(self, problem: Problem, sample: Sample) -> float:
        answer = answer_of(sample.text) if sample.finished else None
        return 0.0 if answer is None else self.environment.grade(problem, answer)


def parse_task(text: str, training: bool = False) -> Task:
    """`NAME`, `NAME:DIFFICULTY` or `NAME:FROM-TO` of an environment, `gsm8k=FILE` or `humaneval=FILE`; else `UserError`.

    `training`: a file's problems are divided, see `FileTask`.
    """
    name, is_file, path = text.partition("=")
    if is_file and name in FILES:
        return FILES[name](name, path, training)
    match = SPEC.fullmatch(text)
    if match is None or match[1] not in ENVIRONMENTS:
        known = ", ".join([*ENVIRONMENTS, *(f"{name}=FILE" for name in FILES)])
        raise UserError(f"there is no task {text!r}: use one of {known}; environments also as NAME:DIFFICULTY or NAME:FROM-TO")
    environment = ENVIRONMENTS[match[1]]
    if match[2] is None:
        return EnvironmentTask(text, environment, environment.difficulties)
    first, last = int(match[2]), int(match[3] or match[2])
    if not LOWEST <= first <= last <= HIGHEST:
        raise UserError(f"the difficulty of {text!r} must lie between {LOWEST} and {HIGHEST}, the first before the last")
    return EnvironmentTask(text, environment, range(first, last + 1))


def prompt_of(tokenizer: Tokenizer, task: Task, problem: Problem, thinking: bool = False) -> list[int]:
    """The question up to where the model begins to write: a chat, or plain text for a base model.

    `thinking`: a chat template that leaves the choice (see `refuse_thinking`) is to open a thought.
    """
    if tokenizer.chat_template is not None:
        return encode_chat(tokenizer, [{"role": "user", "content": problem.question}], thinking=thinking)
    text = problem.question if task.continues else f"{problem.question}\n"
    return tokenizer.encode(text, bos=True)


def refuse_thinking(tokenizer: Tokenizer) -> None:
    """Raise `UserError` where the chat template leaves no choice whether an answer begins with a thought."""
    if "thinking" not in (tokenizer.chat_template or ""):
        raise UserError("this model has no chat template that opens a thought on demand, as v3.1 does: leave --thinking away")


@dataclass(frozen=True)
class Score:
    """How a model does on one task."""

    task: str
    problems: int
    samples: int
    """Replies to every problem."""
    accuracy: float
    """pass@1: the mean grade."""
    error: float
    """Half of its 95% interval, over problems."""
    length: float
    """Mean tokens of a reply."""
    finished: float
    """Share of replies that ended by themselves."""
    pass_at: dict[str, float] = field(default_factory=dict)
    """k -> chance that at least one of k replies is right."""

    def row(self) -> dict[str, Any]:
        return vars(self).copy()


def examine(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    *,
    count: int,
    samples: int,
    max_tokens: int,
    seed: int,
    temperature: float = 1.0,
    thinking: bool = False,
) -> Score:
    """Ask those of the first `count` held-out problems that fit, each `samples` times."""
    first = list(islice(task.problems("test", seed), count))
    prompts = [prompt_of(tokenizer, task, problem, thinking) for problem in first]
    fit = that_fit(task.name, [len(prompt) + 1 for prompt in prompts], engine.context)
    asked, prompts = [first[i] for i in fit], [prompts[i] for i in fit]
    stops = task.stops if tokenizer.chat_template is None else ()
    groups = draw(engine, prompts, samples, max_tokens, seed, temperature=temperature, stop=stops)
    grades = [[task.grade(problem, sample) for sample in group] for problem, group in zip(asked, groups, strict=True)]
    means = [mean(of_one) for of_one in grades]
    everything = [sample for group in groups for sample in group]
    right = [sum(grade == 1.0 for grade in of_one) for of_one in grades]
    return Score(
        task.name,
        len(asked),
        samples,
        mean(means),
        half_interval(means),
        mean([len(sample.ids) for sample in everything]),
        mean([float(sample.finished) for sample in everything]),
        {str(k): mean([pass_at(samples, count, k) for count in right]) for k in _powers(samples)},
    )


def that_fit(name: str, lengths: Sequence[int], context: int) -> list[int]:
    """Indices of a task's problems that have at most `context` tokens; the others are counted on stderr. Raises `UserError` without any."""
    fit = [i for i, length in enumerate(lengths) if length <= context]
    if not fit:
        raise UserError(f"no problem of {name} fits into the {context:,} tokens that the model sees: shorten them")
    if len(fit) < len(lengths):
        print(
            f"{len(lengths) - len(fit):,} problems of {name} do not fit into the {context:,} tokens that the model sees and are left out",
            file=sys.stderr,
        )
    return fit


def _powers(most: int) -> list[int]:
    """2, 4, 8, ... up to `most`."""
    return [2**i for i in range(1, most.bit_length()) if 2**i <= most]


def pass_at(n: int, right: int, k: int) -> float:
    """Chance that `k` of `n` replies, of which `right` are right, hold a right one: the unbiased estimate of 2107.03374, equation 1."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean of independent `values`, by the normal approximation; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return 1.96 * math.sqrt(variance / len(values))
