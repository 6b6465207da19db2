"""Bits per byte: every token is scored once, with the context that was promised."""

from __future__ import annotations

import lzma
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.data import PreparedData, Tokenizer, TokenShards, train_tokenizer
from shoal.model import Transformer, init_weights
from shoal.runtime import Machine
from shoal.train.likelihood import Document, held_out, likelihood, windows
from shoal.train.summary import xz_bits_per_byte

MACHINE = Machine(torch.device("cpu"), "fp32", 1, 1.0, "test")


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_score_every_token_once_with_enough_context(size: int, length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, length - 1))
    lookback = data.draw(st.integers(0, 9))
    document = np.arange(size)
    scored: list[int] = []
    for number, (window, skip, before) in enumerate(windows(document, length, overlap, lookback)):
        assert before.tolist() == document[max(window[0] - lookback, 0) : window[0]].tolist()
        assert len(window) <= length + 1
        assert (np.diff(window) == 1).all()
        targets = window[1 + skip :]
        assert len(targets) > 0
        scored += targets.tolist()
        if number:
            assert skip >= overlap, "tokens before the first target, which are not scored again"
    assert scored == list(range(1, size))


@pytest.fixture(scope="module")
def model() -> Transformer:
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "kv_lora_rank": 16}
    shape |= {"num_attention_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4}
    model = Transformer(ModelConfig(**shape, num_experts_per_tok=2, moe_intermediate_size=16, initializer_range=0.3))
    init_weights(model, 0)
    return model


def documents(lengths: list[int]) -> list[Document]:
    draw = np.random.default_rng(0)
    return [(draw.integers(0, 64, length), 3 * length) for length in lengths]


@torch.no_grad()
def naive(model: Transformer, tokens: np.ndarray, length: int, overlap: int) -> float:
    """Nats of one document: each token from logits of the window that scores it, one window at a time."""
    total, start, scored = 0.0, 0, 0
    while scored < len(tokens) - 1:
        ids = torch.from_numpy(tokens[start : start + length])[None]
        log_probabilities = model.logits(model(ids).hidden)[0].log_softmax(-1)
        for position in range(scored, min(start + length, len(tokens) - 1)):
            total -= float(log_probabilities[position - start, tokens[position + 1]])
            scored = position + 1
        start = scored - overlap
    return total


@pytest.mark.parametrize(("window", "overlap"), [(8, 4), (8, 0), (8, 7), (200, 100)])
@pytest.mark.parametrize("batch_tokens", [1, 30, 8192])
def test_batches_give_what_single_windows_give(model: Transformer, window: int, overlap: int, batch_tokens: int) -> None:
    texts = documents([2, 21, 9, 10, 8, 1])
    told: list[int] = []
    result = likelihood(model, MACHINE, iter(texts), window=window, overlap=overlap, batch_tokens=batch_tokens, progress=told.append)
    expected = sum(naive(model, tokens, window, overlap) for tokens, _ in texts)
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.tokens == sum(told) == sum(len(tokens) - 1 for tokens, _ in texts)
    assert result.bytes == 3 * sum(len(tokens) for tokens, _ in texts)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / result.bytes, rel=1e-5)
    assert result.nats_per_token == pytest.approx(expected / result.tokens, rel=1e-5)


def test_scoring_leaves_the_model_in_its_mode(model: Transformer) -> None:
    for training in (True, False):
        model.train(training)
        likelihood(model, MACHINE, documents([5]), window=4)
        assert model.training is training


def prepared(tokenizer: Tokenizer, lengths: list[int]) -> PreparedData:
    ends = np.cumsum([0, *lengths])
    shards = TokenShards(np.arange(ends[-1], dtype=np.uint16), ends, np.array([2 * length for length in lengths]))
    return PreparedData(tokenizer, shards, shards, "")


def test_held_out_documents_are_spread_over_the_whole_text() -> None:
    tokenizer = train_tokenizer(["a b c"], 300)
    data = prepared(tokenizer, [10] * 20)
    assert len(held_out(data, 10**6)) == 20
    few = held_out(data, 50)
    assert [int(tokens[0]) for tokens, _ in few] == [0, 40, 80, 120, 160]
    assert all(len(tokens) == 10 and size == 20 for tokens, size in few)


def test_without_a_begin_of_text_token_the_first_token_is_scored_too() -> None:
    tokenizer = train_tokenizer(["a b c"], 300)
    del tokenizer.config["bos_token"]
    assert tokenizer.bos_id is None
    ((tokens, _),) = held_out(prepared(tokenizer, [5]), 100)
    assert tokens.tolist() == [tokenizer.eos_id, 0, 1, 2, 3, 4]


def test_xz_is_measured_on_the_texts_one_after_the_other() -> None:
    texts = ["hello world, hello fish\n" * 20, "été 😀\n" * 30]
    data = "".join(texts).encode()
    assert xz_bits_per_byte(texts) == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert xz_bits_per_byte(texts) < 8


def test_long_documents_are_cut_to_what_was_asked_for() -> None:
    tokenizer = train_tokenizer(["a b c"], 300)
    few = held_out(prepared(tokenizer, [200, 4, 200]), 40)
    assert [len(tokens) for tokens, _ in few] == [40]
    tokens, size = few[0]
    assert size == sum(len(tokenizer.token_bytes(token)) for token in tokens.tolist() if token != tokenizer.bos_id)
