"""How a training job is laid out over devices, what that demands, and which layer lies on which pipeline stage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..config import ModelConfig
from . import schedule as schedules
from .communication import nearest_divisor
from .cost import layer_matrices, layer_mixing, layer_values, layer_vectors, ngram_parameters, trust_parameters
from .hardware import Machine


@dataclass(frozen=True)
class Layout:
    """Parallel layout and memory choices. Devices = pipeline x data parallel; expert parallelism lies inside data parallel."""

    devices: int = 1
    pipeline: int = 1
    expert: int = 1
    schedule: str = "1f1b"
    chunks: int = 2
    """Stages per device, for `interleaved` only."""
    micro_batch: int = 1
    """Sequences per forward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    """`selective`: norms, MLA up-projections and SwiGLU are computed again in the backward pass (V3 report, 3.2.3); `full`: every layer."""
    zero: Literal[0, 1, 3] = 1
    """What data-parallel ranks share: 0 nothing, 1 optimizer states and master weights, 3 weights and gradients too (FSDP)."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Of matrix products and their weights; master weights and gradients are FP32."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    moment_bytes: int = 4
    """Bytes of one optimizer moment: 4, or 2 for BF16 moments (V3 report, 3.3.2)."""
    two_hop: bool = True
    """Dispatch sends a token to each node once and forwards it there."""

    @property
    def data(self) -> int:
        return self.devices // self.pipeline

    @property
    def pipeline_schedule(self) -> str:
        """Without a pipeline, forward and backward simply alternate."""
        return self.schedule if self.pipeline > 1 else "1f1b"

    @property
    def value_bytes(self) -> int:
        """Bytes of an activation outside of matrix products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def product_bytes(self) -> int:
        """Bytes of a saved input of a matrix product, and of a weight that products read."""
        return {"fp32": 4, "bf16": 2, "fp8": 1}[self.precision]

    def microbatches(self, batch: int) -> int:
        """Micro-batches that one pipeline runs in a step of `batch` sequences."""
        return batch // (self.data * self.micro_batch)

    def describe(self) -> str:
        parts = [f"{self.devices} devices", f"DP {self.data} (ZeRO-{self.zero})", f"EP {self.expert}", f"PP {self.pipeline}"]
        if self.pipeline > 1:
            parts[-1] += f" {self.schedule}"
        parts += [f"micro-batch {self.micro_batch}", f"recompute {self.recompute}", self.precision]
        return ", ".join(parts)


@dataclass(frozen=True)
class Stage:
    """What lies on one pipeline stage."""

    layers: tuple[int, ...]
    """Layer numbers; multi-token prediction modules count on from `num_hidden_layers`."""
    embedding: bool
    head: bool


def problem(model: ModelConfig, machine: Machine, layout: Layout, batch: int) -> str | None:
    """The first constraint that the layout breaks, with by how much and the nearest value that keeps it; None if it can run."""
    devices, pipeline, expert = layout.devices, layout.pipeline, layout.expert
    if min(devices, pipeline, expert, layout.micro_batch, batch) < 1:
        return "devices, PP, EP, micro-batch and batch must each be at least 1"
    unfilled = unfilled_node(machine, devices)
    if unfilled:
        return unfilled
    if devices % pipeline:
        return (
            f"PP {pipeline} does not divide {devices} devices ({devices % pipeline} left over): use PP {nearest_divisor(devices, pipeline)}"
        )
    experts = model.n_routed_experts if model.uses_mla else None
    if expert > 1 and not experts:
        return f"EP {expert} asked for, but the model has no routed experts: use EP 1"
    if experts and experts % expert:
        return f"EP {expert} does not divide {experts} experts ({experts % expert} left over): use EP {nearest_divisor(experts, expert)}"
    if layout.data % expert:
        nearest = nearest_divisor(layout.data, expert)
        return f"EP {expert} does not divide DP {layout.data} ({layout.data % expert} left over): use EP {nearest}"
    if expert > machine.devices_per_node and expert % machine.devices_per_node:
        nearest = machine.devices_per_node * max(1, round(expert / machine.devices_per_node))
        return f"EP {expert} does not fill nodes of {machine.devices_per_node}: use EP {nearest}"
    step = layout.data * layout.micro_batch
    if batch % step or batch < step:
        nearest = step * max(1, round(batch / step))
        return f"a batch of {batch} sequences does not divide into DP {layout.data} x micro-batch {layout.micro_batch}: use {nearest}"
    wrong = schedules.undefined(layout.pipeline_schedule, pipeline, layout.microbatches(batch))
    if wrong:
        return wrong
    stages = schedules.stages_of(layout.pipeline_schedule, pipeline, layout.chunks)
    items = model.num_hidden_layers + (stages > 1)
    if stages > items:
        return f"{layout.schedule} on PP {pipeline} cuts {stages} stages, {stages - items} more than the model has layers: lower PP"
    return None


