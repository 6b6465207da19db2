"""One run of `shoal bench memory`: some training steps, then one line of JSON with the process's peak memory and the time of a step."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import OptimizerConfig
from ..model import Transformer, init_weights
from ..parallel import Shards
from ..runtime import peak_memory, start
from ..train.balance import StepRouting, update_biases
from ..train.early_updates import EarlyUpdates
from ..train.loss import compute_losses
from ..train.optimizer import Optimizers, clip_gradients
from ..train.recompute import recompute
from .train import SHAPE, Transformers


def shoal(options: dict[str, Any], folder: Path) -> Callable[[Tensor], object]:
    """The step of `shoal train` with the measures of `options`."""
    machine = start("cpu", "fp32", options["threads"], options["return_memory"])
    model = Transformer(SHAPE)
    init_weights(model, 0)
    recompute(model, options["recompute"])
    shards = Shards.whole(model)
    early, config = options["update_early"], OptimizerConfig(moments="bf16" if options["bf16_moments"] else "fp32")
    optimizers = Optimizers(model, config, shards, folder if options["offload"] else None, one_by_one=early)
    optimizers.set_rates(0.1)
    updates = EarlyUpdates(optimizers) if early else None

    def step(rows: Tensor) -> None:
        routing = StepRouting()
        parts = rows.split(options["micro_batch"])
        for part in parts:
            with machine.autocast():
                losses = compute_losses(model, part, 0.0, 1e-4)
            (losses.total / len(parts)).backward()
            routing.add(losses.routing)
            del losses
        if updates:
            updates.norm()
        else:
            clip_gradients(shards, config.clip)
            optimizers.step()
            optimizers.zero_grad()
        update_biases(model, routing, 0.001)

    return step


def transformers(options: dict[str, Any]) -> Callable[[Tensor], object]:
    """The peer's step, as `shoal bench train` has it, with the measures of `options`."""
    torch.set_num_threads(options["threads"] or torch.get_num_threads())
    return Transformers(options["precision"], options["experts"], options["micro_batch"], options["checkpointing"]).step


def main(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(SHAPE.vocab_size, (options["batch"], options["length"] + 1), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        step = shoal(options, Path(folder)) if options["side"] == "shoal" else transformers(options)
        seconds = []
        for _ in range(options["steps"] + 1):
            began = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"peak": peak_memory(torch.device("cpu")), "seconds": statistics.median(seconds[1:])}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
