"""Recipes: what is written is read back, and what is wrong is named with its place."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import CheckpointConfig, CorpusConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig, UserError
from shoal.config.recipes import from_table, load_recipe, recipe_names, to_toml, with_one_budget

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = st.text(max_size=20)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
NUMBER = st.floats(allow_nan=False)
SIZE = st.integers(-(10**12), 10**12)
JSON = st.recursive(
    st.none() | SIZE | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=4
)
MODELS = st.builds(
    ModelConfig,
    model_type=st.sampled_from(["deepseek_v3", "deepseek_v2", "llama"]),
    hidden_size=SIZE,
    rms_norm_eps=NUMBER,
    rope_scaling=st.none() | st.dictionaries(TEXT, TEXT | NUMBER | st.booleans() | SIZE, min_size=1, max_size=3),
    q_lora_rank=st.none() | SIZE,
    n_routed_experts=st.none() | st.integers(1, 99),
    n_shared_experts=st.none() | st.integers(1, 99),
    bos_token_id=st.none() | st.integers(0, 9),
    eos_token_id=st.none() | st.integers(0, 9),
    qk_norm=st.booleans(),
    logit_softcap=st.none() | NUMBER,
    extra=st.dictionaries(TEXT, JSON, max_size=2),
)
CONFIGS = st.builds(
    TrainConfig,
    data=TEXTS,
    out=st.none() | TEXT,
    resume=st.booleans(),
    minutes=st.none() | NUMBER,
    tokens=st.none() | SIZE,
    prompts=TEXTS,
    precision=st.sampled_from(["auto", "fp32", "bf16"]),
    model=MODELS,
    corpus=st.builds(CorpusConfig, text_column=TEXT, tokenizer=st.none() | TEXT, val_fraction=NUMBER),
    optimizer=st.builds(OptimizerConfig, adam_betas=st.tuples(NUMBER, NUMBER), adam_eps=NUMBER),
    schedule=st.builds(ScheduleConfig, name=st.sampled_from(["trapezoid", "cosine"])),
    checkpoint=st.builds(CheckpointConfig, keep_best=st.booleans()),
)


@settings(max_examples=80)
@given(CONFIGS)
def test_any_settings_come_back_from_toml_as_they_were(config: TrainConfig) -> None:
    """All but what a `config.json` says besides, which may be more than TOML can."""
    kept = dataclasses.replace(config, model=dataclasses.replace(config.model, extra={}))
    assert from_table(TrainConfig, tomllib.loads(to_toml(config)), "recipe") == kept


@settings(max_examples=40)
@given(CONFIGS)
def test_any_settings_come_back_from_the_json_of_a_run(config: TrainConfig) -> None:
    assert from_table(TrainConfig, json.loads(json.dumps(dataclasses.asdict(config))), "run.json") == config


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = TrainConfig(steps=3, out='a\r\nb\t\x7f\u2028é"\\', prompts=("", "\x00"), model=ModelConfig(n_routed_experts=None))
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_recipe(str(tmp_path / "config.toml")) == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_with_shoal_works(name: str) -> None:
    recipe = load_recipe(name)
    recipe.validate()
    assert from_table(TrainConfig, tomllib.loads(to_toml(recipe)), name) == recipe


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("stepz = 3", "there is no setting 'stepz'"),
        ("[model]\nhiden_size = 3", "model: there is no setting 'hiden_size'"),
        ("[modell]\nhidden_size = 3", "there is no setting 'modell'"),
        ("model = 3", "model is a section"),
        ("steps = 'ten'", "steps cannot be 'ten'"),
        ("steps = true", "steps cannot be True"),
        ("steps = 1.5", "steps cannot be 1.5"),
        ("json = 1", "json cannot be 1"),
        ("data = 'text.txt'", "data cannot be 'text.txt'"),
        ("data = [1, 2]", "data cannot be 1"),
        ("precision = 'fp4'", "precision cannot be 'fp4'"),
        ("[optimizer]\nadam_betas = [0.9]", r"adam_betas cannot be \[0.9\]"),
        ("[optimizer]\nadam_betas = [0.9, 'b']", "adam_betas cannot be 'b'"),
        ("[model]\nrope_scaling = 4", "rope_scaling cannot be 4"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, place: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=place) as caught:
        load_recipe(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_and_a_name_that_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    for name in (str(tmp_path / "model.bin"), str(tmp_path), "no-such-recipe"):
        with pytest.raises(UserError, match="recipe"):
            load_recipe(name)


def test_whole_numbers_are_taken_for_fractions(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("minutes = 5\n[optimizer]\nadam_betas = [0, 0.5]")
    recipe = load_recipe(str(tmp_path / "recipe.toml"))
    assert (recipe.minutes, recipe.optimizer.adam_betas) == (5.0, (0.0, 0.5))
    assert isinstance(recipe.minutes, float)


@pytest.mark.parametrize(
    ("recipe", "given_", "left"),
    [
        ({"minutes": 5.0}, {"steps": 3}, {"steps": 3}),
        ({"steps": 3}, {"minutes": 5.0}, {"minutes": 5.0}),
        ({"steps": 3}, {"steps": 4}, {"steps": 4}),
        ({"minutes": 5.0}, {}, {"minutes": 5.0}),
        ({}, {"tokens": 7}, {"tokens": 7}),
        ({"minutes": 5.0}, {"steps": 3, "tokens": 9}, {"minutes": 5.0, "steps": 3, "tokens": 9}),  # refused by validate
    ],
)
def test_a_budget_given_takes_the_place_of_the_recipes(recipe: dict[str, Any], given_: dict[str, Any], left: dict[str, Any]) -> None:
    config = with_one_budget(TrainConfig(**{**recipe, **given_}), TrainConfig(**recipe))
    budgets = {name: getattr(config, name) for name in ("minutes", "tokens", "steps")}
    assert {name: value for name, value in budgets.items() if value is not None} == left
