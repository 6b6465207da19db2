"""Layouts: which process is which, and which layouts cannot work.

Processes are numbered stage by stage; within a stage by data-parallel place. Experts divide among neighbours, and nodes are runs of
neighbours, so that an expert group covers as few nodes as it can.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from ..config import ParallelConfig, TrainConfig, UserError
from ..config.parallel import PIPELINE_SCHEDULES

STAGES_PER_PROCESS = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}
"""Pieces of the model that every process of a pipeline holds."""
V_SHAPED = ("zbv", "dualpipev")
"""Schedules that lead the stages down the processes and back up, so that the first one also has the last stage. They put gradients of
weights off until there is nothing else to do."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a layout. World = pipeline x data, data = replica x expert, expert = nodes x local."""

    world: int = 1
    pipeline: int = 1
    expert: int = 1
    local: int = 1
    """Neighbours of an expert group on one node."""
    schedule: str = "1f1b"

    @property
    def data(self) -> int:
        return self.world // self.pipeline

    @property
    def replica(self) -> int:
        """Copies of every expert."""
        return self.data // self.expert

    @property
    def nodes(self) -> int:
        """Nodes that an expert group covers."""
        return self.expert // self.local

    @property
    def stages(self) -> int:
        return self.pipeline * (STAGES_PER_PROCESS[self.schedule] if self.pipeline > 1 else 1)

    def describe(self) -> str:
        parts = [f"{self.world} processes", f"data {self.data}"]
        parts += [f"expert {self.expert} on {self.nodes} node{'s' * (self.nodes > 1)}"] * (self.expert > 1)
        parts += [f"pipeline {self.pipeline} {self.schedule}"] * (self.pipeline > 1)
        return ", ".join(parts)


def layout_of(config: TrainConfig, world: int, local_world: int | None = None) -> Layout:
    """The layout of a run on `world` processes, `local_world` of them on every machine.

    Raises `UserError` where it cannot work, naming the nearest that can, and for what more processes than one cannot do at all.
    """
    if world > 1:
        _refuse_what_is_for_one(config)
    asked = config.parallel
    if world == 1 < (needed := asked.pipeline * asked.expert):
        raise UserError(f"parallel.pipeline {asked.pipeline} and parallel.expert {asked.expert} need processes: add --nproc {needed}")
    per_node = asked.per_node or local_world or world
    import torch  # not before it is needed: help texts do without

    here = local_world or world
    if config.device != "cpu" and torch.cuda.is_available() and 1 < here > (gpus := torch.cuda.device_count()):
        raise UserError(f"{here} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}: start {gpus} there, or add --device cpu")
    wrong = problem(config, world, per_node)
    if wrong is None:
        return Layout(world, asked.pipeline, asked.expert, min(per_node, asked.expert), asked.schedule)
    nearest = nearest_layout(config, world, per_node)
    if nearest is None:
        raise UserError(f"{wrong}; no layout of {world} processes works with this model and batch: use another number of processes")
    sizes = f"parallel.pipeline {nearest.pipeline}, parallel.expert {nearest.expert}"
    other = f", parallel.schedule {nearest.schedule}" if nearest.schedule != asked.schedule else ""
    raise UserError(f"{wrong}: the nearest layout that works is {sizes}{other}")


def _refuse_what_is_for_one(config: TrainConfig) -> None:
    """Raise `UserError` for what only a single process can do."""
    if asked := [name for name in ("memory_limit", "recompute", "offload", "update_early", "qat") if getattr(config, name)]:
        raise UserError(f"{asked[0]} is for a single process: leave it away, or --nproc")
    if config.model.count_order or config.teacher.order:
        raise UserError("n-grams are counted by a single process: leave --nproc away, or name a recipe, as in shoal train default")
    if config.sampled_softmax.drawn:
        raise UserError("sampled_softmax is for a single process: set sampled_softmax.drawn 0, or leave --nproc away")


def problem(config: TrainConfig, world: int, per_node: int) -> str | None:
    """The first reason why `config.parallel` cannot run on `world` processes; None if it can."""
    asked, model = config.parallel, config.model
    pipeline, expert = asked.pipeline, asked.expert
    if world % pipeline:
        return f"parallel.pipeline {pipeline} does not divide {world} processes"
    data = world // pipeline
    experts = model.n_routed_experts if model.uses_mla else None
    if expert > 1 and not experts:
        return f"parallel.expert {expert} is asked for, but the model has no experts"
    if experts and experts % expert:
        return f"parallel.expert {expert} does not divide {experts} experts"
    if data % expert:
        return f"parallel.expert {expert} does not divide {data} data-parallel processes"
    if expert > per_node and expert % per_node:
        return f"parallel.expert {expert} does not fill nodes of {per_node}"
    if asked.overlap and expert == 1:
        return "parallel.overlap hides the travel of tokens, but parallel.expert is 1"
    if asked.overlap and pipeline > 1:
        return "parallel.overlap and parallel.pipeline exclude each other"
    if config.batch_size % data:
        return f"a batch of {config.batch_size} sequences does not divide among {data} data-parallel processes"
    share = config.batch_size // data
    micro = micro_batch(config, data)
    if share % micro:
        return f"micro_batch_size {micro} does not divide the {share} sequences of a process"
    if asked.overlap and micro % 2:
        return f"parallel.overlap halves micro-batches, but they hold {micro} sequences"
    if pipeline == 1:
        return None
    if model.additions:
        return f"a pipeline passes hidden states alone from stage to stage, but {' and '.join(model.additions)}"
    modules, tied = model.num_nextn_predict_layers, model.tie_word_embeddings
    if asked.schedule in V_SHAPED and modules and modules + tied > 1:
        # torch's `stage_backward_weight` would go through a part of the graph twice, which is freed the first time.
        served = f"{modules} MTP module{'s' * (modules > 1)}{' and the head' * tied}"
        return f"{asked.schedule} puts gradients of weights off, which an embedding that serves {served} cannot"
    stages = pipeline * STAGES_PER_PROCESS[asked.schedule]
    if stages > model.num_hidden_layers:
        return f"{asked.schedule} on {pipeline} processes cuts {stages} stages, but the model has {model.num_hidden_layers} layers"
    count = share // micro
    least = {"1f1b": pipeline, "interleaved": pipeline}.get(asked.schedule, 2 * pipeline)
    if count < least:
        return f"{asked.schedule} on {pipeline} processes needs {least} micro-batches a step, but there are {count}"
    if asked.schedule == "interleaved" and count % pipeline:
        return f"interleaved advances {pipeline} micro-batches at a time, but there are {count} a step"
    return None


def micro_batch(config: TrainConfig, data: int) -> int:
    """Sequences of one forward pass of a process: all of its share, or one in a pipeline, unless set."""
    return config.micro_batch_size or (config.batch_size // data if config.parallel.pipeline == 1 else 1)


def nearest_layout(config: TrainConfig, world: int, per_node: int) -> ParallelConfig | None:
    """Of all layouts that work on `world` processes, the one whose sizes differ least from what was asked, if it can be in its schedule."""
    asked = config.parallel
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    found: list[ParallelConfig] = []
    for pipeline, expert, schedule in itertools.product(divisors, divisors, PIPELINE_SCHEDULES):
        tried = replace(asked, pipeline=pipeline, expert=expert, schedule=schedule)
        if problem(replace(config, parallel=tried), world, per_node) is None:
            found.append(tried)

    def distance(p: ParallelConfig) -> tuple[int, int, bool]:
        return abs(p.pipeline - asked.pipeline) + abs(p.expert - asked.expert), p.pipeline, p.schedule != asked.schedule

    return min(found, key=distance, default=None)
