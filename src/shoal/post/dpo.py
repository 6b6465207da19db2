"""`shoal dpo`: direct preference optimisation (2305.18290). One visible loop.

What the starting model thinks of every answer is computed once, before the first update: no second model is kept.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DPOCommand, UserError
from ..data import Tokenizer
from ..data.conversations import Conversation, read_pairs, tokenize
from ..model import Transformer
from ..runtime import Machine, inference, peak_memory
from ..train.metrics import MetricsLog
from ..train.signals import StopRequest
from .losses import row_logprobs
from .packing import Text, best_fit, make_row
from .progress import Progress
from .tuning import Checkpoints, Tuner, finish, load_trainable, open_run, require_chat_template, save


@dataclass
class Pair:
    """Two answers to one prompt, and the log-probability of each under the starting model."""

    chosen: Text
    rejected: Text
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def length(self) -> int:
        return self.chosen.length + self.rejected.length


def run_dpo(command: DPOCommand) -> dict[str, Any]:
    """Train as asked; figures go to the run folder, progress to stderr. Returns the summary."""
    command.validate()
    plain = load_trainable(command.model, command.machine, command.tune)
    model, tokenizer, machine = plain.model, plain.tokenizer, plain.machine
    require_chat_template(command.model, tokenizer)
    pairs = read(tokenizer, command, model.config.max_position_embeddings)
    folder = open_run(command, "dpo", machine)
    began = time.perf_counter()
    refer(model, machine, pairs, command)
    per_epoch = math.ceil(len(pairs) / command.pairs)
    steps = command.steps or max(1, round(command.epochs * per_epoch))
    tuner = Tuner(model, command.tune, steps)
    batches = endless(pairs, command)
    done, row = 0, {}
    checkpoints, progress = Checkpoints(folder, command.folder, model, tokenizer), Progress(steps)
    with folder.held(), MetricsLog(folder.path, False) as log, StopRequest() as stop:
        for step in range(1, steps + 1):
            row = train_step(model, machine, next(batches), command) | {"grad_norm": tuner.step(step), "step": step}
            row["seconds"] = round(time.perf_counter() - began, 2)
            log.write(row)
            progress.step(row)
            done = step
            if stop.asked:
                break
            checkpoints.step(step)
    finish(model, command.tune)
    save(folder, done, model, tokenizer)
    summary = {
        "steps": done, "pairs": len(pairs), "seconds": round(time.perf_counter() - began, 2), "folder": str(folder.path),
        "loss": row["loss"], "accuracy": row["accuracy"], "margin": row["margin"], "stopped": stop.asked,
        "peak_memory": peak_memory(machine.device),
    }  # fmt: skip
    folder.write_json("summary.json", summary)
    return summary


def read(tokenizer: Tokenizer, command: DPOCommand, longest: int) -> list[Pair]:
    """All pairs that fit; those that do not are counted on stderr."""
    limit, found, left_out = min(command.max_length or longest, longest), [], 0
    for place, chosen, rejected in read_pairs(command.data):
        pair = Pair(last_answer(tokenizer, chosen, place), last_answer(tokenizer, rejected, place))
        if max(len(pair.chosen.ids), len(pair.rejected.ids)) > limit:
            left_out += 1
        else:
            found.append(pair)
    if left_out:
        print(f"{left_out:,} pairs have an answer with more than {limit:,} tokens and are left out", file=sys.stderr)
    if not found:
        raise UserError("there is nothing to learn from: no pair fits; check --data and --max-length")
    return found


def last_answer(tokenizer: Tokenizer, conversation: Conversation, place: str) -> Text:
    """Only the last answer is judged: what was said before is the same in both. The template may write something after it."""
    example = tokenize(tokenizer, conversation, place)
    if not example.written[1:].any():
        raise UserError(f"{place}: the chat template marks nothing of an answer as the model's that follows a prompt: check both")
    breaks = np.cumsum(~example.written)
    return Text(example.ids, example.written & (breaks == breaks[example.written].max()))


def refer(model: Transformer, machine: Machine, pairs: Sequence[Pair], command: DPOCommand) -> None:
    """Note what the model thinks of every answer before anything changes."""
    model.eval()
    for rows in _rows(pairs, command.tune.micro_tokens):
        with inference(machine):
            sums = answer_logprobs(model, machine, [pairs[i] for i in rows]).tolist()
        for i, (chosen, rejected) in zip(rows, sums, strict=True):
            pairs[i].reference = (chosen, rejected)


def train_step(model: Transformer, machine: Machine, pairs: Sequence[Pair], command: DPOCommand) -> dict[str, Any]:
    """Gradients of one update's pairs; its figures."""
    model.train()
    loss = accuracy = margin = 0.0
    for rows in _rows(pairs, command.tune.micro_tokens):
        members = [pairs[i] for i in rows]
        with machine.autocast():
            logprobs = answer_logprobs(model, machine, members)
        reference = torch.tensor([pair.reference for pair in members], device=machine.device)
        rewards = command.beta * (logprobs - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        total = -torch.nn.functional.logsigmoid(margins).sum()
        (total / len(pairs)).backward()
        loss += float(total.detach())
        accuracy += float((margins > 0).sum())
        margin += float(margins.detach().sum())
    return {name: value / len(pairs) for name, value in (("loss", loss), ("accuracy", accuracy), ("margin", margin))}


def answer_logprobs(model: Transformer, machine: Machine, pairs: Sequence[Pair]) -> Tensor:
    """`[pairs, 2]`: of the chosen and of the rejected answers, summed over their tokens."""
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    logprobs, _ = row_logprobs(model, make_row(texts).to(machine.device))
    counts = torch.tensor([int(text.learnt[1:].sum()) for text in texts], device=machine.device)
    owner = torch.arange(len(texts), device=machine.device).repeat_interleave(counts)
    return logprobs.new_zeros(len(texts)).index_add(0, owner, logprobs).view(-1, 2)


def _rows(pairs: Sequence[Pair], capacity: int) -> list[list[int]]:
    """Indices of pairs that go through the model together."""
    lengths = [pair.length for pair in pairs]
    return best_fit(lengths, max(capacity, max(lengths)))


def endless(pairs: Sequence[Pair], command: DPOCommand) -> Iterator[list[Pair]]:
    """Updates' pairs; every pair comes once before any comes again."""
    epoch = 0
    while True:
        order = list(range(len(pairs)))
        random.Random(f"{command.tune.seed} {epoch}").shuffle(order)
        for first in range(0, len(order), command.pairs):
            yield [pairs[i] for i in order[first : first + command.pairs]]
        epoch += 1
