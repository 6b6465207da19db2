"""The folder of a run: what is in it, and how it survives being killed.

RUN/run.json        what was asked for and on what data, so that a resume can tell a change
RUN/config.toml     every setting as it was resolved
RUN/metrics.jsonl   one line a step or evaluation
RUN/best.json       the step of the best evaluation
RUN/checkpoints/    see formats.checkpoints
RUN/summary.json    figures of the finished run
RUN/report/         pictures, and report.html beside them
RUN/.lock           held by the process that trains
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from filelock import FileLock, Timeout

from .. import __version__
from ..atomic import new_file, remove_folder
from ..config import ModelConfig, TrainConfig, UserError
from ..config.recipes import from_table, load_recipe, write_toml
from .metrics import read_rows

RESUME_MAY_CHANGE = {
    "out", "resume", "overwrite", "json", "minutes", "tokens", "steps", "threads", "tensorboard",
    "eval_every_minutes", "eval_tokens", "checkpoint", "micro_batch_size", "prompts",
    "nproc", "parallel", "memory_limit", "recompute", "return_memory", "offload",
}  # fmt: skip
"""Settings that do not change what is learned from which data; everything else must stay as it was."""
TRAINED_LENGTH = "training_sequence_length"
"""In `config.json` of models that were made from a run's: see `trained_length`."""


class Destination(Protocol):
    """Where a run is to be written; see `TrainConfig`."""

    out: str | None
    overwrite: bool


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.generation: dict[str, Any] = {}
        """`generation_config.json` of the model that the run begins with: checkpoints hold it, too."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Only this process writes into the folder. Raises `UserError` where another one does."""
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another process is training in {self.path}: wait until it has ended, or choose another --out") from None
        except NotImplementedError:
            pass  # some file systems of clusters have no locks
        try:
            yield
        finally:
            lock.release()

    def write_json(self, name: str, value: Any) -> None:
        """Replace a file at once: a reader sees the old or the new one, never half of one."""
        with new_file(self.path / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / name} cannot be read ({error}): is {self.path} the folder of a run?") from None

    def pretrains(self) -> bool:
        """Whether this is a run that can be resumed. Fine-tuning cannot, and knows no data fingerprint."""
        facts = self.read_json("run.json")
        return isinstance(facts, dict) and {"requested", "data_fingerprint", "precision"} <= facts.keys()

    def facts(self) -> dict[str, Any]:
        """What `run_facts` wrote when the run began."""
        if not self.pretrains():
            raise UserError(f"{self.path / 'run.json'} does not describe a run of shoal train: choose another --out")
        return cast("dict[str, Any]", self.read_json("run.json"))

    def settings(self, *, team: bool = False) -> TrainConfig:
        """What the run was asked for, as the defaults of resuming it; for a team without the measures that only a single process takes."""
        requested = from_table(TrainConfig, self.facts()["requested"], str(self.path / "run.json"))
        if team:
            requested = dataclasses.replace(requested, memory_limit=None, recompute=(), offload=False)
        return dataclasses.replace(requested, out=str(self.path), overwrite=False, json=False)

    def keep_metrics_up_to(self, step: int) -> None:
        """Drop the rows of steps after `step` (they will be made again) and a line cut short by a kill."""
        self.metrics.touch()
        with new_file(self.metrics) as temporary, temporary.open("w", encoding="utf-8") as kept:
            kept.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in read_rows(self.metrics) if row["step"] <= step)

    def write_config(self, config: TrainConfig) -> None:
        write_toml(config, self.path / "config.toml")


def refuse_taken(config: Destination, source: Path | None = None) -> None:
    """Raise `UserError` where --out holds what must not be written over. `source` is the model that the run begins with, if any."""
    if config.out is None:
        return
    path = Path(config.out).expanduser()
    if source is not None and config.overwrite and source.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{source} lies in {path}, which --overwrite would discard before the run has a model: choose another --out")
    if (path / "run.json").exists():
        if not config.overwrite:
            resume = "--resume goes on with it, " if isinstance(config, TrainConfig) else ""
            raise UserError(f"{path} already holds a run: {resume}--overwrite discards it; or choose another --out")
        with RunFolder(path).held():
            pass  # nobody trains in what is to be discarded
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not the folder of a run: choose another --out")


