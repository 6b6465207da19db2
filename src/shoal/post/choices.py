"""Multiple choice: the answer that the model finds most likely, per byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError
from ..data import Tokenizer
from ..data.readers import read_rows
from ..engine import Engine
from .tasks import Score, half_interval, mean, that_fit

AT_ONCE = 64
"""Questions that are scored together."""


@dataclass(frozen=True)
class Question:
    """A question with its choices, of which one is right."""

    text: str
    choices: list[str]
    right: int


class Choices:
    """Rows with `question`, `choices` (texts) and `answer` (the number of the right one, from 0, or its letter)."""

    def __init__(self, path: str) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{path} of task choice is not a file: name a JSON Lines or Parquet file")
        self.name = f"choice={file.name}"
        self.questions = [_question(row, place) for place, row in read_rows(file)]
        if not self.questions:
            raise UserError(f"{path} of task choice holds no questions")


def _question(row: Any, place: str) -> Question:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not isinstance(row.get("choices"), list):
        raise UserError(f"{place}: a question is to be like {{'question': TEXT, 'choices': [TEXT, ...], 'answer': NUMBER}}")
    choices, answer = [str(choice) for choice in row["choices"]], row.get("answer")
    if isinstance(answer, str) and len(answer) == 1:
        answer = ord(answer.upper()) - ord("A")
    if type(answer) is not int or not 0 <= answer < len(choices) or "" in choices:
        raise UserError(f"{place}: answer {row.get('answer')!r} names none of its {len(choices)} choices")
    return Question(row["question"], choices, answer)


def examine_choices(engine: Engine, tokenizer: Tokenizer, task: Choices, count: int) -> Score:
    """Score those of the first `count` questions that fit, as text to be continued."""
    grades: list[float] = []
    questions = task.questions[:count]
    starts = [tokenizer.encode(f"{question.text}\n", bos=True) for question in questions]
    choices = [
        [tokenizer.encode(choice, behind=start) for choice in question.choices] for start, question in zip(starts, questions, strict=True)
    ]
    longest = [len(start) + max(map(len, of_one)) for start, of_one in zip(starts, choices, strict=True)]
    asked = that_fit(task.name, longest, engine.context)
    for first in range(0, len(asked), AT_ONCE):
        part = asked[first : first + AT_ONCE]
        scored = iter(engine.score([starts[i] + ids for i in part for ids in choices[i]]))
        for i in part:
            of_one = [
                sum(next(scored)[-len(ids) :]) / len(choice.encode()) for ids, choice in zip(choices[i], questions[i].choices, strict=True)
            ]
            grades.append(float(of_one.index(max(of_one)) == questions[i].right))
    return Score(task.name, len(grades), 1, mean(grades), half_interval(grades), 0.0, 1.0)
