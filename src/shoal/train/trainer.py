"""Pretraining: one visible loop.

The walk of a step: batches -> passes (model: attention, experts, dispatch; losses; gradients) -> optimizers -> routing bias.
What one of several processes computes is put together by `state.team` and `state.shards`, for which a single process costs nothing.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig, TrainConfig, UserError
from ..data import Batches, Corpus, PreparedData, Tokenizer, open_corpus, prepare
from ..formats.checkpoints import complete_checkpoints
from ..formats.huggingface import open_model
from ..formats.locate import locate_model
from ..parallel import join
from ..plan.budget import training_flops_per_token
from ..plan.cost import optimizer_flops
from ..runtime import Machine, start
from .balance import routing_row, update_biases
from .budget import Budget
from .counting import WITHOUT, AlternatingBatches, Counting, count_into, counts_while_training
from .display import Display
from .early_updates import EarlyUpdates
from .likelihood import BATCH_TOKENS, Document, Likelihood, held_out, likelihood
from .metrics import MetricsLog
from .optimizer import clip_gradients, decay_of
from .passes import Passes, make_passes
from .run_folder import RunFolder, find_run, learnt_from, new_run, refuse_changes, refuse_taken, run_facts
from .schedule import extends_context, learning_rate_share, mtp_weight
from .signals import StopRequest
from .state import TrainState
from .summary import describe_model, summarize

SKIPPED_IN_A_ROW = 20
"""So many steps without a finite loss and gradient, one after the other, end the run: it will not recover."""

LOAD_EVERY = 10
"""Steps between rows that hold the load of every expert."""


@dataclass
class Trained:
    """Result of a run."""

    folder: Path
    summary: dict[str, Any]
    finished: bool
    """False where the run was asked to stop before its budget was spent."""
    stop_asked: bool = False
    """Also where that came too late to leave anything out: whoever has more to do than this run stops."""
    reports: bool = True
    """False in processes that leave it to the first of them to tell."""


def train(requested: TrainConfig) -> Trained:
    """Train as asked. Figures go to the run folder, progress to stderr; nothing is printed to stdout."""
    requested, started = begin_with(requested) if requested.start else (requested, None)
    requested.validate()
    team = join(requested)
    begun = team.remembered_run()
    folder = team.agree(find_run(begun or requested.out) if begun or requested.resume else None)
    if folder is None:
        team.decide(lambda: refuse_taken(requested, started))  # before the data is prepared, which takes its time
    precision = folder.facts()["precision"] if folder else requested.precision
    machine = team.same_precision(start(requested.device, precision, requested.threads or team.cores, requested.return_memory))
    if requested.offload and machine.device.type == "cuda":
        raise UserError("--offload keeps moments where a CPU computes with them: leave it away on a GPU, or add --device cpu")
    if requested.offload and not requested.model.n_routed_experts:
        raise UserError("--offload is for the optimizer state of experts, of which this model has none: leave it away")
    corpus = open_corpus(requested.data, requested.corpus)
    if team.is_first:
        print(f"reading {corpus.describe()}", file=sys.stderr)
    data = team.first_then_others(lambda: read_data(corpus, requested, started))
    if folder is None and started is not None and requested.model.count_entries and learnt_from(started) == data.fingerprint:
        raise UserError(
            f"{requested.start} has counted this very text, and so would learn to trust answers that it knows: give other data, "
            "or go on with its run by --resume"
        )
    config = requested if started is not None else replace(requested, model=fit_tokenizer(requested.model, data.tokenizer))
    config.validate_sampled_softmax()  # a small text has fewer tokens than were asked for
    lookahead = 1 + config.model.num_nextn_predict_layers
    place = {"rank": team.data_rank, "world": team.layout.data, "lookahead": lookahead, "lookback": config.model.looks_back}
    counting = Counting(config, data.train) if counts_while_training(config) else None
    texts = counting.texts if counting is not None else (data.train,)
    each = [Batches(text, config.sequence_length, config.batch_size, config.seed, parts=len(texts), **place) for text in texts]
    batches = each[0] if counting is None else AlternatingBatches(each[0], each[1], counting.study)
    if counting is not None and folder is None and config.minutes and counting.seconds >= 60 * config.minutes:
        raise UserError(
            f"counting n-grams took {counting.seconds:.0f} s, all of --minutes {config.minutes:g}: give more minutes or less data, "
            f"or {WITHOUT}"
        )
    if folder is None:
        folder = team.decide(lambda: begin_run(requested, corpus.name, data.fingerprint, machine))
    else:
        refuse_changes(folder.facts(), requested, data.fingerprint)
    team.remember_run(str(folder.path))
    with contextlib.ExitStack() as held:
        team.decide(lambda: held.enter_context(folder.held()))
        if team.is_first:
            folder.write_config(config)
        result = run_loop(TrainState.create(config, folder, data, batches, machine, team, counting), machine)
        team.leave()
    return result


def read_data(corpus: Corpus, requested: TrainConfig, started: Path | None) -> PreparedData:
    """The text in the tokens of the model that the run starts from, of a tokenizer that was named, or of one made for it."""
    known = started or requested.corpus.tokenizer
    tokenizer = Tokenizer.load(known) if known else None
    return prepare(corpus, tokenizer, requested.model.vocab_size, requested.corpus)


def begin_with(requested: TrainConfig) -> tuple[TrainConfig, Path]:
    """`requested` with the shape of the model that the run started from, and the folder of one with its tokenizer.

    A run that goes on has both in its own folder: that of `start` may be gone.
    """
    assert requested.start is not None
    run = find_run(requested.out) if requested.resume else None
    if run is not None and (complete := complete_checkpoints(run.path)):
        source, model = complete[-1], run.settings().model
    else:
        source = locate_model(requested.start)
        with open_model(source) as (empty, _):
            model = empty.config
    return replace(requested, model=model), source


def begin_run(config: TrainConfig, name: str, data_fingerprint: str, machine: Machine) -> RunFolder:
    """The folder of a new run, with what was asked for in it."""
    folder = new_run(config, name)
    folder.write_json("run.json", run_facts(config, data_fingerprint, machine.precision))
    return folder


def fit_tokenizer(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The shape that goes with a tokenizer, which may hold fewer or more tokens than asked for, and ids of its own."""
    return replace(
        model,
        vocab_size=math.ceil(tokenizer.vocab_size / 64) * 64,  # rows of the embedding come in multiples of 64
        bos_token_id=tokenizer.first_id,
        eos_token_id=tokenizer.eos_id,
    )


