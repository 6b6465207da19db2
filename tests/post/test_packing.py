"""Packing loses nothing, mixes nothing, and changes no document's loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.small_models import make_model

from shoal.kernels.reference import IGNORED
from shoal.model import Transformer
from shoal.post.losses import row_logprobs, row_losses
from shoal.post.packing import Text, best_fit, make_row, make_rows

lengths = st.lists(st.integers(1, 50), max_size=60)


@given(lengths)
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(sizes: list[int]) -> None:
    bins = best_fit(sizes, 50)
    assert sorted(i for items in bins for i in items) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in items) <= 50 for items in bins)


@given(lengths.filter(bool))
def test_no_two_bins_fit_into_one(sizes: list[int]) -> None:
    totals = sorted(sum(sizes[i] for i in items) for items in best_fit(sizes, 50))
    assert len(totals) < 2 or totals[0] + totals[1] > 50


def test_an_item_longer_than_a_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        best_fit([3, 9], 8)


def random_texts(sizes: list[int], seed: int = 0) -> list[Text]:
    draw = np.random.default_rng(seed)
    return [Text(draw.integers(0, 64, size + 1), draw.random(size + 1) < 0.7) for size in sizes]


def test_targets_are_the_next_learnt_tokens_of_the_same_document() -> None:
    texts = random_texts([5, 1, 3])
    row = make_row(texts, depth=2)
    first = 0
    for text in texts:
        for i in range(text.length):
            for k, targets in enumerate([row.targets, *row.mtp_targets], 1):
                inside = i + k <= text.length and text.learnt[i + k]
                assert targets[first + i] == (text.ids[i + k] if inside else IGNORED)
            for k, ids in enumerate(row.mtp_ids, 1):
                assert ids[0, first + i] == text.ids[min(i + k, text.length)]
        first += text.length


@pytest.mark.parametrize("kind", ["v3", "v2", "llama"])
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=8))
@settings(max_examples=10)
def test_packing_changes_no_documents_loss(kind: str, sizes: list[int]) -> None:
    model, texts = make_model(kind), random_texts(sizes)
    with torch.no_grad():
        packed = [row_logprobs(model, row)[0] for row in make_rows(texts, 64)]
        order = [i for items in best_fit([text.length for text in texts], 64) for i in items]
        alone = [row_logprobs(model, make_row([texts[i]]))[0] for i in order]
    together, apart = torch.cat(packed), torch.cat(alone)
    assert together.shape == apart.shape
    assert torch.allclose(together, apart, atol=1e-5)
    # The loss that training minimises is the same sum.
    rows = make_rows(texts, 64)
    nats = sum(float(row_losses(model, row, 1, 0.0, 0.0).nats.detach()) for row in rows)
    assert abs(nats + float(together.sum())) < 1e-3


def test_a_step_has_the_same_gradient_however_it_is_packed() -> None:
    texts = random_texts([9, 4, 17, 2, 8, 8])

    def gradients(capacity: int) -> list[torch.Tensor]:
        model: Transformer = make_model("v3").train()
        rows = make_rows(texts, capacity, depth=1)
        learnt = sum(row.learnt for row in rows)
        for row in rows:
            row_losses(model, row, learnt, 0.0, 0.0).total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(17), gradients(64), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
