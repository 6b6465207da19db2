from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config import UserError
from shoal.formats.checkpoints import save_checkpoint
from shoal.formats.huggingface import save_model
from shoal.formats.locate import locate_model
from shoal.model import Transformer


@pytest.fixture
def run(make_model: Callable[..., Transformer], tokenizer: Any, tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "one"
    for step in (10, 20):
        save_checkpoint(run, step, make_model(), tokenizer, {})
    return run


def test_a_run_is_its_best_checkpoint_or_its_latest(run: Path) -> None:
    folder = run / "checkpoints"
    assert locate_model(run) == folder / "step_0000020"
    assert locate_model(folder) == folder / "step_0000020"
    (run / "best.json").write_text(json.dumps({"step": 10}))
    assert locate_model(str(run)) == folder / "step_0000010"
    (folder / "step_0000010" / "COMPLETE").unlink()
    assert locate_model(run) == folder / "step_0000020"
    for broken in ("", "{}", "[]", '{"step": null}', '{"step": 15}'):
        (run / "best.json").write_text(broken)
        assert locate_model(run) == folder / "step_0000020"


def test_a_checkpoint_and_a_plain_folder_are_themselves(run: Path, make_model: Callable[..., Transformer], tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step_0000010"
    assert locate_model(checkpoint) == checkpoint
    save_model(make_model(), tmp_path / "hf", max_shard_bytes=10000)
    assert locate_model(tmp_path / "hf") == tmp_path / "hf"


def test_what_is_no_model_gives_one_line_with_what_is_there(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "step_0000010" / "COMPLETE").unlink()
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    cases = {
        run.parent / "tow": "does not exist.*one",
        run.parent: r"neither checkpoints/ nor config.json.*one",
        run / "checkpoints" / "step_0000010": "not written to the end.*step_0000020",
        tmp_path / "bare" / "config.json": "is a file",
        tmp_path / "bare": "but no weights",
        tmp_path / "new": "without a complete checkpoint",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            locate_model(path)
        assert "\n" not in str(caught.value)
