"""The last part of a run teaches the model a context beyond its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ScheduleConfig, TrainConfig
from shoal.config.recipes import load_recipe
from shoal.formats.checkpoints import complete_checkpoints
from shoal.formats.huggingface import load_model
from shoal.plan.rules import Rules
from shoal.train import train
from shoal.train.schedule import extends_context

LLAMA: dict[str, Any] = {"model_type": "llama", "n_routed_experts": 0, "num_nextn_predict_layers": 0}
StoppedAfter = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def config(workshop: Path, tmp_path: Path) -> TrainConfig:
    """Ten steps on rows of half the model's context; the last four see all of it."""
    recipe = load_recipe(str(workshop / "recipe.toml"))
    recipe = replace(recipe, minutes=None, tokens=None, steps=10, sequence_length=32, schedule=ScheduleConfig(extension=0.35))
    corpus = replace(recipe.corpus, cache=str(workshop / "cache"))
    return replace(recipe, data=(str(workshop / "text.txt"),), out=str(tmp_path / "run"), corpus=corpus)


def scaling_in(checkpoint: Path) -> dict[str, Any] | None:
    scaling: dict[str, Any] | None = json.loads((checkpoint / "config.json").read_text())["rope_scaling"]
    return scaling


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(complete_checkpoints(run)[-1]).state_dict()


@given(st.floats(0, 1), st.floats(0, 1))
def test_only_the_last_part_and_only_rows_that_are_shorter(share: float, progress: float) -> None:
    config = TrainConfig(steps=1, sequence_length=32, schedule=ScheduleConfig(extension=share))
    short, whole = (replace(config, model=replace(config.model, max_position_embeddings=length)) for length in (64, 32))
    assert extends_context(short, progress) == (share > 0 and progress >= 1 - share)
    assert not extends_context(whole, progress)


@pytest.mark.parametrize("kind", ["mla", "gqa", "counted"])
def test_a_run_that_stops_before_or_behind_the_change_goes_on_to_the_bit(
    kind: str, config: TrainConfig, stopped_after: StoppedAfter, tmp_path: Path
) -> None:
    if kind != "mla":
        config = replace(config, model=replace(config.model, **LLAMA, count_order=2 if kind == "counted" else 0))
    whole = train(replace(config, out=str(tmp_path / "whole")))
    assert scaling_in(complete_checkpoints(whole.folder)[-1]) is not None
    for stop, extended in ((4, False), (8, True)):
        again = replace(config, out=str(tmp_path / f"stopped-{stop}"))
        with stopped_after(stop):
            assert not train(again).finished
        assert (scaling_in(complete_checkpoints(Path(str(again.out)))[-1]) is not None) == extended
        resumed = train(replace(again, resume=True))
        assert scaling_in(complete_checkpoints(resumed.folder)[-1]) == scaling_in(complete_checkpoints(whole.folder)[-1])
        expected, found = weights(whole.folder), weights(resumed.folder)
        for name, tensor in expected.items():
            assert found[name].equal(tensor), name
        assert resumed.summary["val_bpb"] == whole.summary["val_bpb"]


def test_files_say_what_the_model_was_trained_with_and_plain_programs_read_it(config: TrainConfig) -> None:
    transformers = pytest.importorskip("transformers")
    run = train(replace(config, model=replace(config.model, num_nextn_predict_layers=0))).folder
    checkpoint = complete_checkpoints(run)[-1]
    scaling = scaling_in(checkpoint)
    assert scaling is not None
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (2.0, 32)
    ours, theirs = load_model(checkpoint), transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.randint(0, 256, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids).hidden), theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.35])
def test_training_on_from_a_model_keeps_its_context(share: float, config: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(config, schedule=ScheduleConfig(extension=share))).folder
    assert (scaling_in(complete_checkpoints(first)[-1]) is not None) == (share > 0)
    second = train(replace(config, start=str(first), out=str(tmp_path / "second"))).folder
    assert scaling_in(complete_checkpoints(second)[-1]) == scaling_in(complete_checkpoints(first)[-1])


@pytest.mark.parametrize("name", ["exportable", "full"])
def test_what_the_rules_train_sees_the_context_it_claims(name: str) -> None:
    config = Rules.load(name).config(1e12)
    assert extends_context(config, 1.0)


def test_the_baseline_is_a_plain_llama() -> None:
    assert not extends_context(Rules.load("baseline").config(1e12), 1.0)
