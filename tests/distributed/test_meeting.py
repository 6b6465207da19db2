"""How processes find each other, and wait for the first."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

from processes import in_processes
from torch.distributed.distributed_c10d import _set_pg_timeout

from shoal.config import TrainConfig
from shoal.parallel import join

CONFIG: dict[str, Any] = {"steps": 1, "batch_size": 2, "device": "cpu"}


def meet_twice() -> list[bool]:
    """As on two nodes, of which one has started its process again more often than the other."""
    met = []
    for attempt in range(2):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt * int(os.environ["RANK"]))
        team = join(TrainConfig(**CONFIG))
        met.append(team.any(team.is_first))
        team.leave()
    return met


def test_nodes_that_count_restarts_differently_meet() -> None:
    assert in_processes(2, meet_twice) == [[True, True]] * 2


def wait_for_the_first() -> float:
    team = join(TrainConfig(**CONFIG))
    team.any(True)
    _set_pg_timeout(datetime.timedelta(seconds=1))
    began = time.monotonic()
    team.first_then_others(lambda: time.sleep(2 * team.is_first))
    waited = time.monotonic() - began
    team.leave()
    return waited


def test_others_wait_for_the_first_longer_than_they_would_for_a_message() -> None:
    assert min(in_processes(2, wait_for_the_first)) >= 2
