"""Everything that changes during training, and how it is saved and found again."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..data import Batches, PreparedData
from ..formats import checkpoints
from ..formats.huggingface import load_state, read_config
from ..formats.locate import locate_model
from ..formats.weight_files import read_generation
from ..model import Transformer, init_weights
from ..parallel import Shards, Team, divide, make_dispatcher
from ..runtime import Machine
from .candidates import Sampler
from .counting import AlternatingBatches, Counting, Teacher
from .fp8 import compute_in_fp8
from .gather import gather_model, gather_optimizers, scatter_optimizers
from .optimizer import Optimizers
from .qat import go_on, on_grid, round_weights
from .recompute import recompute
from .run_folder import RunFolder

MOST_SAVING = 0.04
"""Share of the time that saving by the clock may take: counts of a large text are gigabytes."""


@dataclass
class Counters:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Wall-clock time in the training loop, evaluations and saving included, time between stop and resume not."""
    counting_seconds: float = 0.0
    """Taken by counting n-grams; before the first step they are part of `seconds`."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite: nothing was applied, with `update_early` nothing where a gradient was not finite."""
    best_bpb: float = float("inf")
    best_step: int = -1
    last_eval: float = 0.0
    last_save: float = 0.0


@dataclass
class TrainState:
    """Model, optimizers, position in the data, counters: what a checkpoint holds."""

    config: TrainConfig
    folder: RunFolder
    data: PreparedData
    model: Transformer
    optimizers: Optimizers
    batches: Batches | AlternatingBatches
    team: Team
    shards: Shards
    """Of the model, what this process holds."""
    teacher: Teacher | None = None
    sampler: Sampler | None = None
    counters: Counters = field(default_factory=Counters)
    _saving: Future[None] | None = None
    _saving_took: float = 0.0
    """Seconds that the last save kept training waiting."""

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        folder: RunFolder,
        data: PreparedData,
        batches: Batches | AlternatingBatches,
        machine: Machine,
        team: Team,
        counting: Counting | None = None,
    ) -> TrainState:
        """Fresh from `config.seed`, or from the folder's last complete checkpoint where there is one."""
        if team.is_first:
            checkpoints.clean_temporary(folder.path)
        complete = team.agree(checkpoints.complete_checkpoints(folder.path))
        # A model that was trained to its end has the counts of all text, not those of a half, and may see more than its rows.
        saved = read_config(complete[-1]) if complete else config.model
        shape = replace(config.model, count_entries=saved.count_entries, rope_scaling=saved.rope_scaling)
        model = Transformer(shape, dispatcher=make_dispatcher(config.parallel, team, config.model.n_routed_experts or 0))
        if complete:
            source: Path | None = complete[-1]
        else:
            init_weights(model, config.seed)
            source = locate_model(config.start) if config.start is not None else None
        if source is not None:
            load_state(model, source)
            folder.generation = read_generation(source)
        model = model.to(machine.device)
        if counting is not None:
            counting.serve(model.model.counted or counting.module.to(machine.device))
        if machine.precision == "fp8":
            compute_in_fp8(model, config.fp8)
        if config.qat:
            round_weights(model)
        recompute(model, config.recompute)
        shards = divide(model, config.parallel, team)
        if model.model.ngrams is not None:
            model.model.ngrams.sparse_gradient = team.is_alone
        offload = folder.path if config.offload else None
        optimizers = Optimizers(model, config.optimizer, shards, offload, one_by_one=config.update_early)
        teacher = Teacher.of(config, counting) if config.teacher.order and counting is not None else None
        sampler = None
        if config.sampled_softmax.drawn:
            counted = counting.module if counting is not None else model.model.counted
            hinted = config.model.repeat_window > 0
            sampler = Sampler(config.sampled_softmax, data.train, config.model.vocab_size, config.seed, counted, teacher, hinted)
        took = counting.seconds if counting is not None else 0.0
        counters = Counters(seconds=took, counting_seconds=took)
        state = cls(config, folder, data, model, optimizers, batches, team, shards, teacher, sampler, counters)
        if complete:
            state._load(complete[-1])
        return state

    def _load(self, path: Path) -> None:
        """All but the weights, and of rounded ones what they were before."""
        saved = checkpoints.load_checkpoint_state(path, mapped=self.config.offload)
        if self.config.qat:
            go_on(self.model, saved["qat"])
        scatter_optimizers(saved["optimizers"], self.optimizers, self.config.model, self.config.optimizer, self.shards)
        self.batches.load_state_dict(saved["batches"])
        self.counters = Counters(**saved["counters"])

    def save(self, bpb: float | None, *, again: bool = False) -> None:
        """Write a checkpoint, `bpb` being its bits per byte on held-out text where measured; let go of those no longer kept.

        `again`: also where there is one of this step, which then knows less. All processes of a team call this; the first one gathers
        copies and writes them while training goes on. A process by itself has no copies and waits.
        """
        began = time.perf_counter()
        self.finish_saving()
        at = self.counters
        before = at.best_bpb, at.best_step
        if bpb is not None and bpb < at.best_bpb:
            at.best_bpb, at.best_step = bpb, at.step
        saved: dict[str, Any] = {
            "optimizers": gather_optimizers(self.optimizers, self.config.model, self.config.optimizer, self.shards),
            "batches": self.batches.state_dict(),
            "counters": dict(vars(at)),
        }
        model = gather_model(self.model, self.shards)
        try:
            if self.config.qat:
                with on_grid(self.model) as saved["qat"]:
                    self._write(model, saved, replace(at), again)
            elif self.team.is_alone:
                self._write(model, saved, replace(at), again)
            elif self.team.is_first:
                writer = ThreadPoolExecutor(1, "checkpoint")
                self._saving = writer.submit(self._write, model, saved, replace(at), again)
                writer.shutdown(wait=False)
        except OSError:
            at.best_bpb, at.best_step = before  # which is what there is
            raise
        self._saving_took = self.team.agree_on_time(time.perf_counter() - began)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on disk; raises what its writing raised."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _write(self, model: Transformer, saved: dict[str, Any], at: Counters, again: bool) -> None:
        keep = self.config.checkpoint
        with self.optimizers.moments.being_read():
            checkpoints.save_checkpoint(self.folder.path, at.step, model, self.data.tokenizer, saved, self.folder.generation, again=again)
        if at.best_step >= 0:
            # Written every time: a run that was killed before it got here catches up.
            self.folder.write_json("best.json", {"step": at.best_step, "val_bpb": at.best_bpb})
        checkpoints.prune(self.folder.path, keep.keep_last, {at.best_step} if keep.keep_best else set())

    def save_is_due(self) -> bool:
        keep, at = self.config.checkpoint, self.counters
        by_step = keep.every_steps and at.step % keep.every_steps == 0
        wait = max(60 * keep.every_minutes, self._saving_took / MOST_SAVING)
        return bool(by_step or (keep.every_minutes and at.seconds - at.last_save > wait))

    def evaluation_is_due(self) -> bool:
        every = self.config.eval_every_minutes
        return bool(every and self.counters.seconds - self.counters.last_eval > 60 * every)
