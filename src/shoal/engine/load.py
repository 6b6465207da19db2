"""MODEL on the command line, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import MachineOptions
from ..data import Tokenizer
from ..formats.huggingface import load_model
from ..formats.locate import locate_model
from ..formats.quantized import is_quantized
from ..model import Transformer
from ..runtime import Machine, start
from .weights import load_weights, to_transformer


@dataclass
class Loaded:
    """A model with all it needs to turn text into text."""

    model: Transformer
    tokenizer: Tokenizer
    machine: Machine
    folder: Path


def load(path: str, options: MachineOptions) -> Loaded:
    """Load a run, a checkpoint, a Hugging Face folder or a quantized folder in fp32; raises `UserError` where it is none."""
    folder = locate_model(path)
    tokenizer = Tokenizer.load(folder)
    machine = start(options.device, options.precision, options.threads)
    return Loaded(load_transformer(folder, machine.device), tokenizer, machine, folder)


def load_transformer(folder: Path, device: torch.device | str = "cpu") -> Transformer:
    """The model in fp32, dequantized where it is quantized."""
    if is_quantized(folder):
        return to_transformer(load_weights(folder), torch.float32, device)
    return load_model(folder, dtype=torch.float32, device=device)
