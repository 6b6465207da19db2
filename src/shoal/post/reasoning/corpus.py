"""What the reasoning recipe reads: synthetic text to pretrain on, and conversations to fine-tune on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ..environments import ENVIRONMENTS
from ..problems import Environment, Problem, problems, with_thought

PHRASINGS = ("Problem: {} {}Answer: {}\n", "{}\n{}The answer is {}.\n", "Q: {}\n{}A: {}\n")
FACTS = 12
"""Sums and products in one document of them."""


def documents(names: Sequence[str], count: int, seed: int) -> Iterator[str]:
    """Text to pretrain on: two in three are training problems, worked out; the others tables of sums and products."""
    rng = random.Random(f"documents {seed}")
    sources = [problems(ENVIRONMENTS[name], "train", seed) for name in names]
    for index in range(count):
        if index % 3 == 2:
            yield "".join(fact(rng) for _ in range(FACTS))
            continue
        environment = ENVIRONMENTS[names[index % len(names)]]
        problem = next(sources[index % len(names)])
        yield rng.choice(PHRASINGS).format(problem.question, environment.think(problem, rng), problem.answer)


def fact(rng: random.Random) -> str:
    """A sum, a difference or a product of the kind that thoughts are made of."""
    sign = rng.choice("++--*")
    if sign == "*":
        a, b = rng.randint(1, 12), rng.randint(1, 99)
        a, b = rng.choice(((a, b), (b, a)))
        return f"{a}*{b}={a * b}\n"
    a, b = rng.randint(0, 400 if rng.random() < 0.4 else 99), rng.randint(1, 99)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    return f"{a}{sign}{b}={a + b if sign == '+' else a - b}\n"


def demonstrations(names: Sequence[str], count: int, seed: int, openness: float) -> Iterator[dict[str, Any]]:
    """Conversations with right answers; a share `openness` of them shows its work, the others only the answer."""
    rng = random.Random(f"demonstrations {seed}")
    sources = [problems(ENVIRONMENTS[name], "train", seed) for name in names]
    for index in range(count):
        name = names[index % len(names)]
        problem = next(sources[index % len(names)])
        yield conversation(ENVIRONMENTS[name], problem, rng, open=rng.random() < openness)


def conversation(environment: Environment, problem: Problem, rng: random.Random, *, open: bool) -> dict[str, Any]:
    """A problem and a reply, in OpenAI's form."""
    thought = environment.think(problem, rng) if open else ""
    reply = with_thought(thought, problem.answer)
    return {"messages": [{"role": "user", "content": problem.question}, {"role": "assistant", "content": reply}]}
