"""The runs behind `shoal plan --here --check`, each in a fresh interpreter: train, or decode, and say how fast and with how much memory."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from ..config import EngineOptions, SamplingOptions
from ..config.recipes import load_recipe
from ..runtime import peak_memory, start

WARM_UP = 2
"""Steps that do not count."""
PARTS = 3
"""A run is judged by its best part, as the machine is by the best of so many rounds: a busy moment makes figures worse, never better."""


def undisturbed(speeds: list[float]) -> float:
    """The highest of the medians of a run's parts (all steps, where there are too few to part)."""
    size = max(len(speeds) // PARTS, min(len(speeds), PARTS))
    return max(median(speeds[first : first + size]) for first in range(0, len(speeds) - size + 1, size))


def train(settings: str) -> dict[str, float]:
    """Tokens per second of a training step, and peak bytes of the process, of `shoal train` with a recipe."""
    from ..train import train as run
    from ..train.metrics import read_rows

    result = run(load_recipe(settings))
    rows = read_rows(result.folder / "metrics.jsonl")
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][WARM_UP:]
    return {"tokens_per_second": undisturbed(speeds), "memory_bytes": result.summary["peak_memory"]}


def decode(folder: str, context: str, tokens: str) -> dict[str, float]:
    """Tokens per second of the engine after a prompt of `context` tokens, and peak bytes of the process."""
    from ..engine import Engine
    from ..engine.native import NativeRunner
    from ..engine.requests import Request
    from ..engine.weights import load_weights

    machine = start("cpu")
    weights = load_weights(Path(folder))
    runner = NativeRunner(weights.config, weights.parts, machine.threads)
    runner.settle()
    room = int(context) + int(tokens) + 64
    engine = Engine(runner, None, EngineOptions(max_running=1, cache_tokens=room, speculate="off", prefix_cache=False))
    draw = random.Random(0)
    prompt = [draw.randrange(weights.config.vocab_size) for _ in range(int(context))]
    engine.add_request(Request(prompt, SamplingOptions(max_tokens=int(tokens), temperature=0, ignore_eos=True)))
    speeds = []
    while engine.has_work:
        made, began = engine.stats().generated_tokens, time.perf_counter()
        engine.step()
        if made and engine.stats().generated_tokens == made + 1:
            speeds.append(1 / (time.perf_counter() - began))
    return {"tokens_per_second": undisturbed(speeds[WARM_UP:]), "memory_bytes": peak_memory(machine.device)}


RUNS: dict[str, Callable[..., dict[str, float]]] = {"train": train, "decode": decode}

if __name__ == "__main__":
    print(json.dumps(RUNS[sys.argv[1]](*sys.argv[2:])))
