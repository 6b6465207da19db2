"""What all post-training shares: the model and its tokenizer, the optimizer, the run folder."""

from __future__ import annotations

import copy
import dataclasses
import time

import torch
from torch import nn

from ..config import DPOCommand, GRPOCommand, MachineOptions, RunFolderOptions, SFTCommand, TuneOptions, UserError
from ..data import Tokenizer
from ..data.chat_template import read_template
from ..engine import Plain, load_plain
from ..formats.checkpoints import prune, save_checkpoint
from ..formats.export import chat_template
from ..formats.locate import locate_model
from ..formats.weight_files import read_generation
from ..model import Transformer
from ..runtime import Machine
from ..train.run_folder import TRAINED_LENGTH, RunFolder, new_run, trained_length
from ..train.uncompiled import AdamW
from .adapters import adapt, is_adapted, merge


def load_trainable(path: str, machine: MachineOptions, options: TuneOptions) -> Plain:
    """The model in fp32, ready to be trained, with adapters where they are asked for."""
    loaded = load_plain(path, machine)
    if length := trained_length(loaded.folder, loaded.model.config):
        loaded.model.config.extra[TRAINED_LENGTH] = length  # what the model becomes is judged as it was
    if options.lora_rank > loaded.model.config.hidden_size:
        raise UserError(
            f"--lora-rank {options.lora_rank} is more than the width of the model, {loaded.model.config.hidden_size}: take a smaller one"
        )
    if options.lora_rank:
        adapt(loaded.model, options.lora_rank, options.lora_alpha or 2 * options.lora_rank, options.seed)
    return loaded


def with_chat_template(tokenizer: Tokenizer, name: str | None) -> Tokenizer:
    """The tokenizer with a built-in template, with one from a file, or with its own; a base model gets the plain one."""
    if name is None and tokenizer.chat_template:
        return tokenizer
    return Tokenizer(tokenizer.json, tokenizer.config, chat_template() if name is None else read_template(name))


class Tuner:
    """AdamW over what is trainable, with a learning rate that rises and falls."""

    def __init__(self, model: nn.Module, options: TuneOptions, steps: int) -> None:
        self._options, self._steps = options, steps
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # Gradients of zero must change nothing, as ESFT asks of experts that are left alone: decay would.
        self._adam = AdamW([group for group in groups if group["params"]], lr=options.lr, betas=(0.9, 0.95), fused=True)

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ...: the first one after the warm-up has the peak, also where it is the only one."""
        options = self._options
        if step / self._steps < options.warmup:
            return options.lr * step / self._steps / options.warmup
        left = min((self._steps - step + 1) / self._steps / max(1 - options.warmup, 1e-9), 1.0)
        return options.lr * (options.final + (1 - options.final) * left)

    def step(self, step: int) -> float:
        """One update, gradients cleared; the norm that they had. Nothing changes where they are not finite."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:  # every reply was left out
            return 0.0
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if torch.isfinite(norm):
            if self._options.clip:
                torch._foreach_mul_(grads, (self._options.clip / (norm + 1e-6)).clamp(max=1.0))
            for group in self._adam.param_groups:
                group["lr"] = self.rate(step)
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return float(norm)


def require_chat_template(model: str, tokenizer: Tokenizer) -> None:
    """Raise `UserError` for a base model, which knows no conversations."""
    if tokenizer.chat_template is None:
        raise UserError(f"{model} is a base model without a chat template: fine-tune it with shoal sft first")


def open_run(command: DPOCommand | GRPOCommand | SFTCommand, name: str, machine: Machine) -> RunFolder:
    """The folder of a new run that begins with `command.model`, with what was asked for; see `train.run_folder.new_run`."""
    source = locate_model(command.model)
    folder = new_run(command.folder, name, source)
    folder.generation = read_generation(source)
    folder.write_json("run.json", {"requested": dataclasses.asdict(command), "precision": machine.precision})
    return folder


class Checkpoints:
    """Saves from time to time, so that a run of hours that is killed leaves something to begin from."""

    def __init__(self, folder: RunFolder, options: RunFolderOptions, model: Transformer, tokenizer: Tokenizer) -> None:
        self._folder, self._options, self._model, self._tokenizer = folder, options, model, tokenizer
        self._last = time.perf_counter()

    def step(self, step: int) -> None:
        """Save after this step if it is time, and let go of those no longer kept."""
        minutes = self._options.save_minutes
        if not minutes or time.perf_counter() - self._last < 60 * minutes:
            return
        save(self._folder, step, self._model, self._tokenizer)
        prune(self._folder.path, self._options.keep_last, set())
        self._last = time.perf_counter()


def save(folder: RunFolder, step: int, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the model as a checkpoint of the run, adapters merged into a copy of it where there are any."""
    if is_adapted(model):
        model = copy.deepcopy(model)
        merge(model)
    save_checkpoint(folder.path, step, model, tokenizer, {"step": step}, folder.generation)


def finish(model: Transformer, options: TuneOptions) -> None:
    """Merge adapters, where there are any."""
    if options.lora_rank:
        merge(model)
