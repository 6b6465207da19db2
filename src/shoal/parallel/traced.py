"""Torch's pipeline schedules, and stages that note what they do. Loaded only where there is a pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from .pipeline import Interval

SCHEDULES = {"1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}


class TracedStage(PipelineStage):
    """A stage that notes when its passes begin and end."""

    trace: list[Interval]

    def _timed(self, kind: str, microbatch: int, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.trace.append(Interval(kind, self.stage_index, microbatch, start, time.perf_counter()))
        return result

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self._timed("F", fwd_chunk_id, lambda: super(TracedStage, self).forward_one_chunk(fwd_chunk_id, *args, **kwargs))

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, full_backward: bool = True, **kwargs: Any) -> Any:
        kwargs["full_backward"] = full_backward
        return self._timed(
            "B" if full_backward else "I", bwd_chunk_id, lambda: super(TracedStage, self).backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        )

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self._timed("W", bwd_chunk_id, lambda: super(TracedStage, self).backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs))
