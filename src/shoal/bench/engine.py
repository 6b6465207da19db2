"""`shoal bench engine`: prefill, decoding, batches and long contexts, Shoal and its peers in turns."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..config import BenchEngineCommand, CorpusConfig, UserError
from ..data import open_corpus
from ..plan.cost import flops_per_token
from ..runtime import available_cores
from .contestants import Contest, prepare
from .engine_report import print_report
from .machine import Memory, product_peaks, read_bandwidth
from .sides import Side

PROMPT = 512
LONG = 16384
SEQUENCES = 8
WARM = 3
"""Tokens that every turn adds before it is timed."""
OUT_OF_CACHE = 2**28
"""Bytes per token from which on decoding reads memory, and not the processor's caches."""
ANSWER, PROMPTS, BEGINNING = 256, 12, 128
"""Of `mtp`: tokens of an answer, number of prompts, tokens of a prompt."""


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    name: str
    """The key of its figures in the JSON object."""
    label: str
    context: int
    sequences: int = 1
    steps: int = 1
    """Tokens that a turn adds to each sequence; 0: the prompt is read instead."""


@dataclass
class Figures:
    """What was measured: rates are tokens per second, one of every turn, by measurement and side."""

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    """Of each side after decoding at a context of 512."""
    bandwidth: list[float] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    """Of the bandwidth measured right before and after, that Shoal's decoding read; one of every turn, by measurement."""
    peaks: dict[str, float] = field(default_factory=dict)

    def rate(self, measurement: str, side: str) -> float:
        return statistics.median(self.rates[measurement][side])


