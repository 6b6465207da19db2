"""The runner in plain torch: pages, formats, and that a sequence does not notice its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import make_model

from shoal.engine import Batch, Runner
from shoal.engine.race import Races
from shoal.engine.weights import load_weights, to_transformer
from shoal.formats.huggingface import load_model, save_model
from shoal.model import Transformer

IDS = [3 * i % 61 + 2 for i in range(90)]
SPANS = [(0, 40), (0, 90), (0, 1), (0, 33)]
TABLES = [np.array(pages, np.int32) for pages in ([7, 2], [1, 5, 3], [9], [4, 8])]


@pytest.fixture
def runner(model: Transformer, make_runner: Any) -> Runner:
    made: Runner = make_runner(model)
    made.allocate(10, "fp32")
    return made


def lay_out(spans: list[tuple[int, int]], tables: list[np.ndarray]) -> Batch:
    return Batch.lay_out([IDS[first:end] for first, end in spans], [first for first, _ in spans], tables)


@pytest.mark.parametrize(("stored", "held"), [(torch.float32, "fp32"), (torch.float16, "fp32"), (torch.bfloat16, "bf16")])
def test_no_number_of_a_file_is_rounded(stored: torch.dtype, held: str, model: Transformer, tmp_path: Path) -> None:
    save_model(model, tmp_path, dtype=stored)
    weights = load_weights(tmp_path)
    assert weights.scheme.matrices == held
    wanted = load_model(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in to_transformer(weights).state_dict().items():
        assert tensor.equal(wanted[name]), name


def test_a_batch_is_laid_out_end_to_end() -> None:
    batch = Batch.lay_out([[5, 6, 7], [8]], [31, 64], [np.array([4, 9, 1], np.int32), np.array([2, 3, 6, 5], np.int32)])
    assert batch.ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [31, 32, 33, 64]
    assert batch.starts.tolist() == [0, 3, 4]
    assert batch.tables.tolist() == [[4, 9, 0], [2, 3, 6]]
    assert (batch.ids.dtype, batch.tables.dtype) == (torch.int64, torch.int32)


@torch.no_grad()
def test_pieces_through_pages_give_what_one_pass_gives(runner: Runner, model: Transformer) -> None:
    wanted = model(torch.tensor([IDS]))
    parts = [runner.forward(lay_out([span], [TABLES[1]])) for span in ((0, 30), (30, 31), (31, 70), (70, 90))]
    torch.testing.assert_close(torch.cat([part.hidden for part in parts]), wanted.hidden[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(runner.logits(parts[0].hidden), model.logits(wanted.hidden[0, :30]), atol=1e-4, rtol=1e-4)
    if model.moe_layers:
        chosen = torch.cat([part.experts for part in parts], 1)  # type: ignore[misc]
        main = wanted.routing[: len(chosen)]
        assert torch.equal(chosen.sort(-1).values.long(), torch.cat([stats.indices for stats in main]).sort(-1).values)


def test_neighbours_change_no_bit(runner: Runner) -> None:
    together = runner.forward(lay_out(SPANS, TABLES)).hidden
    alone = [runner.forward(lay_out([span], [table])).hidden for span, table in zip(SPANS, TABLES, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(runner.logits(together), torch.cat([runner.logits(row) for row in together.split(1)]))


@torch.no_grad()
def test_the_mtp_module_drafts_what_a_pass_over_everything_predicts(v3: Transformer, make_runner: Any) -> None:
    runner = make_runner(v3)
    runner.allocate(10, "fp32")
    wanted = v3(torch.tensor([IDS[:-1]]), mtp_ids=[torch.tensor([IDS[1:]])]).mtp_hidden[0][0]
    for first, end in ((0, 40), (40, 41), (41, 89)):
        batch = lay_out([(first, end), (0, 5)], [TABLES[1], TABLES[0]])
        shifted = torch.tensor([*IDS[first + 1 : end + 1], *IDS[1:6]])
        guesses = runner.guess(batch, runner.forward(batch).hidden, shifted, Races([0.0, 0.0], [[1], []]))
        expected = v3.logits(wanted[end - 1 : end])
        torch.testing.assert_close(guesses.logits, expected, atol=1e-4, rtol=1e-4)
        assert guesses.tokens == [expected.argmax(-1).tolist(), []]


def test_a_copied_page_serves_as_well(runner: Runner) -> None:
    runner.forward(lay_out([(0, 89)], [TABLES[1]]))
    wanted = runner.forward(lay_out([(89, 90)], [TABLES[1]])).hidden
    runner.copy_page(5, 6)
    got = runner.forward(lay_out([(89, 90)], [np.array([1, 6, 3], np.int32)])).hidden
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_values_beyond_a_small_format_stay_finite(cache: Any, make_runner: Any) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.blocks[0].self_attn.v_proj.weight.mul_(1e4)
    runner = make_runner(model)
    runner.allocate(4, cache)
    assert runner.forward(lay_out([(0, 40)], [np.array([1, 2], np.int32)])).hidden.isfinite().all()
