from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig, ParallelConfig, SampledSoftmaxConfig, TrainConfig, UserError
from shoal.config.parallel import PIPELINE_SCHEDULES
from shoal.parallel.layout import Layout, layout_of, nearest_layout, problem
from shoal.parallel.pipeline import home_of, layers_of, stages_of

MODEL = ModelConfig(num_hidden_layers=8, n_routed_experts=16, num_experts_per_tok=2)


def config(batch: int = 16, micro: int | None = None, **layout: Any) -> TrainConfig:
    return TrainConfig(steps=1, batch_size=batch, micro_batch_size=micro, model=MODEL, parallel=ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("world", "run", "said"),
    [
        (8, config(pipeline=3), "pipeline 3 does not divide 8.*nearest.*pipeline 2, parallel.expert 1"),
        (8, config(expert=3), "expert 3 does not divide 16 experts.*expert 2"),
        (8, config(pipeline=2, expert=8), "expert 8 does not divide 4 data-parallel.*nearest.*pipeline 1, parallel.expert 8"),
        (6, config(expert=2), "16 sequences does not divide among 6.*nearest.*pipeline 3, parallel.expert 2"),
        (32, config(), "no layout of 32 processes works"),
        (8, config(expert=4, per_node=3), "expert 4 does not fill nodes of 3"),
        (2, config(overlap=True), "overlap hides the travel"),
        (2, config(expert=2, overlap=True, micro=1), "halves micro-batches, but they hold 1"),
        (2, config(pipeline=2, expert=2, overlap=True), "expert 2 does not divide 1 data-parallel.*pipeline 1, parallel.expert 2"),
        (4, config(pipeline=2, expert=2, overlap=True), "overlap and parallel.pipeline exclude each other.*pipeline 1, parallel.expert 2"),
        (8, config(batch=20, micro=2, expert=2, overlap=True), "20 sequences does not divide among 8.*no layout of 8 processes works"),
        (4, config(batch=4, pipeline=4, schedule="zbv"), "needs 8 micro-batches a step, but there are 4"),
        (8, config(pipeline=8, schedule="zbv"), "cuts 16 stages, but the model has 8 layers"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_that_can(world: int, run: TrainConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layout_of(run, world)


def test_a_dense_model_has_no_experts_to_divide() -> None:
    dense = replace(config(expert=2), model=ModelConfig(n_routed_experts=None))
    with pytest.raises(UserError, match="the model has no experts"):
        layout_of(dense, 2)


def test_stages_pass_hidden_states_alone() -> None:
    more = replace(config(batch=4, pipeline=2), model=ModelConfig(ngram_order=3))
    with pytest.raises(UserError, match=r"pipeline passes hidden states alone.*ngram_order is 3: the nearest layout .*pipeline 1,"):
        layout_of(more, 2)


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
@pytest.mark.parametrize(("modules", "tied", "serves"), [(2, False, "2 MTP modules cannot"), (1, True, "1 MTP module and the head cannot")])
def test_gradients_put_off_need_an_embedding_with_one_use(schedule: str, modules: int, tied: bool, serves: str) -> None:
    run = config(pipeline=2, schedule=schedule)
    model = replace(MODEL, num_nextn_predict_layers=modules, tie_word_embeddings=tied)
    with pytest.raises(UserError, match=f"{serves}: the nearest layout .*pipeline 2, parallel.expert 1, parallel.schedule 1f1b"):
        layout_of(replace(run, model=model), 2)
    assert problem(replace(run, model=replace(model, num_nextn_predict_layers=1 - tied)), 2, 2) is None


@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 8),
    st.sampled_from(["1f1b", "interleaved", "zbv", "dualpipev"]),
    st.integers(0, 2),
    st.booleans(),
)
def test_the_nearest_layout_works(
    world: int, pipeline: int, expert: int, per_node: int, schedule: str, modules: int, overlap: bool
) -> None:
    run = config(batch=48, pipeline=pipeline, expert=expert, schedule=schedule, overlap=overlap)
    run = replace(run, model=replace(MODEL, num_nextn_predict_layers=modules))
    nearest = nearest_layout(run, world, per_node)
    if problem(run, world, per_node) is None:
        assert nearest is not None
        assert (nearest.pipeline, nearest.expert, nearest.schedule) == (pipeline, expert, schedule)
    elif nearest is not None:
        assert problem(replace(run, parallel=nearest), world, per_node) is None
        assert not (overlap and nearest.pipeline > 1)


@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_every_layer_lies_on_one_stage(schedule: str, pipeline: int) -> None:
    layout = Layout(pipeline, pipeline, schedule=schedule)
    assert sorted(stage for process in range(pipeline) for stage in stages_of(layout, process)) == list(range(layout.stages))
    assert [layer for stage in range(layout.stages) for layer in layers_of(9, layout.stages, stage)] == list(range(9))
    ends = home_of(layout, 0), home_of(layout, layout.stages - 1)
    assert ends == ((0, 0) if schedule in ("zbv", "dualpipev") else (0, pipeline - 1))


def test_a_machine_has_no_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = config()
    with pytest.raises(UserError, match="2 processes on a machine with 1 GPU: start 1 there, or add --device cpu"):
        layout_of(run, 2)
    assert layout_of(run, 2, 1).world == 2
    assert layout_of(replace(run, device="cpu"), 2).world == 2
    assert layout_of(run, 1).world == 1


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (replace(config(), qat="int4"), "qat is for a single process"),
        (replace(config(), memory_limit="4G"), "memory_limit is for a single process"),
        (replace(config(), sampled_softmax=SampledSoftmaxConfig(drawn=64)), "sampled_softmax is for a single process"),
        (replace(config(), model=replace(MODEL, count_order=3)), "counted by a single process"),
    ],
)
def test_what_only_one_process_can_do_is_refused_before_any_is_started(run: TrainConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layout_of(run, 2)
    assert layout_of(run, 1).world == 1