def measurements(command: BenchEngineCommand, context: int) -> list[Measurement]:
    """What is measured of a model that sees `context` tokens, in the order of a turn."""
    steps = command.decode_steps
    few = max(steps // 2, 2)
    every = {
        "decode": [
            Measurement("decode_32", "decode, context 32", 32, steps=steps),
            Measurement("decode", f"decode, context {PROMPT}", PROMPT, steps=steps),
        ],
        "prefill": [Measurement("prefill", f"prefill of {PROMPT}", PROMPT, steps=0)],
        "batch": [Measurement("batch", f"{SEQUENCES} sequences, context {PROMPT}", PROMPT, SEQUENCES, few)],
        "long": [Measurement("long_context", f"decode, context {LONG}", LONG, steps=few)],
    }
    chosen = [m for case, some in every.items() if case in command.cases for m in some]
    return [m for m in chosen if m.context + m.steps <= context]


def run_bench(command: BenchEngineCommand) -> dict[str, Any]:
    """Run all sides in turns, print the table, return the JSON object."""
    command.validate()
    torch.set_num_threads(command.threads or available_cores())
    contest = prepare(command, print)
    prompts = _prompts(command, contest)
    wanted = measurements(command, contest.config.max_position_embeddings)
    if not wanted and not prompts:
        raise UserError(f"{contest.name} sees {contest.config.max_position_embeddings} tokens: too few for any of --cases")
    figures = Figures(peaks=product_peaks())
    sides = contest.sides(command)
    try:
        draw = random.Random(0)
        for _ in range(command.rounds):
            _turn(sides, wanted, contest.config.vocab_size, draw, figures)
        speculation = _speculation(sides[0], prompts, contest.config.max_position_embeddings, command.rounds) if prompts else {}
    finally:
        for side in sides:
            side.close()
    result = summarize(command, contest, sides, wanted, figures) | speculation
    print_report(contest, sides, wanted, figures, result)
    return result


def _turn(sides: list[Side], wanted: list[Measurement], vocabulary: int, draw: random.Random, figures: Figures) -> None:
    """Every measurement once on every side; a shared machine changes its speed over minutes: in turns, all see the same."""
    prefix = [draw.randrange(vocabulary) for _ in range(PROMPT)]
    figures.bandwidth.append(read_bandwidth())
    for measurement in wanted:
        ids = [[draw.randrange(vocabulary) for _ in range(measurement.sequences)] for _ in range(measurement.steps)]
        for side in sides:
            if measurement.steps:
                reply = side.ask("decode", prefix=prefix, context=measurement.context, ids=ids, warm=WARM)
                tokens = measurement.sequences
            else:
                reply, tokens = side.ask("prefill", ids=prefix), PROMPT
            rates = figures.rates.setdefault(measurement.name, {}).setdefault(side.name, [])
            rates.append(tokens / statistics.median(reply["seconds"]))
            if measurement.name == "decode" and side.name not in figures.memory:
                figures.memory[side.name] = side.memory()
        if measurement.steps and measurement.sequences == 1 and (size := bytes_read(sides[0], measurement)) > OUT_OF_CACHE:
            # What the machine can read changes within seconds where others share its memory: step by step, both see the same.
            reply = sides[0].ask("decode_and_read", prefix=prefix, context=measurement.context, ids=ids, warm=WARM)
            figures.bandwidth.append(statistics.median(reply["bandwidth"]))
            around = map(statistics.mean, pairwise(reply["bandwidth"]))
            shares = [size / seconds / bandwidth for seconds, bandwidth in zip(reply["seconds"], around, strict=True)]
            figures.shares.setdefault(measurement.name, []).append(statistics.median(shares))


def bytes_read(shoal: Side, measurement: Measurement) -> float:
    """Bytes of weights and cache that adding one token to one sequence reads."""
    loaded = shoal.loaded
    return float(loaded["weight_bytes_per_token"] + measurement.context * loaded["cache_bytes_per_position"])


def _prompts(command: BenchEngineCommand, contest: Contest) -> list[list[int]]:
    """Beginnings of the texts of --data, where the model can guess ahead."""
    if "mtp" not in command.cases or not command.data or not contest.config.num_nextn_predict_layers or contest.tokenizer is None:
        return []
    length = min(BEGINNING, contest.config.max_position_embeddings // 2)
    found = []
    for text in open_corpus(command.data, CorpusConfig()).texts_to_score():
        ids = contest.tokenizer.encode(text, bos=True)[:length]
        if len(ids) == length:
            found.append(ids)
        if len(found) == PROMPTS:
            break
    if not found:
        raise UserError(f"--data holds no text of {length} tokens")
    return found


def _speculation(shoal: Side, prompts: list[list[int]], context: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of greedy answers with and without guesses, and how many guesses were right: in all, and of every answer."""
    tokens = min(ANSWER, context - len(prompts[0]))
    modes = ("off", "on", "auto")
    replies: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode in modes:
            replies[mode].append(shoal.ask("answer", prompts=prompts, tokens=tokens, speculate=mode))

    def rates(mode: str) -> list[float]:
        """Of every answer, by its median."""
        return [(tokens - 1) / statistics.median(turn) for turn in zip(*(reply["seconds"] for reply in replies[mode]), strict=True)]

    off, on, auto = map(rates, modes)
    accepted, drafted = replies["on"][0]["accepted"], replies["on"][0]["drafted"]
    share = [right / checked if checked else None for right, checked in zip(accepted, drafted, strict=True)]
    each = [
        {"acceptance": right, "speedup": fast / plain, "auto_speedup": automatic / plain}
        for right, plain, fast, automatic in zip(share, off, on, auto, strict=True)
    ]
    # Of all answers together: the mean of their times a token.
    plain, fast, automatic = (statistics.harmonic_mean(some) for some in (off, on, auto))
    return {
        "mtp_tokens_per_second": fast,
        "mtp_off_tokens_per_second": plain,
        "mtp_auto_tokens_per_second": automatic,
        "mtp_speedup": fast / plain,
        "mtp_auto_speedup": automatic / plain,
        "mtp_acceptance": sum(accepted) / sum(drafted) if sum(drafted) else None,
        "mtp_answers": sorted(each, key=lambda answer: answer["acceptance"] or 0.0),
        "mtp_same_text": all(reply["answers"] == replies["off"][0]["answers"] for mode in modes for reply in replies[mode]),
    }


def summarize(
    command: BenchEngineCommand, contest: Contest, sides: list[Side], wanted: list[Measurement], figures: Figures
) -> dict[str, Any]:
    """The JSON object: rates of every side, ratios of Shoal's to each peer's, shares of what the machine can do."""
    shoal = sides[0]
    result: dict[str, Any] = {
        "model": contest.name,
        "bits": 4 if command.uses_large_shape else command.bits,
        "settings": {side.name: side.settings for side in sides},
        "load_seconds": {side.name: side.loaded["load_seconds"] for side in sides},
        "bandwidth": statistics.median(figures.bandwidth),
        "bandwidth_lowest": min(figures.bandwidth),
        "bandwidth_highest": max(figures.bandwidth),
        "peak_fp32": figures.peaks["fp32"],
        "peak_int8": figures.peaks["int8"],
        "cache_values_per_token_and_layer": contest.config.cache_values_per_token,
    }
    for side in sides:
        prefix = "" if side.name == "shoal" else f"{key(side.name)}_"
        result |= {f"{prefix}{m.name}_tokens_per_second": figures.rate(m.name, side.name) for m in wanted}
        if side.name in figures.memory:
            result[f"{prefix}memory_bytes"] = figures.memory[side.name].resident
    for side in sides[1:]:
        prefix = "" if side.name == "llama.cpp" or len(sides) == 2 else f"{key(side.name)}_"
        result |= {f"{prefix}{m.name}_ratio": figures.rate(m.name, shoal.name) / figures.rate(m.name, side.name) for m in wanted}
        if side.name in figures.memory and figures.memory[side.name].resident:
            result[f"{prefix}memory_ratio"] = figures.memory[shoal.name].resident / figures.memory[side.name].resident
    for m in wanted:
        if m.name in figures.shares:
            suffix = "" if m.name == "decode" else f"_{m.name}"
            result[f"bandwidth_share{suffix}"] = statistics.median(figures.shares[m.name])
            result[f"{m.name}_bytes_per_token"] = bytes_read(shoal, m)
    if "prefill" in figures.rates:
        flops = flops_per_token(contest.config, PROMPT, training=False).total * figures.rate("prefill", shoal.name)
        result["prefill_fp32_peak_share"] = flops / figures.peaks["fp32"]
        if figures.peaks["int8"]:
            result["prefill_int8_peak_share"] = flops / figures.peaks["int8"]
    return result


def key(side: str) -> str:
    """The name of a side in JSON keys."""
    return side.replace(".cpp", "")
