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
from typing import Literal

import torch

from .apart import run_apart
from .config import TrainConfig, UserError, parse_bytes
from .config.recipes import load_recipe, write_toml
from .plan.measures import Measures, candidates, predicted_bytes, predicted_seconds
from .train.run_folder import find_run
from .train.trainer import begin_with

LIBRARIES = 450 << 20
"""What interpreter, libraries and data take, until a trial says better."""
TRIALS = 4
MARGIN = 0.98
"""Share of the limit that a trial may take: no two runs are alike."""


def fit(config: TrainConfig) -> TrainConfig:
    """`config` with the measures that its memory limit needs. Raises `UserError` with what would fit where none suffice."""
    if config.start:
        config, _ = begin_with(config)
    config.validate()
    assert config.memory_limit is not None
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        raise UserError("--memory-limit is about a CPU: leave it away, or add --device cpu")
    limit = MARGIN * parse_bytes(config.memory_limit)
    prepare(config)
    choices = sorted(candidates(config), key=lambda choice: predicted_seconds(config, choice))
    if config.resume:  # these change what is learnt
        fixed = config.update_early, config.optimizer.moments == "bf16"
        choices = [choice for choice in choices if (choice.update_early, choice.bf16_moments) == fixed]
    bytes_of = {choice: predicted_bytes(config, choice) for choice in choices}
    measured_beside: dict[bool, float] = {}

    def beside(choice: Measures) -> float:
        """What a trial needed beyond the prediction, which depends most on whether memory is returned at once."""
        return measured_beside.get(choice.return_memory, min(measured_beside.values(), default=LIBRARIES))

    good: tuple[Measures, float] | None = None
    tried: set[Measures] = set()
    for left in reversed(range(TRIALS)):
        leanest = min(choices, key=lambda choice: bytes_of[choice] + beside(choice))
        choice = next((choice for choice in choices if bytes_of[choice] + beside(choice) <= limit), leanest)
        if good is None and not left:
            choice = leanest  # what is refused must not have fitted
        if choice in tried:
            break
        tried.add(choice)
        measured = trial(choice.apply(config))
        measured_beside[choice.return_memory] = measured - bytes_of[choice]
        if measured <= limit and (good is None or choices.index(choice) < choices.index(good[0])):
            good = choice, measured
        elif measured > limit and choice == leanest:
            break
    if good is None:
        raise UserError(_refusal(config, choices, beside(leanest)))
    choice, measured = good
    print(f"memory: {choice.describe()}; {measured / 2**20:.0f} MiB of {config.memory_limit}", file=sys.stderr)
    return choice.apply(config)


def go_on(config: TrainConfig) -> TrainConfig:
    """`config` of a run that is resumed, with the measures that were found for it; where its limit is another one they are sought anew,
    but for those that change what is learnt."""
    before = find_run(config.out).settings()
    moments = replace(config.optimizer, moments=before.optimizer.moments)
    config = replace(config, update_early=before.update_early, optimizer=moments)
    if before.memory_limit == config.memory_limit:
        return replace(
            config, micro_batch_size=before.micro_batch_size, recompute=before.recompute, return_memory=before.return_memory
        )  # fmt: skip
    return fit(config)


def prepare(config: TrainConfig) -> None:
    """Tokenize what is to be tokenized, or the first trial, and the run, would count what that takes."""
    _in_a_process(config, "data")


def trial(config: TrainConfig) -> float:
    """Peak bytes of the process that takes two steps of `config`, multi-token prediction among them, evaluates, saves and reports."""
    return float(_in_a_process(config, "run"))


def _in_a_process(config: TrainConfig, what: Literal["data", "run"]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tokens = (config.micro_batch_size or config.batch_size) * config.sequence_length
        settings = replace(
            config, minutes=None, tokens=None, steps=2, out=str(Path(folder) / "run"), resume=False, overwrite=False, eval_tokens=tokens,
            checkpoint=replace(config.checkpoint, every_steps=1, every_minutes=0), mtp=replace(config.mtp, begins=0.0),
        )  # fmt: skip
        path = write_toml(settings, Path(folder) / "settings.toml")
        return run_apart("shoal.memory_limit", path, what, failed="a trial of the run failed")


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
    from .data import open_corpus
    from .runtime import peak_memory
    from .showcase import present
    from .train import train
    from .train.trainer import read_data

    recipe = load_recipe(sys.argv[1])
    if sys.argv[2] == "data":
        requested, started = begin_with(recipe) if recipe.start else (recipe, None)
        read_data(open_corpus(requested.data, requested.corpus), requested, started)
    else:
        present(train(recipe), replace(recipe, json=True))
        print(peak_memory(torch.device("cpu")))
