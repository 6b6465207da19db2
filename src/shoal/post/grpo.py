"""`shoal grpo`: reinforcement learning from rewards that a program computes. One visible loop.

The walk of a step: problems -> prompts -> samples from the engine -> rewards -> advantages -> packed rows -> policy loss -> update ->
the engine's weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import EngineOptions, GRPOCommand
from ..data import Tokenizer
from ..model import Transformer
from ..runtime import Machine, peak_memory
from ..train.metrics import MetricsLog
from ..train.run_folder import RunFolder
from ..train.signals import StopRequest
from .file_tasks import FileTask, Rewarded
from .losses import row_logprobs
from .packing import Row, Text, best_fit, make_row
from .policy_loss import advantages, are_equal, policy_loss
from .problems import Problem
from .progress import Progress
from .reference import Reference
from .rewards import Judge
from .rollouts import Sample, Sampler
from .tasks import Score, Task, examine, mean, parse_task, prompt_of, refuse_thinking, that_fit
from .tuning import Checkpoints, Tuner, finish, load_trainable, open_run, require_chat_template, save


@dataclass
class Episode:
    """A sample with what it is worth."""

    sample: Sample
    advantage: float


def run_grpo(command: GRPOCommand) -> dict[str, Any]:
    """Train as asked; figures go to the run folder, progress to stderr. Returns the summary."""
    command.validate()
    tasks = [parse_task(text, training=True) for text in command.tasks]
    with Judge(command.rewards) as judge:
        if command.data is not None:
            tasks.append(Rewarded(Path(command.data).name, command.data, judge))
        plain = load_trainable(command.model, command.machine, command.tune)
        require_chat_template(command.model, plain.tokenizer)
        if command.thinking:
            refuse_thinking(plain.tokenizer)
        leave_out_long_prompts(tasks, plain.tokenizer, plain.model.config.max_position_embeddings, command.thinking)
        folder = open_run(command, "grpo", plain.machine)
        summary = Run(command, tasks, plain.model, plain.tokenizer, plain.machine).train(folder)
    for reason, count in judge.failures.items():
        print(f"{count:,} rewards were lost: {reason}", file=sys.stderr)
    return summary


def leave_out_long_prompts(tasks: Sequence[Task], tokenizer: Tokenizer, context: int, thinking: bool) -> None:
    """Forget problems of files whose prompt leaves no room for a reply; they are counted on stderr."""
    for task in tasks:
        if isinstance(task, FileTask):
            fit = that_fit(task.name, [len(prompt_of(tokenizer, task, problem, thinking)) + 1 for problem in task.rows], context)
            task.keep([task.rows[i] for i in fit])


class Run:
    """One run: a model, its sampler, and the problems it is given."""

    def __init__(self, command: GRPOCommand, tasks: Sequence[Task], model: Transformer, tokenizer: Tokenizer, machine: Machine) -> None:
        self.command, self.tasks, self.model, self.tokenizer, self.machine = command, tasks, model, tokenizer, machine
        options = EngineOptions(max_running=command.max_running, step_tokens=max(512, 4 * command.max_running), speculate="auto")
        self.sampler = Sampler(model, tokenizer, machine, options)
        self.tuner = Tuner(model, command.tune, command.steps * command.updates)
        self.reference = Reference(model) if command.policy.kl else None
        self._problems = [task.problems("train", command.tune.seed) for task in tasks]
        self._updates = 0

    def train(self, folder: RunFolder) -> dict[str, Any]:
        """Take all steps, evaluate, save; returns the summary."""
        command = self.command
        before = self.evaluate()
        scores: list[Score] | None = None
        began = time.perf_counter()
        done = 0
        checkpoints, progress = Checkpoints(folder, command.folder, self.model, self.tokenizer), Progress(command.steps)
        with folder.held(), MetricsLog(folder.path, False) as log, StopRequest() as stop:
            log.write({"step": 0, "scores": [score.row() for score in before]})
            for step in range(1, command.steps + 1):
                row = {"step": step} | self.step(step) | {"seconds": round(time.perf_counter() - began, 2)}
                scores, last = None, step == command.steps
                if command.eval_every and (step % command.eval_every == 0 or last):
                    scores = self.evaluate()
                    row["scores"] = [score.row() for score in scores]
                log.write(row)
                progress.step(row)
                done = step
                if stop.asked:
                    break
                checkpoints.step(step)
        if scores is None and not stop.asked:
            scores = self.evaluate()
        finish(self.model, command.tune)
        save(folder, done, self.model, self.tokenizer)
        summary = {
            "steps": done, "seconds": round(time.perf_counter() - began, 2), "folder": str(folder.path),
            "before": [score.row() for score in before], "after": None if scores is None else [score.row() for score in scores],
            "stopped": stop.asked, "peak_memory": peak_memory(self.machine.device),
        }  # fmt: skip
        folder.write_json("summary.json", summary)
        return summary

    def evaluate(self) -> list[Score]:
        """pass@1 on the held-out problems, always the same ones."""
        command = self.command
        return [
            examine(
                self.sampler.engine,
                self.tokenizer,
                task,
                count=command.eval_problems,
                samples=1,
                max_tokens=command.max_tokens,
                seed=0,
                thinking=command.thinking,
            )
            for task in self.tasks
        ]

    def step(self, step: int) -> dict[str, Any]:
        """Sample, judge, learn; the figures of one step."""
        command, began = self.command, time.perf_counter()
        asked = list(islice(self._next_problems(), command.prompts))
        prompts = [prompt_of(self.tokenizer, task, problem, command.thinking) for task, problem in asked]
        seed = command.tune.seed * 1_000_000 + step
        groups = self.sampler.sample(prompts, command.group, command.max_tokens, seed, experts=command.routing_replay)
        sampled = time.perf_counter()
        grades = [[task.grade(problem, sample) for sample in group] for (task, problem), group in zip(asked, groups, strict=True)]
        rewards = torch.tensor(grades, dtype=torch.float64)
        graded = time.perf_counter()
        row = self._describe(groups, rewards)
        worth = advantages(rewards, command.policy.divide_by_std)
        share = command.prompts // command.updates
        learnt: list[dict[str, float]] = []
        for first in range(0, command.prompts, share):
            episodes = [
                Episode(sample, advantage)
                for group, of_group in zip(groups[first : first + share], worth[first : first + share].tolist(), strict=True)
                for sample, advantage in zip(group, of_group, strict=True)
            ]
            learnt.append(self._update(episodes))
        self.sampler.refresh()
        row |= {name: mean([figures[name] for figures in learnt]) for name in learnt[0]}
        row |= {
            # Of the first update, before it: later ones differ from the engine by what they have learnt.
            "mismatch": learnt[0]["mismatch"],
            "rollout_seconds": sampled - began,
            "train_seconds": time.perf_counter() - graded,
            "rollout_tokens_per_second": sum(len(s.ids) for group in groups for s in group) / (sampled - began),
        }
        return row

    def _next_problems(self) -> Iterator[tuple[Task, Problem]]:
        while True:
            for task, source in zip(self.tasks, self._problems, strict=True):
                yield task, next(source)

    def _describe(self, groups: list[list[Sample]], rewards: Tensor) -> dict[str, Any]:
        samples = [sample for group in groups for sample in group]
        return {
            "reward": float(rewards.mean()),
            "length": mean([len(sample.ids) for sample in samples]),
            "finished": mean([float(sample.finished) for sample in samples]),
            "decided": float(are_equal(rewards).float().mean()),
            "by_task": {task.name: float(rewards[i :: len(self.tasks)].mean()) for i, task in enumerate(self.tasks)},
        }

    def _update(self, episodes: list[Episode]) -> dict[str, float]:
        """One update of the weights from samples and their advantages."""
        command = self.command
        keeps = [e for e in episodes if len(e.sample.prompt) + len(e.sample.ids) > 1 and (e.sample.finished or command.overlong == "keep")]
        # Every reply counts as one of `episodes`, each of its tokens as one of `max_tokens`: no length is favoured.
        scale = 1 / (len(episodes) * command.max_tokens)
        texts = [e.sample.to_text(command.routing_replay) for e in keeps]
        sums = {"mismatch": 0.0, "entropy": 0.0, "kl": 0.0, "clipped": 0.0, "left_out": 0.0}
        count = 0
        self.model.train()
        for items in best_fit([text.length for text in texts], max(command.tune.micro_tokens, max((t.length for t in texts), default=1))):
            members = [keeps[i] for i in items]
            row = make_row([texts[i] for i in items]).to(self.machine.device)
            figures, tokens = self._backward(row, members, [texts[i] for i in items], scale)
            sums = {name: total + figures[name] for name, total in sums.items()}
            count += tokens
        self._updates += 1
        norm = self.tuner.step(self._updates)
        return {name: total / max(count, 1) for name, total in sums.items()} | {"grad_norm": norm}

    def _backward(self, row: Row, members: list[Episode], texts: list[Text], scale: float) -> tuple[dict[str, float], int]:
        """Gradients of one row added; sums of figures over its tokens, and their number."""
        device = self.machine.device
        lengths = torch.tensor([len(e.sample.ids) for e in members], device=device)
        sequence = torch.arange(len(members), device=device).repeat_interleave(lengths)
        sampled = torch.from_numpy(np.concatenate([e.sample.logprobs for e in members])).to(device)
        advantage = torch.tensor([e.advantage for e in members], device=device)[sequence]
        reference = None
        if self.reference is not None:
            with torch.no_grad(), self.machine.autocast(), self.reference:
                reference = row_logprobs(self.model, row)[0]
        with self.machine.autocast():
            logprobs, entropy = row_logprobs(self.model, row)
        loss = policy_loss(logprobs, sampled, advantage, sequence, self.command.policy, reference)
        (loss.total * scale).backward()
        figures = torch.stack(
            [(logprobs.detach() - sampled).abs().sum(), entropy.sum(), loss.kl, loss.clipped.float(), loss.masked]
        ).tolist()
        assert row.learnt == len(sampled)
        return dict(zip(("mismatch", "entropy", "kl", "clipped", "left_out"), figures, strict=True)), len(sampled)
