"""Countdown: reach a number with some given numbers, each used once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from ..expressions import Expression, Operation, numbers, parse, render, value, work_out
from ..problems import Problem

LARGEST_NUMBER = 9
LARGEST_TARGET = 99
MOST_FAILURES = 5
"""Attempts before the right one in a worked thought, at most."""


class Countdown:
    """Difficulty is how many numbers are given; they are 1 to 9, the target 1 to 99; operations are +, - and *."""

    name = "countdown"
    difficulties = range(3, 4)

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        while True:
            given = [rng.randint(1, LARGEST_NUMBER) for _ in range(difficulty)]
            solution = attempt(given, rng)
            target = value(solution)
            if target is not None and 1 <= target <= LARGEST_TARGET:
                break
        question = f"Make {target} from {' '.join(map(str, given))}."
        return Problem(question, render(solution), f"{sorted(given)} {target}", (int(target), *given))

    def think(self, problem: Problem, rng: random.Random) -> str:
        """Attempts, one a line, each with its distance from the target, until that is 0: the answer is then `problem.answer`."""
        target, *given = map(int, problem.facts)
        lines: list[str] = []
        for _ in range(rng.randint(0, MOST_FAILURES)):
            wrong = attempt(given, rng)
            line = self._line(wrong, target)
            if value(wrong) != target and line not in lines:
                lines.append(line)
        right = parse(problem.answer)
        assert right is not None
        return "".join([*lines, self._line(right, target)])

    @staticmethod
    def _line(expression: Expression, target: int) -> str:
        *_, result = steps = work_out(expression)
        high, low = max(int(result), target), min(int(result), target)
        return f"{'='.join(steps)} {high}-{low}={high - low}\n"

    def grade(self, problem: Problem, answer: str) -> float:
        """1 for an expression of the right value that uses every number once; its value may follow it after "="."""
        target, *given = problem.facts
        found = parse(answer.partition("=")[0])
        return float(found is not None and value(found) == target and Counter(numbers(found)) == Counter(given))


def attempt(given: Sequence[int], rng: random.Random) -> Expression:
    """Some expression that uses every number once and nowhere falls below 0."""
    parts: list[tuple[Expression, Fraction]] = [(Fraction(number), Fraction(number)) for number in given]
    while len(parts) > 1:
        rng.shuffle(parts)
        (left, left_value), (right, right_value) = parts.pop(), parts.pop()
        sign = rng.choice("+-*")
        if sign == "-" and left_value < right_value:
            left, right, left_value, right_value = right, left, right_value, left_value
        operation = Operation(sign, left, right)
        total = value(operation)
        assert total is not None
        parts.append((operation, total))
    return parts[0][0]
