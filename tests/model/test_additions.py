"""What a model may look up beside its embedding: n-grams, values, and what layers mix in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.model import Documents, Transformer, init_weights
from shoal.model.ngrams import Ngrams

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": None, "initializer_range": 0.2,
}  # fmt: skip
ADDITIONS: dict[str, dict[str, Any]] = {
    "ngrams": {"ngram_order": 4, "ngram_rows": 97},
    "skip": {"embedding_skip": True},
    "values": {"value_embedding": True},
    "convolution": {"convolution": 3},
}
ALL: dict[str, Any] = {key: value for changes in ADDITIONS.values() for key, value in changes.items()}


def make(**changes: Any) -> Transformer:
    """A model whose additions are at work, not where they start."""
    model = Transformer(ModelConfig(**{**SHAPE, **changes}))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("ngrams", "embedding_skip", "value_embedding", "convolution")):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
@pytest.mark.parametrize("changes", ADDITIONS.values(), ids=list(ADDITIONS))
def test_a_model_starts_as_the_one_without(kind: str, changes: dict[str, Any]) -> None:
    ids = torch.arange(20)[None]
    plain, more = (Transformer(ModelConfig(**{**SHAPE, "model_type": kind, **extra})) for extra in ({}, changes))
    init_weights(plain, 0)
    init_weights(more, 0)
    more.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(more(ids).hidden, plain(ids).hidden)


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
@pytest.mark.parametrize("changes", [*ADDITIONS.values(), ALL], ids=[*ADDITIONS, "all"])
def test_no_token_sees_a_later_one(kind: str, changes: dict[str, Any]) -> None:
    model = make(model_type=kind, **changes)
    ids = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(0))
    whole = model(ids).hidden
    for length in (1, 2, 5, 23):
        torch.testing.assert_close(model(ids[:, :length]).hidden, whole[:, :length], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [*ADDITIONS.values(), ALL], ids=[*ADDITIONS, "all"])
def test_packed_documents_give_what_they_give_alone(changes: dict[str, Any]) -> None:
    model = make(**changes)
    texts = [torch.randint(61, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 1, 9)]
    packed = model(torch.cat(texts)[None], documents=Documents.of([len(text) for text in texts])).hidden[0]
    alone = torch.cat([model(text[None]).hidden[0] for text in texts])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(0, 60), min_size=2, max_size=20), st.data())
def test_rows_depend_on_the_ngram_alone_wherever_a_text_is_cut(text: list[int], data: st.DataObject) -> None:
    table = Ngrams(ModelConfig(**SHAPE, ngram_order=4, ngram_rows=1000))
    ids = torch.tensor([text])
    positions = torch.arange(len(text))[None]
    whole = table.keys(ids, positions, None)
    cut = data.draw(st.integers(1, len(text) - 1))
    before = torch.full((1, 3), 7)  # where the text begins later than three tokens ago, these are not seen
    known = ids[:, max(0, cut - 3) : cut]
    before[:, 3 - known.shape[1] :] = known
    rest = table.keys(ids[:, cut:], positions[:, cut:], before)
    for one, other in zip(whole, rest, strict=True):
        assert one[:, cut:].equal(other)
    for place, rows in enumerate(whole):
        assert rows.min() >= place * 1000
        assert rows.max() < (place + 1) * 1000


def test_ngrams_spread_over_their_rows() -> None:
    table = Ngrams(ModelConfig(**SHAPE, ngram_order=2, ngram_rows=4096))
    pairs = torch.cartesian_prod(torch.arange(61), torch.arange(61))
    rows = table.keys(pairs, torch.arange(2)[None], None)[0][:, 1]
    # 3721 pairs in 4096 rows: of random ones 1 - exp(-3721 / 4096) = 60% of the rows would be taken
    assert len(rows.unique()) > 0.55 * 4096


@pytest.mark.parametrize("changes", [{"ngram_order": 1}, {"ngram_order": 9}, {"ngram_order": 2, "ngram_rows": 0}, {"convolution": -1}])
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(reversed(changes))):
        ModelConfig(**{**SHAPE, **changes}).validate()
