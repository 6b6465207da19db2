"""`shoal sft`: supervised fine-tuning on conversations. One visible loop."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

from ..config import SFTCommand, UserError
from ..data import Tokenizer
from ..data.conversations import read_conversations, tokenize
from ..model import Transformer
from ..runtime import Machine, inference, peak_memory
from ..train.balance import StepRouting, update_biases
from ..train.metrics import MetricsLog
from ..train.signals import StopRequest
from .experts_tuning import train_only_used_experts
from .losses import row_losses
from .packing import Row, Text, make_rows
from .preview import show
from .progress import Progress
from .tuning import Checkpoints, Tuner, finish, load_trainable, open_run, save, with_chat_template


def run_sft(command: SFTCommand) -> dict[str, Any]:
    """Train as asked; figures go to the run folder, progress to stderr. Returns the summary."""
    command.validate()
    plain = load_trainable(command.model, command.machine, command.tune)
    tokenizer = with_chat_template(plain.tokenizer, command.chat_template)
    if command.esft_share and not plain.model.moe_layers:
        raise UserError(f"--esft-share chooses among experts, and {command.model} has none: leave it away")
    if command.preview:
        return show(tokenizer, command.data, command.preview)
    texts = read_texts(tokenizer, command, plain.model.config.max_position_embeddings)
    training, held_out = split(texts, command)
    folder = open_run(command, "sft", plain.machine)
    model, machine = plain.model, plain.machine
    if command.esft_share:
        kept = train_only_used_experts(model, rows_of(training[:256], command, model), command.esft_share, machine)
        print(f"training {kept.trained} of {kept.experts} experts", file=sys.stderr)
    plan = Plan(training, command)
    tuner = Tuner(model, command.tune, plan.steps)
    before = held_out_loss(model, machine, held_out, command)
    began, seen, done = time.perf_counter(), 0, 0
    checkpoints, progress = Checkpoints(folder, command.folder, model, tokenizer), Progress(plan.steps)
    with folder.held(), MetricsLog(folder.path, False) as log, StopRequest() as stop:
        for step, batch in enumerate(plan.batches(), 1):
            row = train_step(model, machine, tuner, batch, command, step)
            seen += sum(text.length for text in batch)
            row |= {"step": step, "tokens": seen, "seconds": round(time.perf_counter() - began, 2)}
            log.write(row)
            progress.step(row)
            done = step
            if stop.asked:
                break
            checkpoints.step(step)
    finish(model, command.tune)
    save(folder, done, model, tokenizer)
    after = held_out_loss(model, machine, held_out, command)
    summary = {
        "steps": done, "tokens": seen, "seconds": round(time.perf_counter() - began, 2), "folder": str(folder.path),
        "conversations": len(training), "val_loss_before": before, "val_loss": after, "stopped": stop.asked,
        "peak_memory": peak_memory(machine.device),
    }  # fmt: skip
    folder.write_json("summary.json", summary)
    return summary


def read_texts(tokenizer: Tokenizer, command: SFTCommand, longest: int) -> list[Text]:
    """All conversations that fit, tokenized; those that do not are counted on stderr."""
    limit = min(command.max_length or longest, longest)
    texts, left_out = [], 0
    for place, conversation in read_conversations(command.data):
        example = tokenize(tokenizer, conversation, place)
        if len(example.ids) > limit:
            left_out += 1
        else:
            texts.append(Text(example.ids, example.written))
    if left_out:
        print(f"{left_out:,} conversations have more than {limit:,} tokens and are left out", file=sys.stderr)
    if not texts:
        raise UserError("there is nothing to learn from: no conversation fits; check --data and --max-length")
    return texts


def split(texts: list[Text], command: SFTCommand) -> tuple[list[Text], list[Text]]:
    """Training and held-out texts."""
    order = list(range(len(texts)))
    random.Random(command.tune.seed).shuffle(order)
    count = min(int(len(texts) * command.val_fraction), len(texts) - 1)
    return [texts[i] for i in sorted(order[count:])], [texts[i] for i in sorted(order[:count])]


class Plan:
    """Which texts make up every update: at most `batch_tokens` (or one longer text), in an order that depends on the seed."""

    def __init__(self, texts: list[Text], command: SFTCommand) -> None:
        self._texts, self._command = texts, command
        self.steps = command.steps or sum(1 for _ in self.batches())

    def batches(self) -> Iterator[list[Text]]:
        """`steps` of them. Epochs are cut one by one: every text is seen once before any is seen again."""
        command, texts = self._command, self._texts
        if command.steps:
            yield from islice(chain.from_iterable(self._epoch(number, len(texts)) for number in count()), command.steps)
            return
        left = max(1, round(command.epochs * len(texts)))
        for number, first in enumerate(range(0, left, len(texts))):
            yield from self._epoch(number, min(left - first, len(texts)))

    def _epoch(self, number: int, size: int) -> Iterator[list[Text]]:
        """The first `size` texts of an epoch in batches."""
        order = list(range(len(self._texts)))
        random.Random(f"{self._command.tune.seed} {number}").shuffle(order)
        batch: list[Text] = []
        tokens = 0
        for text in (self._texts[i] for i in order[:size]):
            if batch and tokens + text.length > self._command.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(text)
            tokens += text.length
        yield batch


def rows_of(texts: Sequence[Text], command: SFTCommand, model: Transformer) -> list[Row]:
    """Texts packed for forward passes."""
    capacity = max(command.tune.micro_tokens, max(text.length for text in texts))
    depth = model.config.num_nextn_predict_layers
    return make_rows(texts, capacity, depth)


def train_step(model: Transformer, machine: Machine, tuner: Tuner, batch: Sequence[Text], command: SFTCommand, step: int) -> dict[str, Any]:
    """One update; its figures. Every learnt token counts the same, in whichever row it lies."""
    model.train()
    rows = rows_of(batch, command, model)
    learnt = sum(row.learnt for row in rows)
    nats, mtp, routing = 0.0, 0.0, StepRouting()
    mtp_weight = command.mtp_weight if model.config.num_nextn_predict_layers else 0.0
    for row in rows:
        with machine.autocast():
            losses = row_losses(model, row.to(machine.device), learnt, mtp_weight, command.balance_loss)
        losses.total.backward()
        nats += float(losses.nats)
        mtp += float(losses.mtp)
        routing.add(losses.routing)
    norm = tuner.step(step)
    if not command.esft_share:  # there the router stays as it is
        update_biases(model, routing, command.balance_speed)
    figures = {"loss": nats / max(learnt, 1), "grad_norm": norm, "lr": tuner.rate(step), "learnt": learnt}
    if mtp_weight:
        figures["mtp_loss"] = mtp / max(learnt, 1)
    return figures


def held_out_loss(model: Transformer, machine: Machine, texts: Sequence[Text], command: SFTCommand) -> float | None:
    """Mean nats per learnt token; None where nothing is held out."""
    if not texts:
        return None
    model.eval()
    nats, count = 0.0, 0
    with inference(machine):
        for row in rows_of(texts, command, model):
            moved = row.to(machine.device)
            nats += float(row_losses(model, moved, 1, 0.0, 0.0).nats)
            count += moved.learnt
    return nats / max(count, 1)
