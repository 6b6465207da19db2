"""Settings that cannot work are refused before anything begins."""

from __future__ import annotations

import dataclasses
import math
from operator import attrgetter
from typing import Any

import pytest

from shoal.config import EngineOptions, ModelConfig, SamplingOptions, TrainConfig, UserError


def changed(settings: Any, name: str, value: Any) -> Any:
    """A copy of `settings` with another value at a dotted name."""
    head, _, rest = name.partition(".")
    return dataclasses.replace(settings, **{head: changed(getattr(settings, head), rest, value) if rest else value})


def refused(settings: Any, name: str, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        changed(settings, name, value).validate()
    assert "\n" not in str(caught.value)
    return str(caught.value)


GOOD = TrainConfig(steps=10)
NUMBERS = [
    field
    for section in ("", "optimizer.", "schedule.", "balance.", "mtp.", "checkpoint.", "model.")
    for field in (
        section + f.name for f in dataclasses.fields(attrgetter(section[:-1])(GOOD) if section else GOOD) if f.type in ("int", "float")
    )
    if not field.endswith("token_id") and field != "model.routed_scaling_factor"
]


def test_the_defaults_work() -> None:
    GOOD.validate()
    for model_type in ("deepseek_v3", "deepseek_v2", "llama"):
        ModelConfig(model_type=model_type).validate()


@pytest.mark.parametrize("name", NUMBERS)
def test_no_size_rate_or_share_is_negative(name: str) -> None:
    model = GOOD.model
    settings = GOOD
    if name in ("model.n_group", "model.topk_group"):
        settings = dataclasses.replace(GOOD, model=dataclasses.replace(model, n_group=2))
    assert name.split(".")[-1] in refused(settings, name, -1)


@pytest.mark.parametrize("name", [name for name in NUMBERS if isinstance(attrgetter(name)(GOOD), float)])
def test_no_number_is_nan(name: str) -> None:
    refused(GOOD, name, math.nan)


@pytest.mark.parametrize("name", ["minutes", "tokens", "steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_budget_is_more_than_nothing(name: str, value: int) -> None:
    assert "more than 0" in refused(TrainConfig(), name, value)


def test_there_is_exactly_one_budget() -> None:
    for config in (TrainConfig(), TrainConfig(steps=1, minutes=1), TrainConfig(steps=1, minutes=1, tokens=1)):
        with pytest.raises(UserError, match="exactly one"):
            config.validate()


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("sequence_length", 5000, "max_position_embeddings"),
        ("micro_batch_size", 3, "divisor"),
        ("micro_batch_size", 0, "divisor"),
        ("corpus.val_fraction", 1.0, "between 0 and 1"),
        ("optimizer.adam_betas", (0.9, 1.0), "less than 1"),
        ("optimizer.adam_eps", 0.0, "at least 1e-30"),
        ("optimizer.adam_eps", 1e-50, "at least 1e-30"),
        ("seed", 2**64, "seed"),
        ("model.qk_rope_head_dim", 3, "even"),
        ("model.num_experts_per_tok", 17, "between 1 and the 16 experts"),
        ("model.n_group", 3, "groups"),
        ("model.q_lora_rank", 0, "q_lora_rank"),
        ("model.n_shared_experts", -1, "n_shared_experts"),
        ("model.logit_softcap", 0.0, "logit_softcap"),
        ("model.rope_scaling", {"type": "longrope"}, "longrope"),
        ("model.rope_scaling", {"type": "yarn"}, "factor"),
        ("model.rope_scaling", {"type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ("model.rope_scaling", {"type": "yarn", "factor": "eight"}, "factor"),
    ],
)
def test_settings_that_contradict_each_other(name: str, value: Any, hint: str) -> None:
    assert hint in refused(GOOD, name, value)


@pytest.mark.parametrize(("name", "value"), [("adam_betas", (0.9, 0.999)), ("adam_betas", (0.999, 0.95)), ("muon_momentum", 0.999)])
def test_bf16_moments_need_decays_that_they_can_hold(name: str, value: Any) -> None:
    optimizer = dataclasses.replace(GOOD.optimizer, **{name: value})
    changed(GOOD, "optimizer", optimizer).validate()
    assert "choose fp32, or 0.996" in refused(GOOD, "optimizer", dataclasses.replace(optimizer, moments="bf16"))
    changed(GOOD, "optimizer", dataclasses.replace(GOOD.optimizer, moments="bf16", adam_betas=(0.9, 0.996))).validate()


def test_resume_and_overwrite_contradict_each_other() -> None:
    with pytest.raises(UserError, match="contradict"):
        TrainConfig(steps=1, resume=True, overwrite=True).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf)],
        *[("top_p", value) for value in (0.0, 1.1, math.nan)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, math.nan)],
        *[(name, math.nan) for name in ("presence_penalty", "frequency_penalty")],
        *[("max_tokens", 0), ("top_k", -1), ("min_tokens", -1), ("stop", ("a", "")), ("seed", -1), ("seed", 2**64)],
    ],
)
def test_sampling_options(name: str, value: Any) -> None:
    assert "--" + name.replace("_", "-") in refused(SamplingOptions(), name, value)


@pytest.mark.parametrize(("name", "value"), [("logprobs", -1), ("prompt_logprobs", 1000), ("logit_bias", {3: math.nan})])
def test_sampling_options_of_requests(name: str, value: Any) -> None:
    assert name in refused(SamplingOptions(), name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cache_tokens", -1), ("max_running", 0), ("step_tokens", 64), ("step_tokens", 1), ("draft_tokens", 0), ("draft_tokens", 9)],
)
def test_engine_options(name: str, value: int) -> None:
    assert "--" + name.replace("_", "-") in refused(EngineOptions(), name, value)
