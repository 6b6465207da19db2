"""Preferences: the margin grows, and the reference is what the model was before."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shoal.cli import main
from shoal.config import DPOCommand, TuneOptions, UserError
from shoal.data import Tokenizer
from shoal.data.conversations import Conversation
from shoal.post import dpo
from shoal.post.dpo import Pair, last_answer
from shoal.post.packing import Text
from shoal.runtime import Machine


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
        "--epochs",
        "3",
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
    assert summary["steps"] == 3 * math.ceil(25 / 8)
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


def made_up_pairs(count: int) -> list[Pair]:
    """Of different lengths; their first token is their number."""
    texts = [Text(np.full(3 + i, i), np.ones(3 + i, bool)) for i in range(count)]
    return [Pair(text, text, (-0.5 * i, -1.0)) for i, text in enumerate(texts)]


@pytest.mark.parametrize("micro_tokens", [12, 1000])
def test_the_loss_is_that_of_the_paper(micro_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, logprobs = made_up_pairs(4), torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-1.5, -1.5], [-0.2, -4.0]], requires_grad=True)

    def answer_logprobs(model: nn.Module, machine: Machine, members: list[Pair]) -> torch.Tensor:
        return logprobs[[pair.chosen.ids[0] for pair in members]]

    monkeypatch.setattr(dpo, "answer_logprobs", answer_logprobs)
    command = DPOCommand("", tune=TuneOptions(micro_tokens=micro_tokens), beta=0.7)
    figures = dpo.train_step(nn.Linear(1, 1), Machine(torch.device("cpu"), "fp32", 1, 1.0, ""), pairs, command)  # type: ignore[arg-type]
    chosen, rejected = (logprobs - torch.tensor([pair.reference for pair in pairs])).unbind(1)
    margins = 0.7 * (chosen - rejected)
    loss = torch.log1p(torch.exp(-margins)).mean()
    assert figures == pytest.approx({"loss": loss.item(), "accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()})
    [wanted] = torch.autograd.grad(loss, [logprobs])
    torch.testing.assert_close(logprobs.grad, wanted)


def test_every_pair_comes_once_before_any_comes_again() -> None:
    batches = dpo.endless(made_up_pairs(7), DPOCommand("", pairs=3))
    epochs = [[pair.chosen.ids[0] for batch in islice(batches, 3) for pair in batch] for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
