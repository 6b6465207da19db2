"""Training compute of a run, and how many steps a budget of FLOPs buys."""

from __future__ import annotations

from dataclasses import replace

from ..config import TrainConfig, UserError
from .cost import Flops, flops_per_token, optimizer_flops


def training_flops_per_token(config: TrainConfig) -> Flops:
    """FLOPs per token of a training step without its optimizer; with `sampled_softmax` the head has a row for every candidate."""
    flops = flops_per_token(config.model, config.sequence_length, training=True)
    sampled = config.sampled_softmax
    if not sampled.drawn:
        return flops
    hinted = 1 if config.model.repeat_window or config.teacher.repetitions else 0
    head = flops.head / config.model.vocab_size * (1 + hinted + sampled.likeliest + sampled.drawn)
    return replace(flops, head=head, mtp=flops.mtp - config.model.num_nextn_predict_layers * (flops.head - head))


def step_flops(config: TrainConfig) -> float:
    """FLOPs of one optimizer step: 3 times the forward pass of all its tokens, and Newton-Schulz; multi-token prediction counts for the
    share of the steps that learn it."""
    flops = training_flops_per_token(config)
    passes = (flops.main + (1 - config.mtp.begins) * flops.mtp) * config.tokens_per_step
    return passes + optimizer_flops(config.model, config.optimizer)


def steps_for(config: TrainConfig, flops: float) -> int:
    """The number of steps whose FLOPs are nearest to `flops`. Raises `UserError` where not even one fits."""
    steps = round(flops / step_flops(config))
    if steps < 1:
        raise UserError(f"{flops:.3g} FLOPs are less than one step of {step_flops(config):.3g}: give more, or a smaller model or batch")
    return steps
