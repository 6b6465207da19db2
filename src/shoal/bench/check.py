"""What `shoal plan --here --check` measures: the trainer and the engine at work, each run in a process of its own.

A process of its own, so that the operating system's figure for its peak memory is that of the run alone. What the interpreter, its
libraries and the data take is measured by a run of a model of next to nothing, and taken off.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Literal

from ..config import ModelConfig, TrainConfig, UserError
from ..config.recipes import load_recipe, to_toml
from ..data import open_corpus, prepare
from ..plan.assumptions import Assumptions
from ..plan.check import Case, Prediction, predict_training
from ..plan.cost import count_parameters
from ..plan.hardware import Machine

SECONDS = 12.0
"""About how long a training run is watched."""
WARM_UP = 2
"""Steps that do not count."""
SCALES = (1, 4)
"""Times the parameters of the demo recipe."""


def cases(model: ModelConfig | None, machine: Machine, assumptions: Assumptions) -> Iterator[Case]:
    """The demo recipe, a model of four times its parameters, and `model` where one is named."""
    demo = load_recipe("demo")
    training = Training(demo, machine, assumptions)
    for scale in SCALES:
        shape = demo.model if scale == 1 else scaled(demo.model, scale)
        yield training.case("demo" if scale == 1 else f"demo x {scale}", shape)
    if model is not None:
        yield training.case("the model", replace(model, vocab_size=demo.model.vocab_size))


def scaled(model: ModelConfig, factor: float) -> ModelConfig:
    """The shape with `factor` times the parameters of `model`, as nearly as can be: wider in whole heads, and up to twice as deep."""
    heads, layers = model.num_attention_heads, model.num_hidden_layers

    def wider(count: int, deep: int) -> ModelConfig:
        def grow(value: int) -> int:
            return value * count // heads

        return replace(
            model,
            hidden_size=grow(model.hidden_size),
            intermediate_size=grow(model.intermediate_size),
            num_attention_heads=count,
            kv_lora_rank=grow(model.kv_lora_rank),
            moe_intermediate_size=grow(model.moe_intermediate_size),
            num_hidden_layers=deep,
        )

    wanted = factor * count_parameters(model).trained
    limit = heads * max(1, math.ceil(math.sqrt(factor)))
    shapes = [wider(count, deep) for count in range(heads, limit + 1) for deep in range(layers, 2 * layers + 1)]
    return min(shapes, key=lambda shape: abs(math.log(count_parameters(shape).trained / wanted)))


@dataclass
class Training:
    """Runs of the trainer on the data of a recipe."""

    recipe: TrainConfig
    machine: Machine
    assumptions: Assumptions

    def case(self, name: str, shape: ModelConfig) -> Case:
        """What is predicted for `shape`, and the run that measures it."""
        batch, length, precision = self.recipe.batch_size, self.recipe.sequence_length, self.precision
        predicted = predict_training(shape, self.machine, batch, length, self.recipe.micro_batch_size, precision, self.assumptions)
        parameters = count_parameters(shape).trained
        title = f"train {name} ({parameters / 1e6:.1f}M, {precision})"
        return Case(title, predicted, lambda: self.measure(shape, predicted))

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        assert self.machine.sustained is not None
        return self.machine.sustained.precision

    def measure(self, shape: ModelConfig, predicted: Prediction) -> Prediction:
        """Train `shape` for some steps: median speed of a step, and peak memory beyond that of next to nothing."""
        step = self.recipe.tokens_per_step / predicted.tokens_per_second
        steps = WARM_UP + min(max(5, math.ceil(SECONDS / step)), 40)
        speed, memory = self.run(replace(self.recipe, model=shape), steps)
        return Prediction(speed, memory - self.baseline)

    @cached_property
    def baseline(self) -> float:
        """Peak bytes of a run whose model and batch weigh nothing, on the same data."""
        prepare(open_corpus(self.recipe.data, self.recipe.corpus), None, self.recipe.model.vocab_size, self.recipe.corpus)
        nothing = ModelConfig(
            vocab_size=self.recipe.model.vocab_size, hidden_size=16, num_hidden_layers=2, intermediate_size=16, num_attention_heads=1,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, num_nextn_predict_layers=1, max_position_embeddings=self.recipe.model.max_position_embeddings,
        )  # fmt: skip
        return self.run(replace(self.recipe, model=nothing, batch_size=1, micro_batch_size=None, sequence_length=16), WARM_UP + 1)[1]

    def run(self, recipe: TrainConfig, steps: int) -> tuple[float, float]:
        """(median tokens per second, peak bytes) of `shoal train` for so many steps, without evaluations on the way."""
        with tempfile.TemporaryDirectory() as folder:
            settings = replace(
                recipe, minutes=None, tokens=None, steps=steps, out=str(Path(folder) / "run"), precision=self.precision, eval_tokens=1,
                eval_every_minutes=0, prompts=(), checkpoint=replace(recipe.checkpoint, every_steps=0, every_minutes=0),
            )  # fmt: skip
            path = Path(folder) / "settings.toml"
            path.write_text(to_toml(settings), encoding="utf-8")
            figures = in_a_process("train", str(path))
        return figures["tokens_per_second"], figures["peak_memory"]


def in_a_process(*args: str) -> dict[str, float]:
    """Run `main` with `args` in a fresh interpreter; the figures that it prints."""
    done = subprocess.run([sys.executable, "-m", __name__, *args], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"the measurement did not run to its end: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: list[str]) -> dict[str, float]:
    """One measurement, in this process."""
    from ..train import train

    result = train(load_recipe(args[1]))
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][WARM_UP:]
    return {"tokens_per_second": median(speeds), "peak_memory": result.summary["peak_memory"]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
