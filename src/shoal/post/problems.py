"""Problems with answers that a program can check: what environments make, in splits that never overlap."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from ..config import UserError

Split = Literal["train", "test"]
HELD_OUT = 8
"""One problem in so many belongs to the test split."""
TRIES = 10_000
"""Draws without a new problem of the wanted split, after which an environment counts as exhausted."""


@dataclass(frozen=True)
class Problem:
    """A question, and what is needed to check a reply."""

    question: str
    answer: str
    """A right answer; others may be right too."""
    key: str
    """Equal for problems that differ in looks alone: decides the split."""
    facts: tuple[int | str, ...] = ()
    """What the environment's `grade` and `think` need besides."""


class Environment(Protocol):
    """An endless source of problems of some kind."""

    name: str
    difficulties: range
    """Those that problems are drawn from unless others are asked for."""

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        """A problem; the same one for the same state of `rng`."""
        ...

    def think(self, problem: Problem, rng: random.Random) -> str:
        """A worked thought that ends where the answer is known."""
        ...

    def grade(self, problem: Problem, answer: str) -> float:
        """How right an answer is (without its thought), 0 to 1. Never raises."""
        ...


def split_of(name: str, problem: Problem) -> Split:
    """The split of a problem, from its key alone: whatever the seed, no problem is in both."""
    digest = hashlib.sha256(f"{name}\n{problem.key}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % HELD_OUT == 0 else "train"


def problems(environment: Environment, split: Split, seed: int, difficulties: range | None = None) -> Iterator[Problem]:
    """Endless problems of a split. Test problems are all different; training problems may come again.

    Raises `UserError` once there are no more.
    """
    rng = random.Random(f"{environment.name} {split} {seed}")
    levels = difficulties or environment.difficulties
    seen: set[str] = set()
    while True:
        for _ in range(TRIES):
            problem = environment.draw(rng, rng.choice(levels))
            if split_of(environment.name, problem) == split and problem.key not in seen:
                break
        else:
            raise UserError(
                f"{environment.name} has no more than {len(seen)} problems to test with: ask for fewer, or for other difficulties"
            )
        if split == "test":
            seen.add(problem.key)
        yield problem


def after_thought(reply: str) -> str | None:
    """What a reply says after its thought; None where the thought does not end."""
    _, end, answer = reply.rpartition("</think>")
    return None if not end and "<think>" in reply else answer


def answer_of(reply: str) -> str | None:
    """The same without the space around it."""
    answer = after_thought(reply)
    return None if answer is None else answer.strip()


def with_thought(thought: str, answer: str) -> str:
    """A reply in the form that `answer_of` reads."""
    return f"<think>\n{thought}</think>\n{answer}"