def run_loop(state: TrainState, machine: Machine) -> Trained:
    """Take steps until the budget is spent or a signal asks to stop; evaluate, save, sum up."""
    config, model, at, team, shards = state.config, state.model, state.counters, state.team, state.shards
    budget = Budget.of(config)
    flops = training_flops_per_token(config)
    step_flops = optimizer_flops(config.model, config.optimizer)
    bytes_per_token = state.data.train.num_bytes / state.data.train.num_tokens
    skipped_in_a_row = 0
    if team.is_first:
        state.folder.keep_metrics_up_to(at.step)
    model.train()
    passes = make_passes(state, machine)
    early = EarlyUpdates(state.optimizers) if config.update_early else None
    with (
        MetricsLog(state.folder.path, config.tensorboard, active=team.is_first) as log,
        Display(str(budget), describe_model(config.model, machine, team.layout), quiet=not team.is_first) as display,
        StopRequest() as stop,
    ):
        began = time.perf_counter() - at.seconds
        stopping = team.any(stop.asked)
        while (progress := budget.progress(at.step, at.seconds)) < 1 and not stopping:
            step_began = time.perf_counter()
            lr_share = learning_rate_share(config.schedule, progress)
            weight = mtp_weight(config.mtp, progress) if config.model.num_nextn_predict_layers else 0.0

            if model.config.rope_scaling is None and extends_context(config, progress):
                model.extend_context(config.sequence_length)
                display.message(f"from step {at.step + 1} on the model sees {config.model.max_position_embeddings:,} tokens")
            if state.teacher is not None:
                state.teacher.fade(at.tokens)
            if state.sampler is not None:
                state.sampler.begin(at.step)
            state.optimizers.set_rates(lr_share, decay_of(config.optimizer, at.tokens / state.data.train.num_tokens))
            figures, routing = passes(state.batches.next(), weight)
            figures = team.sum(figures) / team.layout.data
            routing.share(team)
            shards.collect_gradients()
            grad_norm = early.norm() if early else clip_gradients(shards, config.optimizer.clip)

            # The one place of a step where the device is waited for.
            on_host = torch.cat([figures, grad_norm[None], *routing.figures()]).tolist()
            total, main, mtp, balance, norm, *routed = on_host
            finite = math.isfinite(total) and math.isfinite(norm)
            if finite:
                state.optimizers.step()
                update_biases(model, routing, config.balance.bias_update_speed)
            state.optimizers.zero_grad()
            shards.forget_gradients()

            now = team.agree_on_time(time.perf_counter() - began) + began
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            spent = (flops.total if weight else flops.main) * config.tokens_per_step + step_flops
            at.step += 1
            at.tokens += config.tokens_per_step
            at.flops += spent
            at.skipped += not finite
            at.seconds = now - began
            row = {
                "step": at.step, "tokens": at.tokens, "flops": at.flops, "seconds": round(at.seconds, 3),
                "loss": main, "bpb": main / math.log(2) / bytes_per_token, "lr": lr_share, "grad_norm": norm,
                "tokens_per_second": config.tokens_per_step / (now - step_began),
                "tflops": spent / (now - step_began) / 1e12,
                "peak_share": spent / (now - step_began) / (machine.peak_flops * team.layout.world),
                "skipped": at.skipped,
            }  # fmt: skip
            if weight:
                row["mtp_loss"] = mtp
            row |= passes.figures()
            if routed:
                row |= {"balance_loss": balance} | routing_row(routed)
                if at.step % LOAD_EVERY == 1:
                    row["expert_load"] = routing.shares()
            log.write(row)
            display.step(row, budget.progress(at.step, at.seconds), budget.seconds_left(at.step, at.seconds))

            if skipped_in_a_row >= SKIPPED_IN_A_ROW:
                raise UserError(f"no finite loss for {SKIPPED_IN_A_ROW} steps in a row: lower the learning rates and start again")
            stopping = team.any(stop.asked)
            if budget.progress(at.step, at.seconds) < 1 and not stopping:
                saving = state.save_is_due()
                if saving or state.evaluation_is_due():
                    bpb = evaluate(state, passes, machine, log, display, config.eval_tokens)
                    at.last_eval = at.seconds = team.agree_on_time(time.perf_counter() - began)
                if saving:
                    try:
                        state.save(bpb)
                    except OSError as error:  # a disk that is full for a while is no reason to end a run of days
                        if not team.is_alone:
                            raise
                        display.message(f"not saved ({error}): the next save tries again")
                    at.last_save = at.seconds = team.agree_on_time(time.perf_counter() - began)

        if stopping:
            state.save(None)
            state.finish_saving()
            resume = f"shoal train --resume --out {shlex.quote(str(state.folder.path))}"
            display.message(f"stopped at step {at.step} and saved; go on with: {resume}")
            return Trained(state.folder.path, {"step": at.step}, finished=False, stop_asked=True, reports=team.is_first)
        counts = model.model.counted is not None and counts_while_training(config)
        if counts:
            at.counting_seconds += count_into(model, state.data.train)
        state.save(evaluate(state, passes, machine, log, display, config.eval_tokens), again=counts)
        if at.best_step != at.step and config.checkpoint.keep_best:
            display.message(f"step {at.best_step} was better ({at.best_bpb:.4f} bits per byte): it is what {state.folder.path} means")
        display.message("scoring the held-out text")
        documents = held_out(state.data, 64 * config.eval_tokens)
        final = score(state, passes, machine, documents)
    state.finish_saving()
    if not math.isfinite(final.nats):
        raise UserError(f"the trained model gives numbers that are not finite: lower the learning rates; it is kept in {state.folder.path}")
    if not team.is_first:
        return Trained(state.folder.path, {"step": at.step}, finished=True, stop_asked=stop.asked, reports=False)
    summary = summarize(state, machine, documents, final)
    state.folder.write_json("summary.json", summary)
    return Trained(state.folder.path, summary, finished=True, stop_asked=stop.asked)


def score(state: TrainState, passes: Passes, machine: Machine, documents: list[Document]) -> Likelihood:
    """How likely the model holds held-out documents; where memory is limited, as many tokens at a time as a training pass has."""
    config, window = state.config, state.config.sequence_length
    at_once = (config.micro_batch_size or config.batch_size) * window if config.memory_limit else BATCH_TOKENS
    return likelihood(state.model, machine, documents, window=window, batch_tokens=at_once, team=state.team, run=passes.run)


def evaluate(state: TrainState, passes: Passes, machine: Machine, log: MetricsLog, display: Display, tokens: int) -> float:
    """Bits per byte of about `tokens` tokens of held-out documents, the same ones every time."""
    at = state.counters
    documents = held_out(state.data, tokens)
    result = score(state, passes, machine, documents)
    row = {
        "step": at.step, "tokens": at.tokens, "flops": at.flops, "seconds": round(at.seconds, 3),
        "val_bpb": result.bits_per_byte, "val_loss": result.nats_per_token,
    }  # fmt: skip
    log.write(row)
    display.evaluation(row)
    return result.bits_per_byte
