from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import atomic
from shoal.atomic import TEMPORARY
from shoal.config import UserError
from shoal.formats import checkpoints
from shoal.formats.checkpoints import (
    checkpoint_step,
    clean_temporary,
    complete_checkpoints,
    load_checkpoint_state,
    prune,
    save_checkpoint,
)
from shoal.formats.huggingface import load_model
from shoal.model import Transformer

Make = Callable[..., Transformer]


def steps(run: Path) -> list[int]:
    return [checkpoint_step(path) for path in complete_checkpoints(run)]


def test_model_and_state_come_back_exactly(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(num_nextn_predict_layers=1, qk_norm=True)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    state = {
        "step": 7,
        "rng": random.Random(0).getstate(),
        "torch": torch.get_rng_state(),
        "optimizer": optimizer.state_dict(),
        "none": None,
    }
    path = save_checkpoint(tmp_path, 7, model, tokenizer, state)
    assert path == tmp_path / "checkpoints" / "step_0000007"
    assert (path / "tokenizer.json").exists()
    loaded = load_model(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    read = load_checkpoint_state(path)
    assert read["rng"] == state["rng"]
    assert torch.equal(read["torch"], state["torch"])
    for key, moments in state["optimizer"]["state"].items():
        assert torch.equal(read["optimizer"]["state"][key]["exp_avg"], moments["exp_avg"])


def test_state_that_could_not_be_loaded_safely_is_refused_before_writing(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['loader'\]\[1\] is a Path|state\['loader'\]\[1\] is a PosixPath"):
        save_checkpoint(tmp_path, 1, make_model(), tokenizer, {"loader": [1, Path()]})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("stage", ["save_model", "tokenizer", "torch.save", "sync", "replace", "marker"])
def test_a_failure_at_any_stage_never_leaves_a_checkpoint_that_counts(
    make_model: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model = make_model()
    save_checkpoint(tmp_path, 1, model, tokenizer, {"step": 1})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if stage == "save_model":
            patch.setattr(checkpoints, "save_model", fail)
        elif stage == "tokenizer":
            patch.setattr(type(tokenizer), "save", fail)
        elif stage == "torch.save":
            patch.setattr(torch, "save", fail)
        elif stage == "sync":
            patch.setattr(atomic, "sync", fail)
        elif stage == "replace":
            patch.setattr(os, "replace", fail)
        else:
            patch.setattr(Path, "write_text", fail)
            patch.setattr(checkpoints, "save_model", lambda *args, **kwargs: None)
            patch.setattr(type(tokenizer), "save", lambda *args: None)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, 2, model, tokenizer, {"step": 2})
    assert steps(tmp_path) == [1]
    clean_temporary(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]
    save_checkpoint(tmp_path, 2, model, tokenizer, {"step": 2})
    assert steps(tmp_path) == [1, 2]


def save_forever(run: Path, model: Transformer, tokenizer: Any) -> None:
    for step in range(1000):
        save_checkpoint(run, step, model, tokenizer, {"step": step, "ballast": bytes(1 << 20)})


def test_a_killed_process_leaves_only_whole_checkpoints(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    model = make_model()
    context = multiprocessing.get_context("fork")
    for delay in (0.0, 0.004, 0.009, 0.013):
        run = tmp_path / str(delay)
        process = context.Process(target=save_forever, args=(run, model, tokenizer))
        process.start()
        deadline = time.monotonic() + 10
        while not complete_checkpoints(run) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = complete_checkpoints(run)
        assert found
        for path in found:
            assert load_checkpoint_state(path)["step"] == checkpoint_step(path)
        load_model(found[-1])
        clean_temporary(run)
        assert len(list((run / "checkpoints").iterdir())) == len(found)


def test_unmarked_temporary_and_foreign_folders_do_not_count(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, 5, make_model(), tokenizer, {})
    for name in ("step_0000009", f"step_0000009{TEMPORARY}", f"step_0000008.old{TEMPORARY}", "step_final"):
        shutil.copytree(good, good.with_name(name))
    (good.with_name("step_0000009") / "COMPLETE").unlink()
    assert steps(tmp_path) == [5]
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_checkpoint_state(good.with_name("step_0000009"))
    clean_temporary(tmp_path)
    assert sorted(path.name for path in good.parent.iterdir()) == ["step_0000005", "step_final"]


def test_a_checkpoint_of_the_same_step_is_kept(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, make_model(), tokenizer, {"n": 1})
    assert save_checkpoint(tmp_path, 3, make_model(), tokenizer, {"n": 2}) == path
    assert load_checkpoint_state(path) == {"n": 1}
    assert save_checkpoint(tmp_path, 3, make_model(), tokenizer, {"n": 2}, again=True) == path
    assert load_checkpoint_state(path) == {"n": 2}


def test_damaged_state_is_one_line(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, make_model(), tokenizer, {"n": torch.ones(1000)})
    state = path / "trainer.pt"
    for content in (state.read_bytes()[:-1500], b"", b"not a pickle"):
        state.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint_state(path)


@pytest.mark.parametrize(
    ("keep_last", "keep", "left"),
    [(2, set(), [10000000, 10000001]), (1, {2}, [2, 10000001]), (0, {1}, [1]), (9, set(), [1, 2, 10000000, 10000001])],
)
def test_prune(make_model: Make, tokenizer: Any, tmp_path: Path, keep_last: int, keep: set[int], left: list[int]) -> None:
    model = make_model()
    for step in (2, 10000001, 10000000, 1):  # eight digits sort as numbers
        save_checkpoint(tmp_path, step, model, tokenizer, {})
    prune(tmp_path, keep_last, keep)
    assert steps(tmp_path) == left
