"""Settings of a run on many processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import UserError

PipelineSchedule = Literal["1f1b", "interleaved", "zbv", "dualpipev"]
PIPELINE_SCHEDULES: tuple[PipelineSchedule, ...] = get_args(PipelineSchedule)


@dataclass
class ParallelConfig:
    """How a run is laid out: processes = pipeline stages x data-parallel processes; experts divide among neighbours of the latter."""

    expert: int = 1
    """Processes that share one set of experts; it must divide the data-parallel processes and the experts."""
    dense: Literal["auto", "shard", "replicate"] = "auto"
    """Parameters that are not experts: divided among the data-parallel processes (FSDP2) or held by each. `auto` divides them
    where neither pipeline nor overlap is asked for; in a pipeline, `shard` gathers a stage's layers once a step."""
    dispatch: Literal["flat", "two-hop"] = "two-hop"
    """How tokens travel to experts: `flat` sends one copy for every expert chosen; `two-hop` one to every node, which passes it on."""
    dispatch_format: Literal["exact", "bf16", "fp8"] = "exact"
    """Numbers on the wire: `exact` those of the model; `bf16`; `fp8` in 1x128 tiles on the way to the experts and BF16 back."""
    per_node: int = 0
    """Processes of a node, whose links are fast; 0: all those on one machine."""
    overlap: bool = False
    """Compute one half of every micro-batch while the tokens of the other travel."""
    pipeline: int = 1
    """Pipeline stages' processes: consecutive layers lie on each."""
    schedule: PipelineSchedule = "1f1b"
    """Order of the passes through a pipeline."""

    def validate(self) -> None:
        """Raise `UserError` on the first setting that cannot work whatever the number of processes."""
        for name in ("expert", "pipeline"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name} is {getattr(self, name)}: it must be at least 1")
        if self.per_node < 0:
            raise UserError(f"parallel.per_node is {self.per_node}: it must be 0 (all of a machine) or more")
        if self.overlap and self.dense == "shard":
            raise UserError("parallel.overlap runs two halves at once, for which parameters must stay: use parallel.dense replicate")

    @property
    def shards_dense(self) -> bool:
        return self.dense == "shard" or (self.dense == "auto" and self.pipeline == 1 and not self.overlap)
