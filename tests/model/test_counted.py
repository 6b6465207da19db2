"""Counted n-grams against counting by hand, and what a model makes of them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.kernels import reference
from shoal.model import Documents, Transformer, init_weights
from shoal.model.counted import CountedNgrams, Counts, _discounts, context_keys, count_ngrams, token_bits

V = 11
TEXTS = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=12), min_size=1, max_size=6)
SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2, "model_type": "llama",
    "n_routed_experts": None, "initializer_range": 0.2,
}  # fmt: skip


def count(texts: list[list[int]], order: int) -> Counts:
    return count_ngrams(np.concatenate([np.array(text, np.uint16) for text in texts]), np.cumsum([0, *map(len, texts)]), order, V)


def counted(texts: list[list[int]], order: int) -> CountedNgrams:
    counts = count(texts, order)
    module = CountedNgrams(ModelConfig(**SHAPE, count_order=order, count_entries=len(counts.entries)))
    module.fill(counts)
    torch.nn.init.zeros_(module.trust)
    torch.nn.init.zeros_(module.trust_in_length)
    return module


def by_hand(texts: list[list[int]], order: int) -> dict[tuple[int, ...], int]:
    """Of the longest n-grams the documents; of shorter ones the tokens before them, and documents that they begin."""
    seen: defaultdict[tuple[int, ...], set[tuple[str, int]]] = defaultdict(set)
    for number, text in enumerate(texts):
        for length in range(2, order + 2):
            for begin in range(len(text) - length + 1):
                inside = length <= order and begin > 0
                seen[tuple(text[begin : begin + length])].add(("after", text[begin - 1]) if inside else ("in", number))
    return {ngram: len(found) for ngram, found in seen.items()}


def model_of(texts: list[list[int]], order: int) -> Transformer:
    counts = count(texts, order)
    model = Transformer(ModelConfig(**SHAPE, count_order=order, count_entries=len(counts.entries)))
    init_weights(model, 0)
    assert model.model.counted is not None
    model.model.counted.fill(counts)
    return model


@given(TEXTS, st.integers(1, 4))
def test_counts_are_those_of_counting_by_hand(texts: list[list[int]], order: int) -> None:
    counts, bits = count(texts, order), token_bits(V)
    expected = by_hand(texts, order)
    assert bool((counts.entries.diff() > 0).all())
    found = dict(zip(counts.entries.tolist(), counts.counts.tolist(), strict=True))
    for ngram, number in expected.items():
        context = torch.tensor([ngram[:-1]])
        *_, key = context_keys(context, torch.arange(context.shape[1])[None], None, context.shape[1], bits)
        assert found.pop(int(key[0, -1]) << bits | ngram[-1]) == number
    assert not found, "nothing else was counted"


@given(TEXTS, st.integers(1, 4), st.lists(st.integers(0, V - 1), min_size=1, max_size=10))
def test_probabilities_are_interpolated_absolute_discounting(texts: list[list[int]], order: int, ids: list[int]) -> None:
    if max(map(len, texts)) < 2:
        return
    module, expected = counted(texts, order), by_hand(texts, order)
    text = torch.tensor([ids])
    keys = module.keys(text, torch.arange(len(ids))[None], None)
    probabilities, lengths = module.probabilities(keys)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, len(ids)))
    assert bool((probabilities > 0).all())
    assert module._tables is not None
    tables = module._tables
    for place in range(len(ids)):
        p, longest = tables.base.double().clone(), 0
        for length in range(1, min(order, place + 1) + 1):
            context = tuple(ids[place + 1 - length : place + 1])
            follows = torch.tensor([expected.get((*context, token), 0) for token in range(V)])
            if not follows.sum():
                break
            off = tables.discounts[length - 1].double()[follows.clamp(max=3)]
            p, longest = (follows - off + off.sum() * p) / follows.sum(), length
        torch.testing.assert_close(probabilities[0, place].double(), p, atol=1e-6, rtol=1e-5)
        assert lengths[0, place] == longest
    plain, again = reference.counted_prior(
        tables.entries, tables.counts, tables.token_bits, tables.discounts, tables.base, keys.flatten(0, 1)
    )
    torch.testing.assert_close(probabilities[0], plain, atol=1e-6, rtol=1e-5)
    assert lengths[0].equal(again)


@pytest.mark.parametrize("order", [1, 3, 8])
def test_contexts_of_each_length_are_discounted_by_their_own_counts(order: int) -> None:
    text = [0, 3, 5, 7, 1, 2, 8, 4, 6, 9, 10, 3]
    module = counted([text, text, text[1:], text[2:] + text], order)
    lengths = (module.entries >> 60) + 1
    expected = [_discounts(module.counts[lengths == length]) for length in range(1, order + 1)]
    assert module.filled.discounts.equal(torch.tensor(expected))


@given(st.lists(st.integers(0, V - 1), min_size=2, max_size=20), st.data())
def test_keys_are_the_same_wherever_a_text_is_cut(text: list[int], data: st.DataObject) -> None:
    order = data.draw(st.integers(1, 5))
    ids, positions = torch.tensor([text]), torch.arange(len(text))[None]
    whole = torch.stack(list(context_keys(ids, positions, None, order, 4)), -1)
    cut = data.draw(st.integers(1, len(text) - 1))
    before = torch.tensor([[0] * order + text])[:, cut + 1 : cut + order]
    rest = torch.stack(list(context_keys(ids[:, cut:], positions[:, cut:], before, order, 4)), -1)
    assert rest.equal(whole[:, cut:])


def test_a_model_begins_with_what_was_counted() -> None:
    texts = [[0, 3, 5, 7, 1], [0, 3, 5, 8, 1], [0, 4, 5, 7, 1]]
    model = model_of(texts, 3)
    ids = torch.tensor([[0, 3, 5]])
    output = model(ids)
    assert output.keys is not None
    assert model.model.counted is not None
    prior, _ = model.model.counted(output.keys)
    torch.testing.assert_close(model.logits(output.hidden, output.keys).log_softmax(-1), prior)
    scored = model.cross_entropy(output.hidden, torch.tensor([[3, 5, 7]]), output.keys)
    torch.testing.assert_close(scored.nats, -prior[0, range(3), [3, 5, 7]].sum())


def test_gradients_of_head_hidden_and_trust_are_those_of_plain_torch() -> None:
    model = model_of([[0, 3, 5, 7, 1], [0, 3, 5, 8, 1]], 2)
    assert model.model.counted is not None
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))
    ids, targets = torch.tensor([[0, 3, 5, 2]]), torch.tensor([[3, 5, -100, 7]])
    watched = [model.lm_head.weight, model.model.counted.trust, model.model.counted.trust_in_length, model.model.embed_tokens.weight]
    soft = torch.rand(1, 4, V, generator=torch.Generator().manual_seed(1)).softmax(-1)

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, watched)

    for teacher in (None, (soft, 0.7)):
        output = model(ids)
        found = gradients(model.cross_entropy(output.hidden, targets, output.keys, teacher).loss)
        output = model(ids)
        logprobs = model.logits(output.hidden, output.keys).log_softmax(-1)[0]
        hard = torch.nn.functional.one_hot(targets[0].clamp(min=0), V).float()
        wanted = hard if teacher is None else 0.3 * hard + 0.7 * soft[0]
        expected = gradients(-(wanted * logprobs)[targets[0] >= 0].sum())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_packed_documents_are_looked_up_by_themselves() -> None:
    model = model_of([[0, 3, 5, 7, 1], [0, 3, 5, 8, 1]], 3)
    texts = [[0, 3, 5], [5], [0, 3]]
    packed = model(torch.tensor([[token for text in texts for token in text]]), documents=Documents.of([len(text) for text in texts])).keys
    assert packed is not None
    alone = [model(torch.tensor([text])).keys for text in texts]
    assert packed[0].equal(torch.cat([keys[0] for keys in alone if keys is not None]))


@pytest.mark.parametrize("harm", ["unsorted", "empty", "foreign token", "no count"])
def test_damaged_counts_are_refused(harm: str) -> None:
    module = counted([[0, 3, 5, 7, 1], [0, 3, 5, 8, 1]], 2)
    if harm == "unsorted":
        module.entries = module.entries.flip(0)
    elif harm == "empty":
        module.entries, module.counts = module.entries[:0], module.counts[:0]
    elif harm == "foreign token":
        module.entries = module.entries.clone() | 15
        module.entries = module.entries.unique()
        module.counts = module.counts[: len(module.entries)]
    else:
        module.counts = torch.zeros_like(module.counts)
    with pytest.raises(UserError, match="damaged or were never filled"):
        module(torch.zeros(1, 1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"count_order": 9}, "1 to 8"),
        ({"count_order": -1}, "1 to 8"),
        ({"count_order": 2, "logit_softcap": 30.0}, "softcap"),
        ({"count_order": 2, "num_nextn_predict_layers": 1, "model_type": "deepseek_v3"}, "multi-token prediction"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ModelConfig(**{**SHAPE, **changes}).validate()
