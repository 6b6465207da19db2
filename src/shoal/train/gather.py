"""The whole model and optimizers' state from what every process holds, and back: what a checkpoint has in it fits any layout."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ModelConfig, OptimizerConfig
from ..formats.parts import EMBEDDING, HEAD_WEIGHT
from ..model import Transformer
from ..parallel import Shards
from .optimizer import Optimizers


def gather_model(model: Transformer, shards: Shards) -> Transformer:
    """The whole model in the first process's main memory, elsewhere one without numbers; the model itself for a process by itself."""
    if shards.team.is_alone:
        return model
    tensors = shards.gather({piece.name: piece.local for piece in shards.pieces} | dict(model.named_buffers()))
    with torch.device("meta"):
        whole = Transformer(model.config)
    if shards.team.is_first:
        if model.config.tie_word_embeddings:
            tensors[HEAD_WEIGHT] = tensors[EMBEDDING]
        whole.load_state_dict(tensors, assign=True)
    return whole


def gather_optimizers(optimizers: Optimizers, config: ModelConfig, settings: OptimizerConfig, shards: Shards) -> list[dict]:
    """In the first process: the `state_dict` of the same optimizers of a process by itself."""
    if shards.team.is_alone:
        return optimizers.state_dict()
    whole = _without_numbers(config, settings)
    states = whole.state_dict()
    for held, held_names, state, names in zip(optimizers.all, optimizers.parameter_names(), states, whole.parameter_names(), strict=True):
        mine = {held_names[i]: values for i, values in held.state_dict()["state"].items()}
        for key in shards.team.union(key for values in mine.values() for key in values):
            for name, tensor in shards.gather({name: values[key] for name, values in mine.items()}).items():
                state["state"].setdefault(names.index(name), {})[key] = tensor
    return states


def scatter_optimizers(states: list[dict], optimizers: Optimizers, config: ModelConfig, settings: OptimizerConfig, shards: Shards) -> None:
    """The inverse of `gather_optimizers`, from `states` that every process has read."""
    if shards.team.is_alone:
        optimizers.load_state_dict(states)
        return
    whole_names = _without_numbers(config, settings).parameter_names()
    for held, held_names, saved, names in zip(optimizers.all, optimizers.parameter_names(), states, whole_names, strict=True):
        state = held.state_dict()
        found = {i: saved["state"].get(names.index(name), {}) for i, name in enumerate(held_names)}
        state["state"] = {i: {key: shards.take(held_names[i], t) for key, t in values.items()} for i, values in found.items() if values}
        held.load_state_dict(state)


def _without_numbers(config: ModelConfig, settings: OptimizerConfig) -> Optimizers:
    """The optimizers of the whole model, whose parameters take no memory."""
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(()).expand(parameter.shape)))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return Optimizers(model, settings)
