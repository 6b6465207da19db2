"""MODEL on the command line, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import MachineOptions
from ..data import Tokenizer
from ..formats.huggingface import load_model
from ..formats.locate import locate_model
from ..model import Transformer
from ..runtime import Machine, start
from .runner import Runner, TorchRunner


@dataclass
class Loaded:
    """A model with all it needs to turn text into text."""

    model: Transformer
    runner: Runner
    tokenizer: Tokenizer
    machine: Machine
    folder: Path


def load(path: str, options: MachineOptions) -> Loaded:
    """Load a run, a checkpoint or a Hugging Face folder in fp32; raises `UserError` where it is none."""
    folder = locate_model(path)
    tokenizer = Tokenizer.load(folder)
    machine = start(options.device, options.precision, options.threads)
    model = load_model(folder, dtype=torch.float32, device=machine.device)
    return Loaded(model, make_runner(model, machine), tokenizer, machine, folder)


def make_runner(model: Transformer, machine: Machine) -> Runner:
    """The fastest runner for this model and machine."""
    return TorchRunner(model, machine)
