"""Problems from local files: GSM8K, HumanEval, and questions with rewards of the user's choice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import UserError
from ..data.readers import read_rows
from .problems import HELD_OUT, Problem, Split, after_thought
from .rewards import CODE_LIMITS, Judge, code_in, numeric
from .rollouts import Sample
from .sandbox import runs_to_end

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
"""Where a function's body has ended, in the reply of a base model (2107.03374, section 2.1)."""


class FileTask:
    """Rows of a file as problems: evaluation asks them in their order, training shuffles them anew every time.

    `training`: one row in `HELD_OUT` is kept for tests, the first among them; otherwise all rows are.
    """

    continues = False
    """Whether the question is text to be continued, not a message to be answered."""
    stops: tuple[str, ...] = ()

    def __init__(self, name: str, path: str, training: bool = False) -> None:
        self.name, self._training = name, training
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{path} is not a file: name a JSON Lines or Parquet file of problems")
        self.rows = [self.problem(row, place) for place, row in read_rows(file)]
        if not self.rows:
            raise UserError(f"{path} of task {name} holds no problems")
        self._refuse_too_few()

    def problem(self, row: Any, place: str) -> Problem:
        raise NotImplementedError

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        """See `FileTask`; no question is in both splits."""
        if split == "test":
            yield from self.rows[::HELD_OUT] if self._training else self.rows
            return
        rng, rows = random.Random(f"{self.name} {seed}"), self._learnt()
        while True:
            yield from rng.sample(rows, len(rows))

    def keep(self, problems: list[Problem]) -> None:
        """Forget all others. Raises `UserError` where these are too few."""
        self.rows = problems
        self._refuse_too_few()

    def _learnt(self) -> list[Problem]:
        """What is not kept for tests, though it may stand in the file twice."""
        kept = {row.key for row in self.rows[::HELD_OUT]}
        return [row for row in self.rows if row.key not in kept]

    def _refuse_too_few(self) -> None:
        if self._training and not self._learnt():
            raise UserError(
                f"{self.name} has too few problems that the model can read: give at least two that differ, as one is kept for tests"
            )

    def grade(self, problem: Problem, sample: Sample) -> float:
        raise NotImplementedError


class GSM8K(FileTask):
    """Grade-school problems (2110.14168): `question`, and `answer` that ends with `#### NUMBER`."""

    def problem(self, row: Any, place: str) -> Problem:
        question, answer = texts(row, place, "question", "answer")
        return Problem(question, answer.rpartition("####")[2].strip(), question)

    def grade(self, problem: Problem, sample: Sample) -> float:
        return numeric(problem.question, sample.text, problem.answer) if sample.finished else 0.0


class HumanEval(FileTask):
    """Python functions to be completed (2107.03374): `prompt`, `test`, `entry_point`. Code runs in the sandbox."""

    continues = True
    stops = STOPS

    def problem(self, row: Any, place: str) -> Problem:
        prompt, test, entry = texts(row, place, "prompt", "test", "entry_point")
        return Problem(prompt, f"{test}\ncheck({entry})\n", prompt, (prompt, entry))

    def grade(self, problem: Problem, sample: Sample) -> float:
        prompt, entry = map(str, problem.facts)
        answer = after_thought(sample.text) if sample.finished else None
        if answer is None:
            return 0.0
        said = code_in(answer)
        # A chat model writes the whole function, a base model goes on in it. The prompt's imports and helpers hold for both.
        program = f"{prompt}    pass\n\n{said}" if f"def {entry}(" in said else prompt + said
        return float(runs_to_end(f"{program}\n\n{problem.answer}", CODE_LIMITS))


class Rewarded(FileTask):
    """`prompt` (or `question`) and `answer` of a file, judged by rewards."""

    def __init__(self, name: str, path: str, judge: Judge) -> None:
        super().__init__(name, path, training=True)
        self.judge = judge

    def problem(self, row: Any, place: str) -> Problem:
        name = "question" if isinstance(row, dict) and "question" in row else "prompt"
        question, answer = texts(row, place, name, "answer")
        return Problem(question, answer, question)

    def grade(self, problem: Problem, sample: Sample) -> float:
        return self.judge(problem.question, sample.text, problem.answer) if sample.finished else 0.0


def texts(row: Any, place: str, *names: str) -> list[str]:
    """Fields of a row that must be text."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is not an object with named fields: {', '.join(names)} are expected")
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(f"{place} lacks the text {missing[0]!r}: it has {', '.join(row) or 'nothing'}")
    return [row[name] for name in names]
