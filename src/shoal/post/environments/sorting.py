"""Numbers and letters to put in order."""

from __future__ import annotations

import random

from ..problems import Problem


class Sorting:
    """Difficulty is how many numbers below 100 are to be sorted."""

    name = "sorting"
    difficulties = range(3, 7)

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        given = rng.sample(range(1, 100), difficulty)
        text = " ".join(map(str, given))
        return Problem(f"Sort {text}.", " ".join(map(str, sorted(given))), str(sorted(given)), tuple(given))

    def think(self, problem: Problem, rng: random.Random) -> str:
        """Takes the smallest of what is left, one a line."""
        left, lines = list(problem.facts), []
        while left:
            smallest = min(left)
            lines.append(f"{' '.join(map(str, left))}: {smallest}\n")
            left.remove(smallest)
        return "".join(lines)

    def grade(self, problem: Problem, answer: str) -> float:
        return float(answer.replace(",", " ").rstrip(".").split() == problem.answer.split())
