"""Words to spell backwards, and letters to count in them."""

from __future__ import annotations

import random

from ..problems import Problem

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Strings:
    """Difficulty is the length of a made-up word, to be reversed or searched for a letter."""

    name = "strings"
    difficulties = range(4, 9)

    def draw(self, rng: random.Random, difficulty: int) -> Problem:
        letters = rng.sample(LETTERS, max(2, difficulty // 2))
        word = "".join(rng.choice(letters) for _ in range(difficulty))
        if rng.random() < 0.5:
            return Problem(f"Reverse {word}.", word[::-1], word, ("reverse", word))
        letter = rng.choice(letters)
        return Problem(f"How many {letter} are in {word}?", str(word.count(letter)), word, (letter, word))

    def think(self, problem: Problem, rng: random.Random) -> str:
        """Letter by letter: from the end, or with the count so far."""
        task, word = map(str, problem.facts)
        if task == "reverse":
            return " ".join(reversed(word)) + "\n"
        count, lines = 0, []
        for letter in word:
            count += letter == task
            lines.append(f"{letter} {count}\n")
        return "".join(lines)

    def grade(self, problem: Problem, answer: str) -> float:
        return float(answer.strip().rstrip(".") == problem.answer)
