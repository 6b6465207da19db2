"""Where a plan's model comes from: a built-in name, a `config.json`, or a folder (checkpoint or run) that holds one."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import ModelConfig, UserError
from ..config.huggingface import model_config_from_dict
from ..config.recipes import load_recipe
from .models import BUILT_IN


def load_model(name: str) -> ModelConfig:
    """The shape of the model called `name`. Raises `UserError` with what can be named instead."""
    if name.lower() in BUILT_IN:
        return BUILT_IN[name.lower()]
    path = Path(name)
    if path.is_dir():
        found = _config_in(path)
        if found is None:
            raise UserError(f"{name} holds no config.json and no config.toml: give a checkpoint folder or the folder of a run")
        path = found
    if not path.is_file():
        raise UserError(f"there is no model {name!r}: give a config.json, a folder with one, or one of {', '.join(BUILT_IN)}")
    if path.suffix == ".toml":
        config = load_recipe(str(path)).model
        config.validate()
        return config
    try:
        dictionary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): give a Hugging Face config.json") from None
    if not isinstance(dictionary, dict):
        raise UserError(f"{path} does not hold a JSON object: give a Hugging Face config.json")
    return model_config_from_dict(dictionary)


def _config_in(folder: Path) -> Path | None:
    """`config.json` of a checkpoint or export; of a run, that of its last checkpoint, which knows what was counted, or its settings."""
    checkpoints = sorted(folder.glob("checkpoints/step_*/config.json"), reverse=True)
    places = [folder / "config.json", *checkpoints, folder / "config.toml"]
    return next((place for place in places if place.is_file()), None)
