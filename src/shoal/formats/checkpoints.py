"""Training checkpoints: RUN/checkpoints/step_0000100/ is a Hugging Face folder plus the trainer's state.

A checkpoint counts only once the marker file `COMPLETE` is in it, which is written after everything else is on disk.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, Protocol

import torch

from ..atomic import TEMPORARY, new_folder, remove_folder, sync
from ..config import UserError
from ..model import Transformer
from .huggingface import save_model

MARKER = "COMPLETE"
STATE = "trainer.pt"
_NAME = re.compile(r"step_(\d{7,})")
_PLAIN = (type(None), bool, int, float, str, bytes, torch.Tensor, torch.dtype, torch.device)


class SavesFiles(Protocol):
    """What a checkpoint needs of a tokenizer."""

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        """Write the files that transformers' `AutoTokenizer` opens."""
        ...


def save_checkpoint(
    run: Path,
    step: int,
    model: Transformer,
    tokenizer: SavesFiles,
    state: dict[str, Any],
    generation: dict[str, Any] | None = None,
    *,
    again: bool = False,
) -> Path:
    """Write the checkpoint of `step`, weights in fp32, and return its folder; unless `again`, a complete one of that step is left as it is.

    `state` may hold tensors, numbers, strings, None, and lists, tuples and dictionaries of them, because loading it must
    not be able to run code; anything else raises `TypeError`. `generation` is what `generation_config.json` says besides the ends of
    texts. Whenever the process dies, what `complete_checkpoints` lists is whole.
    """
    _check_plain(state, "state")
    final = checkpoint_folder(run, step)
    if is_complete(final) and not again:
        return final
    with new_folder(final) as folder:
        # Without the MTP layers' copies of embedding and head: only exports need those.
        save_model(model, folder, dtype=torch.float32, mtp_copies=False, generation=generation)
        tokenizer.save(folder, model.config.max_position_embeddings)
        try:
            torch.save(state, folder / STATE)
        except RuntimeError as error:  # all that torch says of a full disk
            raise OSError(f"{folder / STATE} cannot be written ({error})") from error
    marker = final / MARKER
    marker.write_text(f"{step}\n", encoding="utf-8")
    sync(marker)
    sync(final)
    return final


def load_checkpoint_state(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The trainer's state in a complete checkpoint, tensors on the CPU; `mapped`: where they lie in the file, for those who copy them.

    Raises `UserError` when the checkpoint is not complete or its state cannot be read.
    """
    if not is_complete(path):
        raise UserError(f"{path} is not a complete checkpoint: resume from another")
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{path / STATE} is damaged: resume from another checkpoint") from None


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match.group(1))


def is_complete(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None and (path / MARKER).is_file()


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run that were written to the end, in the order of their steps."""
    return sorted((path for path in (run / "checkpoints").glob("step_*") if is_complete(path)), key=checkpoint_step)


def prune(run: Path, keep_last: int, keep: set[int]) -> None:
    """Delete the complete checkpoints but the last `keep_last` and those of the steps in `keep`."""
    checkpoints = complete_checkpoints(run)
    for path in checkpoints[: max(0, len(checkpoints) - keep_last)]:
        if checkpoint_step(path) not in keep:
            remove_folder(path)


def clean_temporary(run: Path) -> None:
    """Delete what an interrupted process left: call it only while nothing else writes to this run."""
    for path in (run / "checkpoints").glob("step_*"):
        unmarked = _NAME.fullmatch(path.name) is not None and not is_complete(path)
        if path.is_dir() and (unmarked or path.name.endswith(TEMPORARY)):
            remove_folder(path)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds only tensors and plain Python values")
