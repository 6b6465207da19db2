"""What a resumed run may change of its settings."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from shoal.config import TrainConfig, UserError
from shoal.train.run_folder import RESUME_MAY_CHANGE, refuse_changes, run_facts

WHAT_IS_LEARNT = (
    "data", "start", "qat", "sequence_length", "batch_size", "update_early", "seed", "precision", "device", "model", "corpus",
    "optimizer", "fp8", "schedule", "balance", "mtp", "teacher", "sampled_softmax",
)  # fmt: skip
STARTED = TrainConfig(steps=1)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return run_facts(STARTED, "the text", "fp32")


def test_a_new_setting_needs_an_answer() -> None:
    assert {*WHAT_IS_LEARNT} | RESUME_MAY_CHANGE == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize("name", WHAT_IS_LEARNT)
def test_what_is_learnt_from_which_data_stays(facts: dict[str, Any], name: str) -> None:
    value = getattr(STARTED, name)
    if is_dataclass(value):
        changes = {f"{name}.{field.name}": replace(value, **{field.name: "another"}) for field in fields(value)}
    else:
        changes = {name: "another"}
    for changed, other in changes.items():
        with pytest.raises(UserError, match=re.escape(f"({changed})")):
            refuse_changes(facts, replace(STARTED, **{name: other}), "the text")


@pytest.mark.parametrize("name", sorted(RESUME_MAY_CHANGE))
def test_all_else_may_change(facts: dict[str, Any], name: str) -> None:
    refuse_changes(facts, replace(STARTED, **{name: "another"}), "the text")
