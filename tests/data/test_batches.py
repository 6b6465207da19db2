"""Batches: every token once an epoch, the same for every number of ranks, and exact after a resume."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.data import Batches, TokenShards


def shards_of(lengths: list[int]) -> TokenShards:
    """Documents whose tokens are all different: 0, 1, 2 ... over the whole corpus."""
    documents = np.cumsum([0, *lengths])
    return TokenShards(np.arange(documents[-1], dtype=np.uint32), documents, np.array(lengths))


settings_of_batches = {
    "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=40),
    "length": st.integers(1, 16),
    "batch": st.integers(1, 6),
    "lookahead": st.integers(1, 4),
    "seed": st.integers(-3, 2**40),
}


def make(lengths: list[int], length: int, batch: int, lookahead: int, seed: int, rank: int = 0, world: int = 1) -> Batches:
    assume((sum(lengths) - lookahead) // length >= batch)
    return Batches(shards_of(lengths), length, batch, seed, rank, world, lookahead)


@given(**settings_of_batches)
def test_every_token_once_an_epoch(lengths: list[int], length: int, batch: int, lookahead: int, seed: int) -> None:
    batches = make(lengths, length, batch, lookahead, seed)
    total = sum(lengths)
    steps = (total - lookahead) // length // batch
    ends = {int(end) - 1 for end in np.cumsum(lengths)}
    for epoch in range(2):
        rows = torch.cat([batches.next() for _ in range(steps)])
        assert batches.epoch == epoch
        assert rows.dtype == torch.int64
        assert rows.shape == (steps * batch, length + lookahead)
        own = rows[:, :length].flatten().tolist()
        assert len(set(own)) == len(own), "a token came twice"
        assert total - len(own) < batch * length + length + lookahead, "more than a partial batch was dropped"
        for row in rows.tolist():
            assert all(after == before + 1 or before in ends for before, after in pairwise(row)), "a row does not follow its documents"
        following = dict(zip(rows[:, length - 1].tolist(), rows[:, length:].tolist(), strict=True))
        begins = {row[0]: row for row in rows.tolist()}
        for ahead in following.values():
            if ahead[0] in begins:
                expected = begins[ahead[0]][:lookahead]
                assert ahead[: len(expected)] == expected, "the lookahead is not what the next row begins with"


@given(**settings_of_batches, world=st.integers(1, 4), steps=st.integers(1, 12))
def test_ranks_share_the_same_batches(
    lengths: list[int], length: int, batch: int, lookahead: int, seed: int, world: int, steps: int
) -> None:
    batch *= world
    alone = make(lengths, length, batch, lookahead, seed)
    ranks = [make(lengths, length, batch, lookahead, seed, rank, world) for rank in range(world)]
    for _ in range(steps):
        assert torch.equal(alone.next(), torch.cat([rank.next() for rank in ranks]))
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


@given(**settings_of_batches, world=st.integers(1, 3), before=st.integers(0, 12))
def test_resume_goes_on_with_the_exact_next_batch(
    lengths: list[int], length: int, batch: int, lookahead: int, seed: int, world: int, before: int
) -> None:
    batch *= world
    whole = make(lengths, length, batch, lookahead, seed)
    for _ in range(before):
        whole.next()
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = [make(lengths, length, batch, lookahead, seed + 1, rank, world) for rank in range(world)]
    for rank in resumed:
        rank.load_state_dict(state)
    for _ in range(5):
        assert torch.equal(whole.next(), torch.cat([rank.next() for rank in resumed]))


def test_order_depends_on_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        batches = Batches(shards_of([37] * 30), 10, 4, seed)
        return [[batches.next()[0, 0].item() for _ in range(27)] for _ in range(2)]

    first, second = epochs(0)
    assert epochs(0) == [first, second]
    assert first != second
    assert first != epochs(1)[0]


def test_a_batch_mixes_documents() -> None:
    lengths = [1000] * 20
    batch = Batches(shards_of(lengths), 10, 32, seed=0).next()
    assert len(set((batch[:, 0] // 1000).tolist())) > 10


def test_too_few_tokens_says_how_many_are_needed() -> None:
    shards = shards_of([50, 30])
    Batches(shards, 10, 7, seed=0, lookahead=10)
    with pytest.raises(UserError, match=r"holds 80 tokens, but one batch of 8 sequences of 10 needs 81"):
        Batches(shards, 10, 8, seed=0)
    with pytest.raises(UserError, match=r"holds about 160 tokens, but one batch of 8 sequences of 10 from each of 2 parts needs 162"):
        Batches(shards, 10, 8, seed=0, parts=2)
    with pytest.raises(UserError, match="holds 80 tokens"):
        Batches(shards, 100, 1, seed=0)


def test_batch_that_does_not_divide_and_state_of_other_data() -> None:
    shards = shards_of([50, 30])
    with pytest.raises(UserError, match="does not divide among 2 processes"):
        Batches(shards, 10, 3, seed=0, world=2)
    state = Batches(shards, 10, 2, seed=0).state_dict()
    with pytest.raises(UserError, match="sequence_length 10, now it is 9"):
        Batches(shards_of([72]), 9, 2, seed=0).load_state_dict({**state, "num_rows": 7})
    with pytest.raises(UserError, match="num_rows"):
        Batches(shards_of([500]), 10, 2, seed=0).load_state_dict(state)


@given(**settings_of_batches, lookback=st.integers(1, 30))
def test_what_stands_in_front_of_a_row_is_what_the_stream_has_there(
    lengths: list[int], length: int, batch: int, lookahead: int, seed: int, lookback: int
) -> None:
    plain = make(lengths, length, batch, lookahead, seed)
    wide = Batches(shards_of(lengths), length, batch, seed, lookahead=lookahead, lookback=lookback)
    steps = (sum(lengths) - lookahead) // length // batch
    rows = [row.tolist() for _ in range(steps) for row in wide.next()]
    assert [row[lookback:] for row in rows] == [row.tolist() for _ in range(steps) for row in plain.next()]
    ends = {int(end) - 1 for end in np.cumsum(lengths)}
    for row in rows:
        there = [token for token in row if token >= 0]
        assert row == [-1] * (len(row) - len(there)) + there
        assert all(after == before + 1 or before in ends for before, after in pairwise(there))
