"""Samples from the model that is being trained, through the engine that serves.

The engine reads the weights where the trainer changes them: embedding, norms and routing bias are the same memory, and matrices are packed
for the C++ kernels into one set of arrays that is filled anew after every update. Where those kernels do not run, the engine
computes with the trainer's modules themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import EngineOptions, SamplingOptions
from ..data import Tokenizer
from ..engine import Engine, Request, Result, Runner, TorchRunner
from ..engine.native import NativeRunner
from ..formats.packing import fill
from ..formats.parts import HEAD, Part, Scheme, arrays_of, parts_of, split_kv_up
from ..kernels.packed import PackedMatrix
from ..kernels.selection import BACKEND
from ..model import Transformer
from ..runtime import Machine
from .adapters import merged_weight
from .packing import Text

THOUGHT_BEGUN = re.compile(r"<think>\s*$")


@dataclass(frozen=True)
class Sample:
    """One reply to a prompt, and how it came about."""

    prompt: list[int]
    ids: list[int]
    """Of the reply, end-of-text included where it came."""
    logprobs: np.ndarray
    """`[len(ids)]` fp32, under the model that drew them."""
    experts: np.ndarray | None
    """`[MoE layers, len(prompt) + len(ids) - 1, K]`: who computed every token that was read; None for dense models."""
    text: str
    """Of the reply; behind the `<think>` with which the template may have begun it."""
    finished: bool
    """False where it was cut off."""

    def to_text(self, replay: bool) -> Text:
        """The sample as something to learn from."""
        ids = np.array([*self.prompt, *self.ids])
        learnt = np.arange(len(ids)) >= len(self.prompt)
        return Text(ids, learnt, self.experts if replay else None)


class LiveWeights:
    """A model's weights as the engine's kernels read them, kept up to date with `refresh`."""

    def __init__(self, model: Transformer, precision: str) -> None:
        format = "bf16" if precision == "bf16" else "fp32"
        scheme = Scheme(format, format, format, "fp32")  # type: ignore[arg-type]
        self._model = model
        self._plan = parts_of(model.config, scheme)
        self.parts: dict[str, PackedMatrix | Tensor] = {}
        for name, part in self._plan.items():
            if name.endswith("mlp.gate.weight"):  # in tiles, as NativeRunner would make its own copy
                part = self._plan[name] = Part(part.shape, "fp32", True)
            source = self._source(name)
            shared = not part.is_matrix and source.dtype == part.arrays()[""][0] and source.is_contiguous()
            self.parts[name] = source if shared else part.assemble(part.empty())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack the model's present weights, adapters merged, into the same arrays."""
        for name, part in self._plan.items():
            source, target = self._source(name), self.parts[name]
            if isinstance(target, PackedMatrix) or target.data_ptr() != source.data_ptr():
                fill(arrays_of(target), source, part)

    def _source(self, name: str) -> Tensor:
        """The weights of a part, `[..., O, I]`."""
        module_name, _, last = name.rpartition(".")
        if last in ("k_up", "v_up"):
            whole = merged_weight(self._model.get_submodule(f"{module_name}.kv_b_proj"), "weight")
            return split_kv_up(whole, self._model.config)[last == "v_up"]
        if name == HEAD:
            return self._model.lm_head.weight.detach()
        module = self._model.get_submodule(module_name) if module_name else self._model
        if last in dict(module.named_children()):  # a linear layer, named without its weight
            return merged_weight(module.get_submodule(last), "weight")
        return merged_weight(module, last)


class Sampler:
    """Draws replies from a model in training. Temperature is 1: what is trained is what is sampled."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, machine: Machine, options: EngineOptions) -> None:
        self._live: LiveWeights | None = None
        runner: Runner
        if machine.device.type == "cpu" and BACKEND.cpu is not None and not model.config.in_torch_only:
            self._live = LiveWeights(model, machine.precision)
            runner = NativeRunner(model.config, self._live.parts, machine.threads)
        else:
            runner = TorchRunner(model, machine)
        self.engine = Engine(runner, tokenizer, options)
        self._mixtures = sum(map(model.config.is_moe_layer, range(model.config.num_hidden_layers)))

    def refresh(self) -> None:
        """The model's weights have changed."""
        if self._live is not None:
            self._live.refresh()
        self.engine.pool.forget_all()

    def sample(
        self, prompts: Sequence[Sequence[int]], group: int, max_tokens: int, seed: int, *, experts: bool = True
    ) -> list[list[Sample]]:
        """`group` replies to every prompt; `experts`: with who computed each token."""
        return draw(self.engine, prompts, group, max_tokens, seed, experts=experts and self._mixtures > 0)


def draw(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    group: int,
    max_tokens: int,
    seed: int,
    *,
    temperature: float = 1.0,
    experts: bool = False,
    stop: tuple[str, ...] = (),
) -> list[list[Sample]]:
    """`group` replies to every prompt, the same ones for the same seed."""
    requests = [
        Request(
            prompt,
            SamplingOptions(
                max_tokens=max_tokens, temperature=temperature, logprobs=0, seed=(seed * 1_000_003 + i * group + j) % 2**64, stop=stop
            ),
            experts=experts,
            prompt_experts=j == 0,  # the others of the group share its prompt
        )
        for i, prompt in enumerate(prompts)
        for j in range(group)
    ]
    results = engine.run(requests)
    groups = [results[i : i + group] for i in range(0, len(results), group)]
    assert engine.tokenizer is not None
    begun = [thought_begun(engine.tokenizer, prompt) for prompt in prompts]
    return [
        [_sample(list(prompt), text, result, members[0], experts) for result in members]
        for prompt, text, members in zip(prompts, begun, groups, strict=True)
    ]


def thought_begun(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """The `<think>` and space that a prompt ends with; nothing where it ends otherwise."""
    found = THOUGHT_BEGUN.search(tokenizer.decode(prompt[-16:], skip_special=False))
    return found[0] if found else ""


def _sample(prompt: list[int], begun: str, result: Result, first: Result, with_experts: bool) -> Sample:
    experts = None
    if with_experts:
        read = first.prompt.experts
        assert read is not None
        answered = [token.experts for token in result.tokens[1:]]
        experts = np.concatenate([read, np.stack(answered, 1)], 1) if answered else read  # type: ignore[arg-type]
    logprobs = np.array([token.logprob for token in result.tokens], np.float32)
    return Sample(prompt, result.ids, logprobs, experts, begun + result.text, result.finish_reason == "stop")
