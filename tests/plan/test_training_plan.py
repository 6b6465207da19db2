"""Training plans: the published run, memory, layouts that cannot work, the search."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.plan.assumptions import Assumptions
from shoal.plan.command import PUBLISHED_LAYOUTS
from shoal.plan.cost import count_parameters
from shoal.plan.hardware import MACHINES, Machine, load_machine
from shoal.plan.layout import Layout, partition, problem, stage_parameters
from shoal.plan.models import BUILT_IN
from shoal.plan.search import explain, find_best, nearest_plan
from shoal.plan.training import Step, fits, plan_step, usable_memory

V3, LITE = BUILT_IN["deepseek-v3"], BUILT_IN["deepseek-v2-lite"]
H800, H100, A = MACHINES["h800"], MACHINES["h100"], Assumptions()
PUBLISHED = PUBLISHED_LAYOUTS["deepseek-v3"][1]


@pytest.fixture(scope="module")
def published() -> Step:
    return plan_step(V3, H800, PUBLISHED, 15360)


def test_v3_takes_the_published_hours(published: Step) -> None:
    """180K H800 hours per trillion tokens (V3 report, table 1), with the assumptions as they are printed."""
    assert published.device_hours(1e12) == pytest.approx(180e3, rel=0.15)
    assert fits(published, H800, A)
    parts = published.computing + published.exposed + published.bubble + published.gradient_exchange + published.optimizer
    assert parts == pytest.approx(published.seconds)


def test_every_assumption_moves_the_plan(published: Step) -> None:
    worse = {
        "bf16_efficiency": 0.4,
        "fp8_efficiency": 0.3,
        "attention_efficiency": 0.2,
        "bandwidth_efficiency": 0.5,
        "link_efficiency": 0.4,
        "communication_sm_share": 0.4,
        "expert_imbalance": 2.0,
    }
    for name, value in worse.items():
        assert plan_step(V3, H800, PUBLISHED, 15360, assumptions=replace(A, **{name: value})).seconds > published.seconds, name


@pytest.mark.parametrize("batch", range(1, 16))
def test_no_time_is_less_than_none(batch: int) -> None:
    """Sums in another order differ by a rounding, which a table would show as -0.00 ms."""
    step = plan_step(ModelConfig(num_hidden_layers=5), H100, Layout(), batch)
    assert step.exposed >= 0
    assert step.bubble >= 0


def test_layout_choices_cost_what_they_should(published: Step) -> None:
    assert plan_step(V3, H800, replace(PUBLISHED, two_hop=False), 15360).exposed > published.exposed
    full = plan_step(V3, H800, replace(PUBLISHED, recompute="full"), 15360)
    assert full.seconds > published.seconds
    assert full.memory.activations < published.memory.activations
    none = plan_step(V3, H800, replace(PUBLISHED, recompute="none"), 15360)
    assert none.memory.activations > published.memory.activations
    once = plan_step(V3, H800, replace(PUBLISHED, schedule="1f1b"), 15360)
    assert once.bubble > published.bubble
    assert once.memory.total < published.memory.total  # DualPipe keeps every stage twice
    sharded = plan_step(V3, H800, replace(PUBLISHED, zero=3), 15360)
    assert sharded.memory.weights < published.memory.weights / 3
    assert plan_step(V3, H800, replace(PUBLISHED, precision="bf16"), 15360).seconds > published.seconds


def test_states_of_one_device_are_counted_to_the_byte() -> None:
    parameters = count_parameters(LITE).trained
    memory = plan_step(LITE, replace(H100, memory_gib=1000), Layout(zero=0), 1, 128).memory
    assert (memory.weights, memory.master_weights, memory.gradients) == (2 * parameters, 4 * parameters, 4 * parameters)
    assert memory.optimizer == 8 * parameters
    ngrams = replace(LITE, ngram_order=3, ngram_rows=1000)
    tables = 2 * 1000 * LITE.hidden_size
    assert plan_step(ngrams, replace(H100, memory_gib=1000), Layout(zero=0), 1, 128).memory.optimizer == 8 * parameters + 4 * tables
    muon = plan_step(LITE, H100, Layout(zero=0, optimizer="muon"), 1, 128).memory
    embeddings = 2 * LITE.vocab_size * LITE.hidden_size
    assert muon.optimizer == pytest.approx(4 * parameters + 4 * embeddings, rel=0.01)


@settings(max_examples=60)
@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=20),
    st.floats(0.1, 5),
    st.integers(1, 21),
    st.integers(0, 2),
    st.booleans(),
)
def test_partition_is_whole_and_its_slowest_part_is_small(costs: list[float], tail: float, stages: int, mtp: int, tied: bool) -> None:
    stages = min(stages, len(costs) + 1)
    own = {"ngram_order": 3, "value_embedding": True, "convolution": 2, "embedding_skip": True} if tied else {}
    model = ModelConfig(num_hidden_layers=len(costs), num_nextn_predict_layers=mtp, tie_word_embeddings=tied and stages == 1, **own)
    parts = partition(model, stages, costs, tail)
    assert len(parts) == stages
    assert [layer for part in parts for layer in part.layers] == list(range(len(costs) + mtp))
    loads = [sum(costs[i] for i in part.layers if i < len(costs)) + tail * part.head for part in parts]
    assert max(loads) <= sum(loads) / stages + max(*costs, tail) + 1e-9
    copies = model.vocab_size * model.hidden_size if mtp and stages > 1 else 0
    assert sum(sum(stage_parameters(model, part)) for part in parts) == count_parameters(model).trained + copies


@pytest.mark.parametrize(
    ("change", "batch", "reason"),
    [
        ({"expert": 48}, 15360, "EP 48 does not divide 256 experts \\(16 left over\\): use EP 32"),
        ({"expert": 256}, 15360, "EP 256 does not divide DP 128"),
        ({"pipeline": 24}, 15360, "PP 24 does not divide 2048 devices \\(8 left over\\)"),
        ({"devices": 2052}, 15360, "2052 devices leave 4 on a node of 8"),
        ({}, 15000, "15000 sequences does not divide into DP 128"),
        ({}, 1280, "needs at least 32 micro-batches, 22 more"),
        ({"recompute": "none"}, 15360, "does not fit: .* GiB more than the 73.6 GiB that h800 leaves"),
    ],
)
def test_an_impossible_plan_names_the_constraint_and_the_nearest_that_works(change: dict[str, object], batch: int, reason: str) -> None:
    layout = replace(PUBLISHED, **change)  # type: ignore[arg-type]
    message = explain(V3, H800, layout, batch, 4096, A)
    assert message is not None
    assert re.search(reason, message)
    assert "Nearest plan that works" in message
    found = nearest_plan(V3, H800, layout, batch, 4096, A)
    assert found is not None
    nearest, its_batch = found
    assert problem(V3, H800, nearest, its_batch) is None
    assert fits(plan_step(V3, H800, nearest, its_batch), H800, A)


def test_a_plan_that_works_needs_no_explanation() -> None:
    assert explain(V3, H800, PUBLISHED, 15360, 4096, A) is None


def test_a_model_too_large_for_the_devices_is_given_more_of_them() -> None:
    message = explain(V3, H800, Layout(devices=8, expert=8, precision="fp8"), 64, 4096, A)
    assert message is not None
    assert "does not fit" in message
    assert "Nearest plan that works" in message
    assert "devices, DP" in message


def test_the_search_beats_plans_by_hand_and_fits() -> None:
    by_hand = Layout(devices=64, expert=8, recompute="full", zero=3)
    best = find_best(LITE, H100, by_hand, 1024, 4096, A)
    assert best.memory.total <= usable_memory(H100, A)
    assert best.tokens_per_second > 1.2 * plan_step(LITE, H100, by_hand, 1024).tokens_per_second
    with pytest.raises(UserError, match="Nearest plan"):
        find_best(V3, H800, Layout(devices=8), 64, 4096, A)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb1p", "zbv", "dualpipev"])
def test_the_search_knows_pipelines_of_an_odd_length(schedule: str) -> None:
    best = find_best(LITE, H100, Layout(devices=6, pipeline=3, schedule=schedule), 36, 4096, A, fixed=("pipeline", "schedule"))
    assert (best.layout.pipeline, best.layout.schedule) == (3, schedule)


def test_a_pipeline_needs_a_link() -> None:
    lonely = Machine(name="box", memory_gib=1000, bandwidth_gb_s=100, bf16_tflops=1)
    with pytest.raises(UserError, match="state its rate"):
        plan_step(LITE, lonely, Layout(devices=2, pipeline=2), 8, 128)


def test_machines_come_from_the_table_or_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert load_machine("H800").inter_node_gb_s == 50
    file = tmp_path / "box.toml"
    file.write_text("memory_gib = 48\nbandwidth_gb_s = 900\nbf16_tflops = 200\n")
    box = load_machine(str(file))
    assert (box.name, box.peak("fp8")) == ("box", 200e12)
    file.write_text("memory_gib = 48\nbandwith_gb_s = 900\n")
    with pytest.raises(UserError, match="no setting 'bandwith_gb_s'"):
        load_machine(str(file))
    file.write_text("memory_gib = nan\nbandwidth_gb_s = 900\nbf16_tflops = 200\n")
    with pytest.raises(UserError, match="memory_gib is nan"):
        load_machine(str(file))
    file.write_text("memory_gib = 48\nbandwidth_gb_s = 900\n")
    with pytest.raises(UserError, match="cannot compute"):
        load_machine(str(file))
    with pytest.raises(UserError, match="rtx5090"):
        load_machine("b9000")
