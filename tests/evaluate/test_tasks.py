"""Tasks from files: GSM8K, HumanEval, multiple choice."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from shoal.cli import main
from shoal.config import UserError
from shoal.post.choices import Choices
from shoal.post.rollouts import Sample
from shoal.post.tasks import parse_task


def sample(text: str, finished: bool = True) -> Sample:
    return Sample([0], [1], np.zeros(1, np.float32), None, text, finished)


def test_gsm8k_grades_the_number_and_nothing_that_was_cut_off(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
    (tmp_path / "g.jsonl").write_text(json.dumps(row) + "\n")
    task = parse_task(f"gsm8k={tmp_path / 'g.jsonl'}")
    [problem] = task.problems("test", 0)
    assert task.grade(problem, sample("<think>3</think>So it is 1004.")) == 1
    assert task.grade(problem, sample("<think>1004</think>So it is 3.")) == 0
    assert task.grade(problem, sample("1004", finished=False)) == 0


def test_what_is_tested_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i % 30}?", "answer": f"#### {i % 30}"} for i in range(40)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = parse_task(f"gsm8k={tmp_path / 'g.jsonl'}", training=True)
    tested = {problem.question for problem in task.problems("test", 0)}
    trained = {problem.question for problem in islice(task.problems("train", 0), 100)}
    assert len(tested) == 5
    assert not tested & trained
    assert len(tested | trained) == 30
    assert len(list(parse_task(f"gsm8k={tmp_path / 'g.jsonl'}").problems("test", 0))) == 40, "evaluation asks the whole file"


def test_humaneval_runs_the_function_in_both_styles(tmp_path: Path) -> None:
    row = {
        "prompt": "from typing import List\n\ndef total(xs: List[int]) -> int:\n    '''Sum.'''\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
        "entry_point": "total",
    }
    (tmp_path / "h.jsonl").write_text(json.dumps(row) + "\n")
    task = parse_task(f"humaneval={tmp_path / 'h.jsonl'}")
    [problem] = task.problems("test", 0)
    whole = row["prompt"] + "    return sum(xs)\n"
    assert task.grade(problem, sample("    return sum(xs)\n")) == 1
    assert task.grade(problem, sample("    return sum(xs)\n", finished=False)) == 0
    assert task.grade(problem, sample(f"<think>\nmaybe\n```python\n{whole}```\nor not")) == 0
    assert task.grade(problem, sample(f"<think>\n```python\ndef total(xs): pass\n```</think>\n{whole}")) == 1
    assert task.grade(problem, sample("    return 0\n")) == 0
    assert task.grade(problem, sample("Sure:\n```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```")) == 1
    assert task.grade(problem, sample("    import sys; sys.exit(0)\n")) == 0


def test_choices_are_scored_and_reported(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "red", "choices": ["fish", "over"], "answer": "B"}, {"question": "blue", "choices": ["the", "reef"], "answer": 0}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = [row | {"answer": other} for row, other in zip(rows, (0, "B"), strict=True)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    assert main(["eval", str(trained), "--tasks", *(f"choice={tmp_path / name}.jsonl" for name in "cd"), "--json"]) == 0
    one, other = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"].values()
    assert one["problems"] == other["problems"] == 2
    assert one["accuracy"] + other["accuracy"] == 1


def test_what_does_not_fit_is_left_out_and_costs_no_other_score(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "red fish swims over the reef " * 30
    problems = [{"question": text, "answer": "#### 1"} for text in ("red", long, "blue")]
    choices = [{"question": "red", "choices": ["fish", text], "answer": 0} for text in ("over", long)]
    for name, rows in (("g", problems), ("long", problems[1:2]), ("c", choices)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["eval", str(trained), "--max-tokens", "2", "--tasks", f"gsm8k={tmp_path / 'g.jsonl'}", f"choice={tmp_path / 'c.jsonl'}"]
    assert main([*args, "--json"]) == 0
    output = capsys.readouterr()
    assert {name: score["problems"] for name, score in json.loads(output.out.splitlines()[-1])["tasks"].items()} == {
        "gsm8k": 2,
        "choice=c.jsonl": 1,
    }
    assert "1 problems of gsm8k do not fit" in output.err
    assert "1 problems of choice=c.jsonl do not fit" in output.err
    assert main([*args, f"gsm8k={tmp_path / 'long.jsonl'}"]) == 2
    output = capsys.readouterr()
    assert "no problem of gsm8k fits" in output.err
    assert [line.split()[0] for line in output.out.splitlines()] == ["task", "gsm8k", "choice=c.jsonl"]


@pytest.mark.parametrize(
    "row", [{"question": "a"}, {"question": "a", "choices": ["b"], "answer": 1}, {"question": 1, "choices": [], "answer": 0}]
)
def test_rows_that_are_no_questions_are_refused(tmp_path: Path, row: dict) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError):
        Choices(str(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    "args", [[], ["--tasks", "strings", "--data", "x"], ["--tasks", "chess"], ["--tasks", "strings", "--samples", "0"]]
)
def test_bad_input_is_refused(trained: Path, args: list[str]) -> None:
    assert main(["eval", str(trained), *args]) == 2
