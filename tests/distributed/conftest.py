"""Processes, and runs of one process to compare theirs with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Learned, learn, settings
from processes import Processes

from shoal.config import TrainConfig


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Processes]]:
    """So many processes, started when first asked for."""
    started: dict[int, Processes] = {}

    def of(count: int) -> Processes:
        if count not in started or started[count].broken:
            started[count] = Processes(count)
        return started[count]

    yield of
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def single(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Learned]:
    """What one process learns, for the same settings but those of the layout."""
    known: dict[str, Learned] = {}

    def of(**changes: Any) -> Learned:
        key = repr(sorted(changes.items()))
        if key not in known:
            threads = torch.get_num_threads()
            known[key] = learn(settings(workshop, tmp_path_factory.mktemp("single") / "run", **changes))
            torch.set_num_threads(threads)
        return known[key]

    return of


@pytest.fixture
def make(workshop: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def config(name: str = "run", **changes: Any) -> TrainConfig:
        return settings(workshop, tmp_path / name, **changes)

    return config
