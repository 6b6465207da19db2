"""MODEL on the command line: a run, one of its checkpoints, or a Hugging Face-style folder."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import UserError
from .checkpoints import MARKER, STATE, checkpoint_folder, complete_checkpoints, is_complete
from .weight_files import CONFIG, INDEX, WEIGHTS

BEST = "best.json"
"""In a run folder: `{"step": N}`, the checkpoint with the best held-out loss."""


def locate_model(path: str | Path) -> Path:
    """The folder with `config.json` and weights that `path` means.

    A run folder means its best checkpoint where `best.json` names a complete one, else the latest complete one.
    Raises `UserError` when there is no model, with what is there instead.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise UserError(f"{path} {what}: name a run, a checkpoint or a Hugging Face-style folder{_nearby(path.parent)}")
    if (path / "checkpoints").is_dir():
        return _of_run(path)
    if path.name == "checkpoints":
        return _of_run(path.parent)
    if (path / STATE).exists() and not (path / MARKER).exists():
        raise UserError(f"{path} is a checkpoint that was not written to the end: name another{_nearby(path.parent)}")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} holds no model: it has neither checkpoints/ nor {CONFIG}{_nearby(path)}")
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        raise UserError(f"{path} has a {CONFIG} but no weights: {WEIGHTS} or {INDEX} must lie beside it")
    return path


def _of_run(run: Path) -> Path:
    checkpoints = complete_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run} is a run without a complete checkpoint yet: wait for the first, or resume it")
    try:
        best = checkpoint_folder(run, int(json.loads((run / BEST).read_text(encoding="utf-8"))["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return checkpoints[-1]
    return best if is_complete(best) else checkpoints[-1]


def _nearby(folder: Path) -> str:
    """What the user may have meant: the models directly in `folder`, newest first."""
    if not folder.is_dir():
        return ""
    found = [child for child in folder.iterdir() if child.is_dir() and ((child / "checkpoints").is_dir() or (child / CONFIG).is_file())]
    if not found:
        return ""
    found.sort(key=lambda child: child.stat().st_mtime, reverse=True)
    return f" (in {folder}: {', '.join(child.name for child in found[:3])})"
