"""MODEL on the command line, ready to run."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..config import MachineOptions, ModelConfig, UserError
from ..data import Tokenizer
from ..formats.huggingface import load_model, read_config
from ..formats.locate import locate_model
from ..formats.quantized import is_quantized
from ..kernels.selection import BACKEND
from ..model import Transformer
from ..runtime import Machine, available_memory, start
from .native import NativeRunner
from .paging import disk_rate, outlook
from .runner import Runner, TorchRunner
from .weights import load_weights, to_transformer


@dataclass
class Loaded:
    """A model with all it needs to turn text into text."""

    runner: Runner
    tokenizer: Tokenizer
    machine: Machine
    folder: Path

    @cached_property
    def model(self) -> Transformer:
        """The same model in plain torch, fp32: loaded when it is first asked for."""
        return load_transformer(self.folder, self.machine.device)


@dataclass
class Plain:
    """A model in plain torch, to be scored."""

    model: Transformer
    tokenizer: Tokenizer
    machine: Machine
    folder: Path


def load(path: str, options: MachineOptions, bits: int | None = None, *, pin: bool = False) -> Loaded:
    """Load a run, a checkpoint, a Hugging Face folder or a quantized folder into the fastest runner for it and this machine.

    `bits` quantizes on the way, which only the C++ kernels make use of. `pin` is for processes that do nothing else than to run the
    model: see `NativeRunner.pin`. Raises `UserError` where there is no whole model.
    """
    folder = locate_model(path)
    tokenizer = Tokenizer.load(folder)
    in_torch_only = [] if is_quantized(folder) else read_config(folder).in_torch_only
    packed = BACKEND.cpu is not None and not in_torch_only
    on_cpu = options.device == "auto" and packed and torch.cuda.is_available()
    if on_cpu:
        print("the C++ kernels compute on the CPU; --device cuda runs plain torch, one sequence after the other", file=sys.stderr)
    machine = start("cpu" if on_cpu else options.device, options.precision, options.threads)
    if in_torch_only:
        print(f"{' and '.join(in_torch_only)}: this model runs in plain torch, one sequence after the other", file=sys.stderr)
    if machine.device.type == "cpu" and packed:
        weights = load_weights(folder, bits, precision=None if options.precision == "auto" else options.precision)
        _require_vocabulary(tokenizer, weights.config)
        available = available_memory(machine.device)
        if is_quantized(folder) and weights.nbytes > available:
            print(outlook(weights, available, disk_rate(folder)), file=sys.stderr)
        runner = NativeRunner(weights.config, weights.parts, machine.threads)
        threading.Thread(target=runner.settle, name="settle", daemon=True).start()
        if pin:
            runner.pin()
        return Loaded(runner, tokenizer, machine, folder)
    model = load_transformer(folder, machine.device) if bits is None else to_transformer(load_weights(folder, bits))
    return Loaded(TorchRunner(model.to(machine.device), machine), tokenizer, machine, folder)


def _require_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model knows {config.vocab_size:,}: they do not belong together"
        )


def load_plain(path: str, options: MachineOptions) -> Plain:
    """The model in plain torch, fp32; a quantized one with exactly the weights that it stands for."""
    folder = locate_model(path)
    tokenizer = Tokenizer.load(folder)
    machine = start(options.device, options.precision, options.threads)
    model = load_transformer(folder, machine.device)
    _require_vocabulary(tokenizer, model.config)
    return Plain(model, tokenizer, machine, folder)


def load_transformer(folder: Path, device: torch.device | str = "cpu") -> Transformer:
    """The model of a folder in fp32, dequantized where it is quantized."""
    if is_quantized(folder):
        return to_transformer(load_weights(folder), torch.float32, device)
    return load_model(folder, dtype=torch.float32, device=device)
