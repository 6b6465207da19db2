"""Sums of several numbers."""

from __future__ import annotations

import random
import re

from ..problems import Problem


class Arithmetic:
    """`12+35-8` and the like: difficulty is the number of operands, each below 100."""

    name = "arithmetic"
    difficulties = range(3, 7)

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        numbers = [rng.randrange(1, 100) for _ in range(difficulty)]
        total, text = numbers[0], str(numbers[0])
        for number in numbers[1:]:
            minus = rng.random() < 0.5 and number <= total  # what is left is never below 0
            total += -number if minus else number
            text += f"{'-' if minus else '+'}{number}"
        return Problem(f"What is {text}?", str(total), text, (text,))

    def think(self, problem: Problem, rng: random.Random) -> str:
        """One operation a line, from the left."""
        first, *rest = re.findall(r"[+-]?\d+", str(problem.facts[0]))
        total, lines = int(first), []
        for term in rest:
            result = total + int(term)
            lines.append(f"{total}{term}={result}\n")
            total = result
        return "".join(lines)

    def grade(self, problem: Problem, answer: str) -> float:
        return float(answer.strip().rstrip(".") == problem.answer)
