"""Multiple choice: the answer that the model finds most likely, per byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError
from ..data import Tokenizer
from ..data.readers import read_rows
from ..engine import Engine
from .tasks import Score, half_interval, mean

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
    """Score the first `count` questions, as text to be continued."""
    grades: list[float] = []
    asked = task.questions[:count]
    for first in range(0, len(asked), AT_ONCE):
        part = asked[first : first + AT_ONCE]
        texts, spans = [], []
        for question in part:
            start = tokenizer.encode(f"{question.text}\n", bos=True)
            for choice in question.choices:
                ids = tokenizer.encode(choice, behind=start)
                texts.append(start + ids)
                spans.append((len(ids), len(choice.encode())))
        scored = engine.score(texts)
        per_byte = iter([sum(logprobs[-length:]) / size for logprobs, (length, size) in zip(scored, spans, strict=True)])
        for question in part:
            of_one = [next(per_byte) for _ in question.choices]
            grades.append(float(of_one.index(max(of_one)) == question.right))
    return Score(task.name, len(grades), 1, mean(grades), half_interval(grades), 0.0, 1.0)
