"""What runs in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.apart import run_apart


def test_what_runs_apart_is_no_member_of_our_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the run that torchrun is to go on with for its own."""
    (tmp_path / "tell.py").write_text("from shoal.config import TrainConfig\nfrom shoal.parallel import join\nprint(join(TrainConfig()))\n")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    assert "rank=0, mesh=None, ends=None, store=None" in run_apart("tell", failed="it failed")
