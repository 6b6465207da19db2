"""Reinforcement: engine and trainer agree to the bit that matters, and what is rewarded becomes likely."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.small_models import make_model

from shoal.cli import main
from shoal.config import EngineOptions, GRPOCommand, MachineOptions, TuneOptions, UserError
from shoal.data import Tokenizer
from shoal.data.chat_template import encode_chat
from shoal.engine import Engine, load_plain
from shoal.formats.checkpoints import complete_checkpoints
from shoal.formats.huggingface import load_model
from shoal.kernels.selection import BACKEND
from shoal.post import rollouts
from shoal.post.grpo import Episode, Run
from shoal.post.losses import row_logprobs
from shoal.post.packing import make_rows
from shoal.post.problems import Problem, Split
from shoal.post.rollouts import Sample, Sampler
from shoal.post.tasks import prompt_of
from shoal.post.tuning import load_trainable, with_chat_template
from shoal.runtime import Machine

PROMPTS = [[1, 2, 3, 4, 5] * 8, [9, 8, 7], [11] * 33]
OPTIONS = EngineOptions(max_running=16, step_tokens=64)


@pytest.mark.parametrize("kind", ["v3", "v2", "llama"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("bf16", 1e-2)])
def test_engine_and_trainer_agree_and_use_the_same_experts(kind: str, precision: str, most: float, tokenizer: Tokenizer) -> None:
    if precision == "bf16" and BACKEND.cpu is None:
        pytest.skip("the engine computes in bf16 with C++ kernels only")
    machine = Machine(torch.device("cpu"), precision, 1, 1.0, "")
    # Weights as a trained model has them: with the large ones of the other tests, bf16 itself is the difference.
    model = make_model(kind, initializer_range=0.05)
    sampler = Sampler(model, tokenizer, machine, OPTIONS)
    samples = [sample for group in sampler.sample(PROMPTS, 6, 24, seed=0) for sample in group]
    if model.moe_layers:
        assert all(s.experts is not None and s.experts.shape[1] == len(s.prompt) + len(s.ids) - 1 for s in samples)
    difference, count = 0.0, 0
    for sample in samples:
        [row] = make_rows([sample.to_text(replay=True)], 4096)
        with torch.no_grad(), machine.autocast():
            logprobs = row_logprobs(model, row)[0].numpy()
            if row.experts is not None:
                output = model(row.ids, documents=row.documents, chosen=row.experts)
                assert all(torch.equal(stats.indices, chosen) for stats, chosen in zip(output.routing, row.experts, strict=True))
        difference += float(np.abs(logprobs - sample.logprobs).sum())
        count += len(sample.ids)
    assert difference / count < most


def test_samples_follow_the_weights_as_they_change(tokenizer: Tokenizer) -> None:
    machine = Machine(torch.device("cpu"), "fp32", 1, 1.0, "")
    model = make_model("v3")
    sampler = Sampler(model, tokenizer, machine, OPTIONS)
    sampler.sample(PROMPTS, 2, 8, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    sampler.refresh()
    fresh = Sampler(model, tokenizer, machine, OPTIONS)
    for one, other in zip(sampler.sample(PROMPTS, 2, 8, seed=1), fresh.sample(PROMPTS, 2, 8, seed=1), strict=True):
        assert [s.ids for s in one] == [s.ids for s in other]


class LikesOneToken:
    """Rewards replies by the share of one letter in them."""

    name, continues, stops = "likes", False, ()

    def problems(self, split: Split, seed: int):
        while True:
            yield Problem("red fish?", "", "")

    def grade(self, problem: Problem, sample: Sample) -> float:
        return sample.text.count("e") / max(len(sample.text), 1)


def steps_of(trained: Path, tune: TuneOptions, count: int) -> tuple[Run, list[dict]]:
    plain = load_trainable(str(trained), MachineOptions("cpu", "fp32", 1), tune)
    command = GRPOCommand("", tune=tune, tasks=("likes",), steps=count, prompts=2, group=16, max_tokens=12, overlong="keep", max_running=32)
    tokenizer = with_chat_template(plain.tokenizer, None)
    run = Run(command, [LikesOneToken()], plain.model, tokenizer, plain.machine)  # type: ignore[list-item]
    return run, [run.step(step) for step in range(1, count + 1)]


def test_what_is_rewarded_becomes_more_likely(trained: Path) -> None:
    _, rows = steps_of(trained, TuneOptions(lr=1e-2, warmup=0), 20)
    assert np.mean([row["reward"] for row in rows[-4:]]) > np.mean([row["reward"] for row in rows[:4]]) + 0.05
    assert max(row["mismatch"] for row in rows) < 1e-3


@pytest.mark.parametrize("runner", ["native", "torch"])
def test_with_adapters_the_engine_samples_from_the_merged_weights(trained: Path, runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if runner == "torch":
        monkeypatch.setattr(rollouts, "BACKEND", replace(BACKEND, cpu=None))
    run, rows = steps_of(trained, TuneOptions(lr=5e-2, warmup=0, lora_rank=4), 4)
    assert max(p.abs().max() for name, p in run.model.named_parameters() if name.endswith("adapter_b")) > 1e-2
    assert max(row["mismatch"] for row in rows) < 1e-3


class LikesEverySecond(LikesOneToken):
    """Every group has something to teach, whatever was drawn."""

    def __init__(self) -> None:
        self._turns = cycle((0.0, 1.0))

    def grade(self, problem: Problem, sample: Sample) -> float:
        return next(self._turns)


@pytest.mark.parametrize("overlong", ["mask", "keep"])
def test_cut_off_replies_teach_nothing_when_masked(trained: Path, overlong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_plain(str(trained), MachineOptions("cpu", "fp32", 1))
    before = {name: p.clone() for name, p in plain.model.named_parameters()}
    command = GRPOCommand("", tasks=("likes",), steps=1, prompts=2, group=4, max_tokens=2, max_running=8, overlong=overlong)  # type: ignore[arg-type]
    run = Run(command, [LikesEverySecond()], plain.model, with_chat_template(plain.tokenizer, None), plain.machine)  # type: ignore[list-item]
    draw = run.sampler.sample

    def cut_off(*args: Any, **more: Any) -> list[list[Sample]]:
        return [[replace(sample, finished=False) for sample in group] for group in draw(*args, **more)]

    monkeypatch.setattr(run.sampler, "sample", cut_off)
    assert run.step(1)["finished"] == 0
    assert all(torch.equal(p, before[name]) for name, p in plain.model.named_parameters()) == (overlong == "mask")


def test_each_update_of_a_step_learns_from_its_own_share(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_plain(str(trained), MachineOptions("cpu", "fp32", 1))
    command = GRPOCommand("", tasks=("likes",), steps=1, prompts=4, group=2, updates=2, max_tokens=2, max_running=8)
    run = Run(command, [LikesOneToken()], plain.model, with_chat_template(plain.tokenizer, None), plain.machine)  # type: ignore[list-item]
    texts = [["e", ""], ["", "e"], ["ee", "eb"], ["bb", "eb"]]
    groups = [[Sample([1], [2], np.zeros(1, np.float32), None, text, True) for text in group] for group in texts]
    seen: list[list[tuple[str, float]]] = []

    def update(episodes: list[Episode]) -> dict[str, float]:
        seen.append([(episode.sample.text, episode.advantage) for episode in episodes])
        return {"mismatch": 0.0}

    monkeypatch.setattr(run.sampler, "sample", lambda *_, **__: groups)
    monkeypatch.setattr(run, "_update", update)
    run.step(1)
    assert seen == [[("e", 0.5), ("", -0.5), ("", -0.5), ("e", 0.5)], [("ee", 0.25), ("eb", -0.25), ("bb", -0.25), ("eb", 0.25)]]


def test_the_command_trains_evaluates_and_saves(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    args = ["--steps", "2", "--prompts", "2", "--group", "2", "--max-tokens", "8", "--eval-problems", "4", "--eval-every", "1"]
    assert main(["grpo", str(chat_model), "--tasks", "strings", "--out", str(out), "--json", *args, "--kl", "0.01"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 2
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"reward", "length", "entropy", "mismatch", "kl", "scores"} <= rows[2].keys()
    assert (
        main(["eval", str(out), "--tasks", "strings", "sorting:3", "--problems", "3", "--max-tokens", "8", "--samples", "2", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tasks"]["sorting:3"]["problems"] == 3
    assert "2" in result["tasks"]["strings"]["pass_at"]


def test_checkpoints_on_the_way_have_adapters_merged(chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ["--steps", "2", "--prompts", "2", "--group", "2", "--max-tokens", "8", "--eval-problems", "2", "--save-minutes", "1e-9"]
    assert main(["grpo", str(chat_model), "--tasks", "strings", "--out", str(out), *args, "--lora-rank", "2"]) == 0
    first, last = complete_checkpoints(out)
    assert load_model(first).state_dict().keys() == load_model(last).state_dict().keys()


def test_every_task_gets_a_problem(chat_model: Path) -> None:
    assert main(["grpo", str(chat_model), "--tasks", "strings", "sorting", "--prompts", "1"]) == 2


def test_users_problems_and_rewards(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"red {i}", "answer": "blue"}) + "\n" for i in range(9)))
    (tmp_path / "mine.py").write_text("def reward(prompt, reply, answer):\n    return len(reply) / 100\n")
    command = ["grpo", str(chat_model), "--data", str(tmp_path / "p.jsonl"), "--rewards", "exact", f"{tmp_path / 'mine.py'}:reward*0.5"]
    small = ["--steps", "1", "--prompts", "2", "--group", "2", "--max-tokens", "8", "--eval-problems", "2", "--out", str(tmp_path / "run")]
    assert main([*command, *small]) == 0


def test_a_single_problem_is_refused_before_anything_is_written(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "red", "answer": "blue"}) + "\n")
    assert main(["grpo", str(chat_model), "--data", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


SMALL = ["--prompts", "2", "--group", "2", "--max-tokens", "8", "--eval-problems", "2"]


def test_prompts_that_leave_no_room_are_left_out(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["red", *["red fish swims over the reef " * 30] * 3, "blue"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "blue"}) + "\n" for text in questions))
    command = ["grpo", str(chat_model), "--data", str(tmp_path / "p.jsonl"), *SMALL, "--out", str(tmp_path / "run"), "--steps", "3"]
    assert main(command) == 0
    assert "3 problems of p.jsonl do not fit into the 64 tokens that the model sees and are left out" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "blue"}) + "\n" for text in questions[:4]))
    assert main([*command, "--overwrite"]) == 2
    assert "too few problems" in capsys.readouterr().err


def test_a_mistyped_reward_is_refused_before_anything_is_written(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"red {i}", "answer": "blue"}) + "\n" for i in range(9)))
    (tmp_path / "mine.py").write_text("def reward(prompt, reply, answer):\n    return 1\n")
    args = ["grpo", str(chat_model), "--data", str(tmp_path / "p.jsonl"), "--rewards", f"{tmp_path / 'mine.py'}:rewrad"]
    assert main([*args, "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("every", ["0", "1"])
def test_a_run_that_is_stopped_claims_no_evaluation_that_it_has_not_made(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    step = Run.step

    def stopping(run: Run, number: int) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(run, number)

    monkeypatch.setattr(Run, "step", stopping)
    args = ["grpo", str(chat_model), "--tasks", "strings", *SMALL, "--out", str(tmp_path / "run"), "--steps", "9", "--eval-every", every]
    assert main(args) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1
    assert summary["stopped"]
    assert summary["before"]
    assert (summary["after"] is None) == (every == "0")


def test_a_thought_that_the_template_begins_belongs_to_the_reply(trained: Path) -> None:
    run, _ = steps_of(trained, TuneOptions(), 0)
    problem = Problem("What does <think> or <｜User｜> mean?", "", "")
    for name, thinking, begun in (("r1", False, "<think>\n"), ("v3.1", False, ""), ("v3.1", True, "<think>")):
        tokenizer = with_chat_template(run.tokenizer, name)
        prompt = prompt_of(tokenizer, run.tasks[0], problem, thinking)
        assert prompt == encode_chat(tokenizer, [{"role": "user", "content": problem.question}], thinking=thinking)
        [[sample]] = run.sampler.sample([prompt], 1, 8, seed=0)
        assert sample.text == begun + tokenizer.decode(sample.ids)


def test_thoughts_are_asked_for_where_the_template_leaves_the_choice(
    trained: Path, conversations_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sft", str(trained), "--data", str(conversations_file), "--chat-template", "v3.1", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "chat")]) == 0
    asked: list[list[int]] = []
    add = Engine.add_request
    monkeypatch.setattr(Engine, "add_request", lambda engine, request: asked.append(list(request.prompt)) or add(engine, request))
    tokenizer = Tokenizer.load(next((tmp_path / "chat" / "checkpoints").iterdir()))
    args = [str(tmp_path / "chat"), "--tasks", "strings", "--thinking", "--max-tokens", "2"]
    assert main(["eval", *args, "--problems", "2"]) == 0
    assert main(["grpo", *args, *SMALL, "--out", str(tmp_path / "run"), "--steps", "1"]) == 0
    assert len(asked) > 4
    assert all(tokenizer.decode(prompt, skip_special=False).endswith("<｜Assistant｜><think>") for prompt in asked)


@pytest.mark.parametrize("verb", ["eval", "grpo"])
def test_a_template_that_leaves_no_choice_refuses_thinking(verb: str, chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(chat_model), "--tasks", "strings", "--thinking"]) == 2
    assert "leave --thinking away" in capsys.readouterr().err


def test_a_base_model_is_refused(trained: Path) -> None:
    assert main(["grpo", str(trained), "--tasks", "strings"]) == 2


@pytest.mark.parametrize(
    "changes", [{"group": 1}, {"prompts": 3, "updates": 2}, {"prompts": 1, "data": "x"}, {"tasks": ()}, {"tune": TuneOptions(lr=-1)}]
)
def test_options_that_cannot_work_are_refused(changes: dict) -> None:
    with pytest.raises(UserError):
        GRPOCommand("m", **{"tasks": ("strings",), **changes}).validate()
