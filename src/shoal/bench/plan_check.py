"""What `shoal plan --here --check` measures: the trainer and the engine at work, each run in a process of its own.

A process of its own, so that the operating system's figure for its peak memory is that of the run alone. What the interpreter, its
libraries and the data take is measured by the same run of a model of next to nothing, and taken off.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..apart import run_apart
from ..config import ModelConfig, TrainConfig
from ..config.recipes import load_recipe, write_toml
from ..data import open_corpus, prepare
from ..engine.weights import quantized_scheme
from ..formats.parts import Part, parts_of
from ..formats.quantized import write_quantized
from ..kernels.packed import PackedMatrix
from ..kernels.selection import BACKEND
from ..plan.assumptions import Assumptions
from ..plan.check import Case, Prediction, predict_decode, predict_training
from ..plan.cost import count_parameters
from ..plan.hardware import GIB, Machine
from ..plan.models import BUILT_IN
from ..plan.scaling import scaled
from ..plan.training import usable_memory
from .plan_check_runs import WARM_UP

SECONDS = 18.0
"""About how long a training run is watched."""
SCALES = (1, 4)
"""Times the parameters of the demo recipe."""
LAYERS = 5
"""Of DeepSeek-V2-Lite, whose layers are decoded where no model is named: far more bytes a token than any cache holds."""
CONTEXT, DECODED = 256, 128
"""Tokens of the prompt, and tokens decoded after it."""

NOTHING = ModelConfig(
    vocab_size=512, hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=1, kv_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=32, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
)  # fmt: skip
"""A model of next to nothing."""


def cases(model: ModelConfig | None, machine: Machine, assumptions: Assumptions) -> Iterator[Case]:
    """Training of the demo recipe and of four times its parameters; decoding of layers of DeepSeek-V2-Lite in int4, or of `model`."""
    demo = load_recipe("demo")
    training = Training(demo, machine, assumptions)
    for scale in SCALES:
        yield training.case("demo" if scale == 1 else f"demo x {scale}", scaled(demo.model, scale))
    if model is None:
        yield decoding(f"{LAYERS} layers of V2-Lite", replace(BUILT_IN["deepseek-v2-lite"], num_hidden_layers=LAYERS), machine, assumptions)
    else:
        yield training.case("the model", replace(model, vocab_size=demo.model.vocab_size))
        yield decoding("the model", model, machine, assumptions)


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
        title = f"train {name} ({count_parameters(shape).trained / 1e6:.1f}M, {precision})"
        missing = too_large(predicted, self.machine, self.assumptions)
        step = self.recipe.tokens_per_step / predicted.tokens_per_second
        if not missing and 9 * step > 20 * SECONDS:
            missing = f"a step would take {step:.0f} s"
        return Case(title, predicted, None if missing else lambda: self.measure(shape, step), missing)

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        assert self.machine.sustained is not None
        return self.machine.sustained.precision

    def measure(self, shape: ModelConfig, step: float) -> Prediction:
        """Train `shape`, whose steps should take `step` seconds: speed, and peak memory beyond that of next to nothing."""
        steps = WARM_UP + min(max(9, math.ceil(SECONDS / step)), 60)
        seen = self.run(replace(self.recipe, model=shape), steps)
        return replace(seen, memory_bytes=seen.memory_bytes - self.baseline)

    @cached_property
    def baseline(self) -> float:
        """Peak bytes of a run whose model and batch weigh nothing, on the same data."""
        prepare(open_corpus(self.recipe.data, self.recipe.corpus), None, self.recipe.model.vocab_size, self.recipe.corpus)
        nothing = replace(NOTHING, vocab_size=self.recipe.model.vocab_size, num_nextn_predict_layers=1)
        tiny = replace(self.recipe, model=nothing, batch_size=1, micro_batch_size=None, sequence_length=16)
        return self.run(tiny, WARM_UP + 1).memory_bytes

    def run(self, recipe: TrainConfig, steps: int) -> Prediction:
        """`shoal train` for so many steps, without evaluations on the way: speed of a step, peak bytes of the process."""
        with tempfile.TemporaryDirectory() as folder:
            settings = replace(
                recipe, minutes=None, tokens=None, steps=steps, out=str(Path(folder) / "run"), precision=self.precision, eval_tokens=1,
                eval_every_minutes=0, prompts=(), checkpoint=replace(recipe.checkpoint, every_steps=0, every_minutes=0),
            )  # fmt: skip
            return in_a_process("train", write_toml(settings, Path(folder) / "settings.toml"))


def decoding(name: str, shape: ModelConfig, machine: Machine, assumptions: Assumptions) -> Case:
    """One sequence decoded by a model of this shape in int4, with random weights."""
    predicted = predict_decode(shape, machine, "int4", CONTEXT + DECODED // 2, assumptions=assumptions)
    missing = too_large(predicted, machine, assumptions)
    if BACKEND.cpu is None:
        missing = f"the engine decodes 4 bits with C++ kernels only ({BACKEND.reason})"

    def run(shape: ModelConfig) -> Prediction:
        with tempfile.TemporaryDirectory() as folder:
            write_random(shape, Path(folder) / "model")
            return in_a_process("decode", str(Path(folder) / "model"), str(CONTEXT), str(DECODED))

    def measure() -> Prediction:
        seen = run(shape)
        return replace(seen, memory_bytes=seen.memory_bytes - run(NOTHING).memory_bytes)

    return Case(f"decode {name} ({count_parameters(shape).total / 1e9:.2f}B, int4)", predicted, None if missing else measure, missing)


def too_large(predicted: Prediction, machine: Machine, assumptions: Assumptions) -> str:
    """Why something cannot be run here; empty if it can."""
    over = predicted.memory_bytes - usable_memory(machine, assumptions)
    return f"it needs {over / GIB:.1f} GiB more than this machine has" if over > 0 else ""


def write_random(shape: ModelConfig, folder: Path) -> None:
    """A quantized folder in int4, as `shoal quantize` writes it, with random weights and no tokenizer."""
    scheme = quantized_scheme(4)
    parts = parts_of(shape, scheme)
    write_quantized(folder, shape, scheme, ((name, random_part(part)) for name, part in parts.items()), None)


def random_part(part: Part) -> PackedMatrix | Tensor:
    """Weights of about the size that keeps activations as large as they are; vectors (norms) are 1."""
    size = part.shape[-1] ** -0.5

    def fill(array: Tensor, scale: float) -> Tensor:
        if array.dtype == torch.uint8:
            return array.random_(256)
        return array.fill_(scale)

    arrays = part.empty()
    if part.is_matrix and "scales" in arrays:
        spread = 4.6 if part.format == "int4" else 73.9  # standard deviation of 16 and of 256 levels
        return part.assemble({name: fill(array, size / spread) for name, array in arrays.items()})
    if len(part.shape) == 1:
        return part.assemble({name: fill(array, 1.0) for name, array in arrays.items()})
    return part.assemble({name: array.normal_(std=size) for name, array in arrays.items()})


def in_a_process(*args: str) -> Prediction:
    """One of `plan_check_runs.RUNS` in a fresh interpreter."""
    return Prediction(**json.loads(run_apart("shoal.bench.plan_check_runs", *args, failed="a measurement did not run to its end")))
