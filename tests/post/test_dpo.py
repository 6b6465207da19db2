"""Preferences: the margin grows, and the reference is what the model was before."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.config import UserError
from shoal.data import Tokenizer
from shoal.data.conversations import Conversation
from shoal.post.dpo import last_answer


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"red fish {i % 5}?", "chosen": "over the reef", "rejected": "under the reef"} for i in range(24)]
    rows.append({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": None, "rejected": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]})  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_the_preferred_answers_become_more_likely(
    chat_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    out = tmp_path / "run"
    options = [
        "--steps",
        "12",
        "--pairs",
        "8",
        "--lr",
        "0.003",
        "--threads",
        "1",
        "--precision",
        "fp32",
        "--json",
        "--out",
        str(out),
        *more,
    ]
    assert main(["dpo", str(chat_model), "--data", str(pairs_file), *options]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # nothing has changed yet: no margin
    assert summary["margin"] > 0.05
    assert summary["accuracy"] > 0.9


CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
TURNS = [("user", "red?"), ("assistant", "green fish"), ("user", "and?"), ("assistant", "blue")]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.json, tokenizer.config, template)


def test_the_last_answer_is_judged_whatever_the_template_writes_after_it(tokenizer: Tokenizer) -> None:
    talk = Conversation([{"role": role, "content": content} for role, content in TURNS])
    for template in (CHATML, CHATML.replace("{{ '\n' }}", "")):
        text = last_answer(with_template(tokenizer, template), talk, "here")
        assert tokenizer.decode(text.ids[text.learnt].tolist(), skip_special=False) == "blue<｜end▁of▁sentence｜>"


def test_an_answer_of_which_nothing_is_learnt_is_refused(tokenizer: Tokenizer) -> None:
    talk = Conversation([{"role": "assistant", "content": ""}])
    with pytest.raises(UserError, match="here: the chat template marks nothing"):
        last_answer(with_template(tokenizer, CHATML.replace("'<|' + m.role + '|>'", "''")), talk, "here")


@pytest.mark.parametrize("row", [{"prompt": "a", "chosen": "b"}, {"prompt": 3, "chosen": "b", "rejected": "c"}, ["a"]])
def test_rows_that_are_no_pairs_are_refused(chat_model: Path, tmp_path: Path, row: object) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["dpo", str(chat_model), "--data", str(tmp_path / "pairs.jsonl")]) == 2
