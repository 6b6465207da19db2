"""Runs of one process to compare those of several with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Learned, learn, settings

from shoal.config import TrainConfig


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
