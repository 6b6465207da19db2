"""Repetitions against a search by hand, and what a model makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.config.model import REPEAT_LENGTHS
from shoal.kernels import reference
from shoal.kernels.repeats import AGAIN, ONCE, OTHERWISE, find_repeats
from shoal.model import Documents, Transformer, init_weights
from shoal.model.repeats import NOTHING, Repeats

END = 1
SHAPE: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2, "model_type": "llama",
    "n_routed_experts": None, "initializer_range": 0.2, "eos_token_id": END,
}  # fmt: skip
TEXT = st.lists(st.integers(1, 4), min_size=2, max_size=40)


def finder(window: int) -> Repeats:
    return Repeats(ModelConfig(**SHAPE, repeat_window=window))


def by_hand(text: list[int], window: int) -> list[tuple[int, int]]:
    """The token that followed, and the kind."""
    found = []
    for at in range(len(text)):
        best = (0, 0)
        for number, length in enumerate(REPEAT_LENGTHS):
            followed = []
            for earlier in range(at - 1, max(at - window, length - 1) - 1, -1):
                same = text[earlier - length + 1 : earlier + 1] == text[at - length + 1 : at + 1]
                if same and END not in text[earlier:at]:
                    followed.append(text[earlier + 1])
            if followed:
                state = ONCE if len(followed) == 1 else AGAIN if followed[0] == followed[1] else OTHERWISE
                best = (followed[0], 1 + 3 * number + state)
        found.append(best)
    return found


@given(TEXT, st.integers(1, 50))
def test_the_latest_of_the_longest_repetitions_of_the_same_text_is_found(text: list[int], window: int) -> None:
    found = finder(window).find(torch.tensor([text]), None)
    assert [tuple(row) for row in found[0].tolist()] == by_hand(text, window)


def test_a_model_without_an_end_of_text_looks_through_all_of_it() -> None:
    text = [2, 3, END, 2]
    endless = Repeats(ModelConfig(**{**SHAPE, "eos_token_id": None}, repeat_window=9))
    assert endless.find(torch.tensor([text]), None)[0, -1].tolist() == [3, 1 + ONCE]
    assert finder(9).find(torch.tensor([text]), None)[0, -1].tolist() == [0, 0]


@given(TEXT, st.integers(1, 12), st.data())
def test_it_is_the_same_wherever_a_text_is_cut(text: list[int], window: int, data: st.DataObject) -> None:
    module = finder(window)
    cut = data.draw(st.integers(1, len(text) - 1))
    lookback = ModelConfig(**SHAPE, repeat_window=window).looks_back
    before = torch.tensor([[NOTHING] * lookback + text[:cut]])[:, -lookback:]
    whole = module.find(torch.tensor([text]), None)
    assert module.find(torch.tensor([text[cut:]]), before).equal(whole[:, cut:])


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 40), st.integers(1, 3))
def test_the_kernel_is_its_reference(seed: int, size: int, window: int, tokens: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, tokens, (3, size), generator=draw)
    numbers = torch.randint(0, 8, (3, size), generator=draw).eq(0).cumsum(1)
    fresh = int(torch.randint(1, size + 1, (), generator=draw))
    expected = reference.find_repeats(texts, numbers, fresh, window, REPEAT_LENGTHS)
    assert find_repeats(texts, numbers, fresh, window, REPEAT_LENGTHS).equal(expected)


@given(st.lists(TEXT, min_size=2, max_size=4))
def test_packed_texts_are_searched_by_themselves(texts: list[list[int]]) -> None:
    packed = torch.tensor([[token for text in texts for token in text]])
    begins = Documents.of([len(text) for text in texts]).positions == 0
    alone = [finder(9).find(torch.tensor([text]), None) for text in texts]
    assert finder(9).find(packed, None, begins).equal(torch.cat(alone, dim=1))


def model_of(**changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**SHAPE, repeat_window=30, **changes))
    init_weights(model, 0)
    return model


def test_a_repetition_makes_what_followed_likely() -> None:
    model = model_of()
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
    output = model(ids)
    chances = model.logits(output.hidden, output.keys).softmax(-1)[0]
    assert chances[-1, 8] > 0.5
    assert chances[4].max() < 0.3, "nothing is repeated there"


def test_gradients_are_those_of_plain_torch() -> None:
    model = model_of()
    assert model.model.repeats is not None
    watched = [model.lm_head.weight, model.model.repeats.trust, model.model.repeats.trust_in_kind, model.model.embed_tokens.weight]
    ids, targets = torch.tensor([[5, 6, 5, 6, 5, 7]]), torch.tensor([[6, 5, -100, 5, 7, 2]])
    output = model(ids)
    loss = model.cross_entropy(output.hidden, targets, output.keys).loss
    found = torch.autograd.grad(loss, watched)
    output = model(ids)
    expected_loss = torch.nn.functional.cross_entropy(model.logits(output.hidden, output.keys)[0], targets[0], reduction="sum")
    torch.testing.assert_close(loss, expected_loss)
    for one, other in zip(found, torch.autograd.grad(expected_loss, watched), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"repeat_window": -1}, "must be 0"),
        ({"repeat_window": 5, "logit_softcap": 3.0}, "neither logit_softcap"),
        ({"repeat_window": 5, "model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, "multi-token prediction"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ModelConfig(**{**SHAPE, **changes}).validate()