def unfilled_node(machine: Machine, devices: int) -> str | None:
    """What is wrong with several nodes of which one is not full; None if all are."""
    node, rest = machine.devices_per_node, devices % machine.devices_per_node
    if devices < node or not rest:
        return None
    return f"{devices} devices leave {rest} on a node of {node}: use {devices - rest} or {devices - rest + node}"


def partition(model: ModelConfig, stages: int, costs: list[float], tail: float) -> list[Stage]:
    """Cut the layers into `stages` contiguous parts so that the most expensive is as cheap as possible.

    `costs[i]` is layer i's; `tail` that of head and multi-token prediction, which lie on the last stage, as the embedding
    (free of computation) lies on the first.
    """
    items = [*costs, tail]
    low, high = max(items), sum(items)
    for _ in range(50):
        middle = (low + high) / 2
        if _pieces(items, middle) <= stages:
            high = middle
        else:
            low = middle
    cuts: list[list[int]] = [[]]
    filled = 0.0
    for i, cost in enumerate(items):
        left = len(items) - i
        if cuts[-1] and (filled + cost > high * (1 + 1e-9) or left <= stages - len(cuts)):
            cuts.append([])
            filled = 0.0
        cuts[-1].append(i)
        filled += cost
    modules = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    parts = [tuple(i for i in cut if i < len(costs)) for cut in cuts]
    parts[-1] = (*parts[-1], *modules)
    return [Stage(part, embedding=s == 0, head=s == len(parts) - 1) for s, part in enumerate(parts)]


def _pieces(items: list[float], limit: float) -> int:
    pieces, filled = 1, 0.0
    for cost in items:
        if filled + cost > limit:
            pieces, filled = pieces + 1, 0.0
        filled += cost
    return pieces


def stage_kinds(model: ModelConfig, stage: Stage) -> Counter[tuple[bool, bool]]:
    """How many layers of a stage are (mixture of experts, multi-token prediction module)."""
    return Counter((model.is_moe_layer(layer), layer >= model.num_hidden_layers) for layer in stage.layers)


def stage_parameters(model: ModelConfig, stage: Stage) -> tuple[int, int]:
    """(parameters that every data-parallel rank holds, parameters of routed experts) of a stage."""
    replicated = table_parameters(model, stage) + stage.head * (model.hidden_size + trust_parameters(model))
    experts = 0
    for (moe, module), layers in stage_kinds(model, stage).items():
        for matrix in layer_matrices(model, moe):
            if matrix.part == "routed_experts":
                experts += layers * matrix.stored * matrix.size
            else:
                replicated += layers * matrix.stored * matrix.size
        replicated += layers * sum(layer_vectors(model))
        replicated += layers * (2 * model.hidden_size**2 + 3 * model.hidden_size if module else layer_mixing(model))
    return replicated, experts


def table_parameters(model: ModelConfig, stage: Stage) -> int:
    """Parameters of embedding, head and other tables on a stage; the prediction modules look tokens up, so their stage has both ends."""
    tables = int(stage.embedding) + int(stage.head)
    if stage.head and stage.embedding:
        tables -= model.tie_word_embeddings
    elif stage.head and model.num_nextn_predict_layers:
        tables += 1
    values = sum(layer < model.num_hidden_layers for layer in stage.layers) * layer_values(model)
    return tables * model.vocab_size * model.hidden_size + stage.embedding * ngram_parameters(model) + values
