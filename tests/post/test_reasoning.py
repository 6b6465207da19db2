"""The demonstration: what cannot work is said at once, and stopping a stage stops it all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.cli import main
from shoal.post.reasoning import recipe


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--group", "1"], "--group"),
        (["--prompts", "1"], "--prompts"),
        (["--eval-problems", "400"], "no more than"),
        (["--base", "nowhere"], "does not exist"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_first(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "reasoning", "--out", str(tmp_path / "run"), *more]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stopped", ["train", "run_sft", "run_grpo"])
def test_after_a_stage_that_was_stopped_comes_none(
    stopped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[str] = []

    def stage(name: str, result: Any) -> None:
        monkeypatch.setattr(recipe, name, lambda _: (stages.append(name), result)[1])

    stage("train", SimpleNamespace(finished=stopped != "train"))
    for name in ("run_sft", "run_grpo"):
        stage(name, {"stopped": name == stopped})
    args = ["--pretrain-tokens", "1000", "--demonstrations", "3", "--steps", "1", "--eval-problems", "2", "--out", str(tmp_path / "run")]
    assert main(["recipe", "reasoning", *args]) == 130
    assert stages == ["train", "run_sft", "run_grpo"][: len(stages)]
    assert stages[-1] == stopped
    assert "stopped" in capsys.readouterr().err