def new_run(config: Destination, name: str, source: Path | None = None) -> RunFolder:
    """Create the folder of a new run: --out, or the next free runs/NAME. Refuses what `refuse_taken` does."""
    refuse_taken(config, source)
    path = Path(config.out or f"runs/{name}").expanduser()
    if (path / "run.json").exists() and config.out is not None:
        remove_folder(path)
    try:
        if config.out is None:
            return RunFolder(_next_free(path))
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be created ({error.strerror}): choose another --out") from None
    return RunFolder(path)


def _next_free(path: Path) -> Path:
    """Make `path`, or the first of `path`-2, `path`-3, ... that is not there."""
    free, number = path, 1
    while True:
        try:
            free.mkdir(parents=True)
            return free
        except FileExistsError:
            number += 1
            free = path.with_name(f"{path.name}-{number}")


def find_run(out: str | None) -> RunFolder:
    """The run to resume: `out`, or of those under runs/ that pretrain the one that was written to last."""
    if out is not None:
        path = Path(out).expanduser()
        if not (path / "run.json").exists():
            raise UserError(f"{out} holds no run to resume: check --out, or leave out --resume to start one")
        return RunFolder(path)
    runs = [RunFolder(file.parent) for file in Path("runs").glob("*/run.json")]
    # metrics.jsonl is appended to all the time, which does not touch the folder itself.
    runs.sort(key=lambda run: max(file.stat().st_mtime for file in run.path.iterdir()), reverse=True)
    found = next((run for run in runs if run.pretrains()), None)
    if found is None:
        raise UserError("there is no run under runs/ to resume: name one with --out, or leave out --resume")
    return found


def learnt_from(model: Path) -> str | None:
    """Fingerprint of the data that was pretrained on by the run whose checkpoint `model` is; None for other folders and runs."""
    run = model.parent.parent
    if model.parent.name != "checkpoints" or not (run / "run.json").is_file():
        return None
    return cast("str | None", RunFolder(run).read_json("run.json").get("data_fingerprint"))  # fine-tuning has none


def trained_length(model: Path, config: ModelConfig) -> int | None:
    """Sequence length of pretraining: of the run whose checkpoint `model` is, or as `config.json` of a fine-tuned or quantized model says;
    None where nothing tells."""
    recipe = model.parent.parent / "config.toml"
    if model.parent.name == "checkpoints" and recipe.is_file():
        return load_recipe(str(recipe)).sequence_length
    length = config.extra.get(TRAINED_LENGTH)
    return length if type(length) is int and 1 <= length <= config.max_position_embeddings else None


def run_facts(config: TrainConfig, data_fingerprint: str, precision: str) -> dict[str, Any]:
    """What `run.json` holds."""
    return {
        "requested": dataclasses.asdict(config),
        "data_fingerprint": data_fingerprint,
        "precision": precision,
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
    }


def refuse_changes(facts: dict[str, Any], config: TrainConfig, data_fingerprint: str) -> None:
    """Raise `UserError` where a resumed run would train another model, or on other data, than the run so far."""
    # Settings that an earlier version did not have are at their defaults.
    requested = from_table(TrainConfig, facts["requested"], "run.json")
    before, now = (json.loads(json.dumps(dataclasses.asdict(asked))) for asked in (requested, config))
    changed = [name for name in _differences(before, now) if name.split(".")[0] not in RESUME_MAY_CHANGE]
    if changed:
        names = ", ".join(changed[:4])
        raise UserError(f"this run was started with other settings ({names}): resume with the same, or start a new run with another --out")
    if facts["data_fingerprint"] != data_fingerprint:
        raise UserError("the data has changed since this run was started: restore it, or start a new run with another --out")


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [name for key in keys for name in _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]
    return [] if a == b else [prefix]


def _commit() -> str | None:
    """Commit of the code that runs, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
