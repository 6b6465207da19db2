"""`shoal train --memory-limit`: the fastest measures that keep a run within an amount of memory, found before it begins.

The planner says which measures should do; a trial, two steps of the very run in a process of its own, says what they need. What it finds
corrects the planner, which then tries again.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from .apart import run_apart
from .config import TrainConfig, UserError, parse_bytes
from .config.recipes import load_recipe, write_toml
from .plan.measures import Measures, candidates, predicted_bytes, predicted_seconds

LIBRARIES = 450 << 20
"""What interpreter, libraries and data take, until a trial says better."""
TRIALS = 4
MARGIN = 0.98
"""Share of the limit that a trial may take: no two runs are alike."""


def fit(config: TrainConfig) -> TrainConfig:
    """`config` with the measures that its memory limit needs. Raises `UserError` with what would fit where none suffice."""
    config.validate()
    assert config.memory_limit is not None
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        raise UserError("--memory-limit is about a CPU: leave it away, or add --device cpu")
    limit = MARGIN * parse_bytes(config.memory_limit)
    choices = sorted(candidates(config), key=lambda choice: predicted_seconds(config, choice))
    bytes_of = {choice: predicted_bytes(config, choice) for choice in choices}
    leanest = min(choices, key=bytes_of.__getitem__)
    beside = float(LIBRARIES)
    good: tuple[Measures, float] | None = None
    tried: set[Measures] = set()
    for _ in range(TRIALS):
        choice = next((choice for choice in choices if bytes_of[choice] + beside <= limit), leanest)
        if choice in tried:
            break
        tried.add(choice)
        measured = trial(choice.apply(config))
        beside = measured - bytes_of[choice]
        if measured <= limit and (good is None or choices.index(choice) < choices.index(good[0])):
            good = choice, measured
        elif measured > limit and choice == leanest:
            break
    if good is None:
        raise UserError(_refusal(config, choices, beside))
    choice, measured = good
    print(f"memory: {choice.describe()}; {measured / 2**20:.0f} MiB of {config.memory_limit}", file=sys.stderr)
    return choice.apply(config)


def trial(config: TrainConfig) -> float:
    """Peak bytes of the process that takes two steps of `config`, evaluates, saves and reports."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = (config.micro_batch_size or config.batch_size) * config.sequence_length
        settings = replace(
            config, minutes=None, tokens=None, steps=2, out=str(Path(folder) / "run"), resume=False, overwrite=False, eval_tokens=tokens,
            checkpoint=replace(config.checkpoint, every_steps=1, every_minutes=0),
        )  # fmt: skip
        path = write_toml(settings, Path(folder) / "settings.toml")
        return float(run_apart("shoal.memory_limit", path, failed="a trial of the run failed"))


def _refusal(config: TrainConfig, choices: list[Measures], beside: float) -> str:
    """What would fit instead."""
    assert config.memory_limit is not None

    def least(settings: TrainConfig) -> float:
        return min(predicted_bytes(settings, choice) for choice in candidates(settings)) + beside

    needed = min(predicted_bytes(config, choice) for choice in choices) + beside
    # The margin twice: the trial of the run that follows this advice may need a little more than this one's.
    ways = [f"--memory-limit {math.ceil(needed / MARGIN**2 / 2**20)}M would do"]
    limit = MARGIN * parse_bytes(config.memory_limit)
    shorter = config.sequence_length // 2
    while shorter >= 32 and least(replace(config, sequence_length=shorter)) > limit:
        shorter //= 2
    if shorter >= 32:
        ways.append(f"or --sequence-length {shorter}")
    if not config.offload and config.model.n_routed_experts and least(replace(config, offload=True)) <= limit:
        ways.append("or --offload")
    if config.optimizer.clip and least(replace(config, optimizer=replace(config.optimizer, clip=0.0))) <= limit:
        ways.append("or --optimizer.clip 0")
    return f"{config.memory_limit} are too little for this run, whatever is given up for it: {', '.join(ways)}"


if __name__ == "__main__":
    from .runtime import peak_memory
    from .showcase import present
    from .train import train

    recipe = load_recipe(sys.argv[1])
    present(train(recipe), replace(recipe, json=True))
    print(peak_memory(torch.device("cpu")))
