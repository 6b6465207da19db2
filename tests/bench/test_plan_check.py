"""What `shoal plan --here --check` runs, on models of next to nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.bench import plan_check, plan_check_runs
from shoal.config import UserError
from shoal.config.recipes import load_recipe
from shoal.engine.weights import load_weights, quantized_scheme
from shoal.formats.parts import parts_of
from shoal.kernels.selection import BACKEND
from shoal.plan.assumptions import Assumptions
from shoal.plan.cost import count_parameters
from shoal.plan.hardware import Machine
from shoal.plan.models import BUILT_IN
from shoal.plan.scaling import scaled
from shoal.plan.sustained import Curve, Sustained

FLAT = Curve(((64.0, 300e9),))
HERE = Machine(
    name="box", memory_gib=24, bandwidth_gb_s=25, fp32_tflops=0.3, int8_tops=0.8, measured=True, is_cpu=True,
    sustained=Sustained("fp32", FLAT, FLAT, FLAT, FLAT, FLAT, *[1e9] * 6),
)  # fmt: skip


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_larger_models_have_the_parameters_asked_for(factor: int) -> None:
    demo = load_recipe("demo").model
    shape = scaled(demo, factor)
    shape.validate()
    assert count_parameters(shape).trained == pytest.approx(factor * count_parameters(demo).trained, rel=0.06)
    assert shape.vocab_size == demo.vocab_size


def test_what_is_not_measured_says_why() -> None:
    cases = list(plan_check.cases(BUILT_IN["deepseek-v3"], HERE, Assumptions()))
    assert [case.measure is None for case in cases] == [False, False, True, True]
    assert all("GiB more than this machine has" in case.missing for case in cases[2:])
    small = list(plan_check.cases(None, replace(HERE, memory_gib=0.5), Assumptions()))
    assert small[-1].measure is None


@pytest.mark.skipif(BACKEND.cpu is None, reason=BACKEND.reason)
def test_random_weights_are_a_model_that_the_engine_decodes(tmp_path: Path) -> None:
    plan_check.write_random(plan_check.NOTHING, tmp_path / "model")
    weights = load_weights(tmp_path / "model")
    assert weights.nbytes == sum(part.nbytes for part in parts_of(plan_check.NOTHING, quantized_scheme(4)).values())
    figures = plan_check_runs.decode(str(tmp_path / "model"), "40", "8")
    assert figures["tokens_per_second"] > 0
    assert figures["memory_bytes"] > 0


def test_training_is_measured(workshop: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(workshop / "recipe.toml"))
    recipe = replace(recipe, data=(str(workshop / "text.txt"),), corpus=replace(recipe.corpus, cache=str(workshop / "cache")))
    seen = plan_check.Training(recipe, HERE, Assumptions()).run(recipe, steps=4)
    assert seen.tokens_per_second > 0
    assert 50e6 < seen.memory_bytes < 5e9


def test_a_run_that_fails_says_so_in_one_line() -> None:
    with pytest.raises(UserError, match=r"did not run to its end: .*recipe"):
        plan_check.in_a_process("train", "no such recipe")


def test_a_run_counts_by_its_best_part() -> None:
    assert plan_check_runs.undisturbed([10.0] * 10 + [2.0] * 20) == 10
    assert plan_check_runs.undisturbed([3.0, 3.0, 30.0] * 10) == 3  # one lucky step in three is no part
    assert plan_check_runs.undisturbed([4.0]) == 4
