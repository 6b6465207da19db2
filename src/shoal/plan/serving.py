"""Serving on one node: what fits, how many sequences, and roofline speed of prefill and decoding.

A step is as slow as the slower of its arithmetic and its memory traffic: weights that it touches (of the experts only those
that some token of the batch is routed to) and the cache of every sequence. Devices of a node share weights and work evenly;
communication between them is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig, UserError
from .assumptions import Assumptions
from .cost import (
    NUMBER_FORMATS,
    checkpoint_bytes,
    decode_flops_per_token,
    flops_per_token,
    forward_flops,
    kv_bytes_per_token,
    main_matrices,
    mtp_matrices,
    number_format,
    stored_as,
)
from .hardware import GIB, Machine
from .training import usable_memory


@dataclass(frozen=True)
class Serving:
    """One model in one number format on `devices` of a machine, at one context length. Speeds are of the whole node."""

    weights: str
    devices: int
    context: int
    weight_bytes: float
    free_bytes: float
    """For the cache, after weights; negative: does not fit."""
    sequences: int
    """Concurrent sequences of `context` tokens that the cache holds."""
    batch: int
    """Sequences that the speeds below are for."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_with_mtp: float | None
    """With one drafted token per step; None for a model without multi-token prediction."""
    batch_1_tokens_per_second: float

    @property
    def fits(self) -> bool:
        return self.free_bytes > 0 and self.sequences >= 1


def touched_by_format(model: ModelConfig, weights: str, tokens: int, mtp: bool = False) -> dict[str, float]:
    """Weight bytes that a step over `tokens` tokens reads, by their number format.

    Experts count by their chance to be chosen by any of the tokens; of the embedding only some rows are read.
    """
    wanted, total = number_format(weights), dict.fromkeys(NUMBER_FORMATS, 0.0)
    main, modules = ((matrix, False) for matrix in main_matrices(model)), ((matrix, True) for matrix in mtp_matrices(model))
    for matrix, in_module in (*main, *(modules if mtp else ())):
        if matrix.part == "embedding":
            continue
        chosen = stored_as(matrix.part, wanted, in_module)
        copies: float = max(matrix.stored, matrix.active)  # a tied head is read although it is stored as the embedding
        if matrix.part == "routed_experts":
            copies = matrix.stored * (1 - (1 - matrix.active / matrix.stored) ** tokens)
        if matrix.part == "head" and mtp:
            copies *= 2  # once more for the drafted tokens
        total[chosen.name] += copies * chosen.matrix_bytes(matrix.out_features, matrix.in_features)
    return total


def product_rate(machine: Machine, weights: str, a: Assumptions) -> float:
    """Operations per second with such weights: int4 is widened to int8, and any format to fp32 where that is faster.

    Measured machines know what Shoal's own products with packed weights do.
    """
    if machine.sustained and weights in machine.sustained.packed_products:
        return machine.sustained.packed_products[weights]
    return max(a.rate(machine, {"int4": "int8"}.get(weights, weights)), a.rate(machine, "fp32"))


def reading_seconds(model: ModelConfig, machine: Machine, weights: str, tokens: int, a: Assumptions, mtp: bool = False) -> float:
    """Seconds to read the weights of a step; measured machines know how fast packed weights are read and used."""
    rates = machine.sustained.packed_reads if machine.sustained else {}
    touched = touched_by_format(model, weights, tokens, mtp)
    return sum(size / rates.get(name, a.read_bandwidth(machine)) for name, size in touched.items())


def decode_seconds(
    model: ModelConfig,
    machine: Machine,
    weights: str,
    batch: int,
    context: int,
    cache: str,
    a: Assumptions,
    drafts: int = 0,
    devices: int = 1,
) -> float:
    """Seconds of a decoding step of `batch` sequences with `context` tokens of cache, each checking `drafts` drafted tokens."""
    tokens = batch * (1 + drafts)
    flops = tokens * decode_flops_per_token(model, context)
    if drafts:
        flops += batch * drafts * forward_flops(model, context, mtp=True).mtp
    reading = reading_seconds(model, machine, weights, tokens, a, mtp=drafts > 0)
    reading += batch * context * kv_bytes_per_token(model, cache) / a.read_bandwidth(machine)
    return max(flops / product_rate(machine, weights, a), reading) / devices


def prefill_rate(model: ModelConfig, machine: Machine, weights: str, context: int, a: Assumptions, devices: int = 1) -> float:
    """Prompt tokens per second, one whole prompt of `context` tokens at a time."""
    flops = flops_per_token(model, context, training=False)
    attention = flops.attention_scores + flops.attention_values
    arithmetic = (flops.total - attention) / product_rate(machine, weights, a)
    arithmetic += attention / a.attention_rate(machine, "fp32" if weights == "fp32" else "bf16")
    reading = reading_seconds(model, machine, weights, context, a) / context
    return devices / max(arithmetic, reading)


def plan_serving(
    model: ModelConfig,
    machine: Machine,
    weights: str,
    devices: int = 1,
    context: int = 4096,
    cache: str = "bf16",
    batch: int | None = None,
    assumptions: Assumptions | None = None,
) -> Serving:
    """What `devices` serve. `batch` defaults to as many sequences as fit, at most 128.

    Raises `UserError` for impossible requests; a model that does not fit gives `fits == False`.
    """
    if context < 1 or devices < 1 or (batch is not None and batch < 1):
        raise UserError("context, devices and batch must each be at least 1")
    a = assumptions or Assumptions()
    size = checkpoint_bytes(model, number_format(weights))
    free = devices * usable_memory(machine, a) - size
    per_sequence = context * kv_bytes_per_token(model, cache)
    sequences = max(0, int(free // per_sequence))
    served = batch or max(1, min(sequences, 128))
    with_mtp = None
    if model.num_nextn_predict_layers:
        step = decode_seconds(model, machine, weights, served, context, cache, a, drafts=1, devices=devices)
        with_mtp = served * (1 + a.mtp_acceptance) / step
    return Serving(
        weights=weights,
        devices=devices,
        context=context,
        weight_bytes=size,
        free_bytes=free,
        sequences=sequences,
        batch=served,
        prefill_tokens_per_second=prefill_rate(model, machine, weights, context, a, devices),
        decode_tokens_per_second=served / decode_seconds(model, machine, weights, served, context, cache, a, devices=devices),
        decode_with_mtp=with_mtp,
        batch_1_tokens_per_second=1 / decode_seconds(model, machine, weights, 1, context, cache, a, devices=devices),
    )


def why_not(plan: Serving, model: ModelConfig, machine: Machine, cache: str, assumptions: Assumptions) -> str | None:
    """Why a serving plan cannot work, by how much, and the nearest that does; None if it works."""
    if plan.fits:
        return None
    needed = plan.weight_bytes + plan.context * kv_bytes_per_token(model, cache)
    usable = usable_memory(machine, assumptions)
    missing = needed - plan.devices * usable
    text = f"{plan.weights} weights and one sequence of {plan.context} need {needed / GIB:.1f} GiB, {missing / GIB:.1f} GiB too much"
    smaller = [name for name in ("fp8", "int8", "int4") if checkpoint_bytes(model, number_format(name)) < plan.weight_bytes]
    for name in smaller:
        if plan_serving(model, machine, name, plan.devices, plan.context, cache, 1, assumptions).fits:
            return f"{text}. Nearest plan that works: {name} weights on {plan.devices} device(s)"
    return f"{text}. Nearest plan that works: {plan.weights} weights on {-int(-needed // usable)} devices"
