"""Single runs of the comparison: trained, scored, and kept as one line of a file, so that nothing is trained twice."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal

import torch

from ...atomic import remove_folder
from ...config import TrainConfig, UserError
from ...kernels.selection import BACKEND
from ...plan.cost import count_parameters
from ...train import train
from ...train.metrics import read_rows
from ...train.run_folder import RunFolder
from .frontier import Curve

Trainer = Callable[[TrainConfig], "tuple[dict[str, Any], list[dict[str, Any]]]"]
"""Runs a training; the summary, and the rows of its steps."""


@dataclass(frozen=True)
class Run:
    """Result of one training run with its complete schedule."""

    side: str
    budget: float
    """FLOPs that were asked for."""
    seed: int
    key: str
    """Of all that decides the result."""
    flops: float
    """FLOPs that were spent."""
    seconds: float
    """Steps times the time of an undisturbed one (the lower quartile of all steps), and counting n-grams."""
    bpb: float
    tokens: int
    steps: int
    skipped: int
    """Steps whose loss or gradient was not finite."""
    width: int
    layers: int
    batch: int
    rate: float
    """AdamW's learning rate."""
    parameters: int
    active: int
    """Parameters that a token multiplies with."""
    tables: int
    """Numbers that are looked up: embedding, the tables beside it, and counted n-grams."""
    max_vio: float | None = None
    """How much more than its share the busiest expert had in the last steps; None without experts."""

    @property
    def shape(self) -> str:
        return f"{self.layers} x {self.width}"


class Runs:
    """The runs in `folder/runs.jsonl`."""

    def __init__(self, folder: Path, data: str, trainer: Trainer | None = None) -> None:
        """`data` is the fingerprint of what is trained on; `trainer` takes the place of `train_in` in tests."""
        self.folder, self._data, self._trainer = folder, data, trainer or (lambda config: train_in(config, folder / "run"))
        self.file = folder / "runs.jsonl"
        self._known: dict[tuple[str, str], Run] = {}
        if self.file.exists():
            text = self.file.read_text(encoding="utf-8")
            for line in text.splitlines():
                try:
                    run = Run(**json.loads(line))
                except (ValueError, TypeError):
                    continue  # half a line of a run that was killed, or another version's
                self._known[run.side, run.key] = run
            if text and not text.endswith("\n"):
                self.file.write_text(text + "\n", encoding="utf-8")  # half a line must not swallow the next

    def get(self, side: str, budget: float, config: TrainConfig) -> Run:
        """The result of `config`, trained now if it is not known yet."""
        key = key_of(config, self._data)
        if (side, key) not in self._known:
            summary, steps = self._trainer(config)
            run = _run(side, budget, config, key, summary, steps)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            self._known[side, key] = run
        return self._known[side, key]


@contextmanager
def open_runs(folder: Path, data: str, trainer: Trainer | None = None) -> Iterator[Runs]:
    """The runs in `folder`, which is made where it is missing. Raises `UserError` where another process adds to them."""
    folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).held():
        yield Runs(folder, data, trainer)


class Stopped(UserError):
    """A signal came: no further run begins."""


def only_the_end(config: TrainConfig, data: tuple[str, ...], seed: int, threads: int, device: Literal["cuda", "cpu"]) -> TrainConfig:
    """The settings of a run of which only the end counts; it is scored on all held-out documents, of larger texts on a million tokens.

    A few documents would say little: half of what 65,536 tokens of 74 documents of technical prose were was a single one.
    """
    checkpoint = replace(config.checkpoint, every_minutes=0, keep_last=1)
    quiet = replace(config, eval_every_minutes=0, eval_tokens=16384, checkpoint=checkpoint)
    return replace(quiet, data=data, seed=seed, threads=threads, device=device)


def key_of(config: TrainConfig, data: str) -> str:
    """Equal for settings that give the same result on the same data, wherever it lies, by the same code."""
    settings = [data, code_fingerprint(), asdict(replace(config, data=(), out=None, resume=False, overwrite=False, json=False))]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def code_fingerprint() -> str:
    """Of the code that runs, changes that were not committed and compiled kernels included, and of torch's version."""
    files = sorted(Path(__file__).parents[2].rglob("*.py"))
    if BACKEND.module is not None:
        files.append(Path(BACKEND.module.__file__))
    return hashlib.sha256(b"".join([torch.__version__.encode(), *(file.read_bytes() for file in files)])).hexdigest()


def train_in(config: TrainConfig, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, and remove the run's folder. Raises `Stopped` where a signal asked for it, be it while the end was scored."""
    remove_folder(folder)
    trained = train(replace(config, out=str(folder)))
    if trained.stop_asked:
        raise Stopped("stopped; what is finished is kept, the same command goes on")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    remove_folder(folder)
    return trained.summary, rows


def curves(runs: Sequence[Run], side: str, cost: str) -> list[Curve]:
    """One curve a seed, by increasing seed; `cost` is `flops` or `seconds`."""
    seeds = sorted({run.seed for run in runs})
    return [[(getattr(run, cost), run.bpb) for run in runs if run.side == side and run.seed == seed] for seed in seeds]


def _run(side: str, budget: float, config: TrainConfig, key: str, summary: dict[str, Any], steps: list[dict[str, Any]]) -> Run:
    times = [config.tokens_per_step / row["tokens_per_second"] for row in steps]
    undisturbed = quantiles(times, n=4)[0] if len(times) > 1 else times[0]
    counted = count_parameters(config.model)
    return Run(
        side=side, budget=budget, seed=config.seed, key=key, flops=summary["train_flops"],
        seconds=undisturbed * len(times) + summary["counting_seconds"],
        bpb=summary["val_bpb"], tokens=summary["tokens"], steps=summary["steps"], skipped=summary["skipped"],
        width=config.model.hidden_size, layers=config.model.num_hidden_layers, batch=config.batch_size, rate=config.optimizer.adam_lr,
        parameters=counted.trained, active=counted.active, tables=counted.embedding + counted.tables + summary["counted_ngrams"],
        max_vio=summary.get("max_vio"),
    )  # fmt: skip
