"""The engine that is served: it works in a process of its own, so that its Python and the web server's do not wait for each other."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

from ..config import EngineOptions, MachineOptions
from ..data import Tokenizer
from ..engine import Engine, EngineProcess, Loaded, Place, load
from ..engine.answer import stop_set
from .grammar import Grammars


def engine_process(folder: Path, machine: MachineOptions, options: EngineOptions, unwanted: threading.Event) -> tuple[Place, Tokenizer]:
    """Load the model in `folder` into a new process, unless it is `unwanted` after all. Raises `UserError` if it cannot be loaded."""
    tokenizer = Tokenizer.load(folder)
    return EngineProcess(partial(_load_engine, folder, machine, options), unwanted), tokenizer


def make_engine(loaded: Loaded, options: EngineOptions) -> Engine:
    """An engine that makes masks of the forms that requests prescribe for their answers."""
    config = loaded.runner.config
    grammars = Grammars(loaded.tokenizer, config.vocab_size, stop_set(loaded.tokenizer, config))
    return Engine(loaded.runner, loaded.tokenizer, options, grammars.mask)


def _load_engine(folder: Path, machine: MachineOptions, options: EngineOptions) -> Engine:
    return make_engine(load(str(folder), machine, pin=True), options)
