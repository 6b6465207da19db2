"""A runner without a model, and what must hold of an engine's pages at any time.

The cache entry of a position is a hash of the entry before it and its token, read through the page table: whoever is given a wrong
page, or has its page overwritten, goes on with other tokens than `continuation` says. An MTP entry is the hash of the entry and
the next token, which is what the main model will find at the next position: wrong ones among those that the module sees are counted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.engine import PAGE, Batch, Engine, Forward
from shoal.engine.runner import guess_step_by_step

BITS = 20
"""Entries are integers that fp32 holds exactly."""


def mix(entry: int, token: int) -> int:
    value = (entry * 0x9E3779B1 + (token + 1) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return (value ^ (value >> 13)) & ((1 << BITS) - 1)


def continuation(prompt: list[int], count: int, vocab_size: int) -> list[int]:
    """The greedy answer."""
    entry = 0
    for token in prompt:
        entry = mix(entry, token)
    answer: list[int] = []
    for _ in range(count):
        answer.append(mix(entry, -7) % vocab_size)
        entry = mix(entry, answer[-1])
    return answer


class FakeRunner:
    """See above. One guess in `wrong_every` is wrong."""

    device = torch.device("cpu")
    natural_cache = "fp32"

    def __init__(self, vocab_size: int = 97, context: int = 400, mtp: bool = True, wrong_every: int = 3) -> None:
        self.config = ModelConfig(
            vocab_size=vocab_size, num_hidden_layers=3, max_position_embeddings=context, num_nextn_predict_layers=int(mtp)
        )
        self._wrong_every = wrong_every
        self.wrong_mtp_entries = 0
        self.draft_passes = 0
        self.forward_tokens = 0

    def allocate(self, pages: int, cache: str) -> None:
        self._cache = np.full((2, pages, PAGE), -1, np.int64)

    def _walk(self, batch: Batch) -> list[tuple[int, int, int, int | None]]:
        """Row, page and slot of every position, and its place before it."""
        starts, rows = batch.starts.tolist(), []
        for s in range(len(starts) - 1):
            for i in range(starts[s], starts[s + 1]):
                rows.append((i, s, int(batch.positions[i]), None))
        return rows

    def _entry(self, layer: int, batch: Batch, sequence: int, position: int) -> int:
        return int(self._cache[layer, int(batch.tables[sequence, position // PAGE]), position % PAGE])

    def forward(self, batch: Batch) -> Forward:
        hidden = np.zeros((len(batch.ids), 1), np.float32)
        self.forward_tokens += len(batch.ids)
        for i, s, position, _ in self._walk(batch):
            before = self._entry(0, batch, s, position - 1) if position else 0
            entry = mix(before, int(batch.ids[i]))
            self._cache[0, int(batch.tables[s, position // PAGE]), position % PAGE] = entry
            hidden[i] = entry
        experts = torch.from_numpy((hidden.astype(np.int64) % 16)[None].repeat(2, 0))
        return Forward(torch.from_numpy(hidden), experts)

    def logits(self, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        for row, entry in enumerate(hidden[:, 0].tolist()):
            logits[row, mix(int(entry), -7) % self.config.vocab_size] = 9.0
        return logits

    guess = guess_step_by_step

    def draft(self, batch: Batch, hidden: Tensor, next_ids: Tensor) -> Tensor:
        self.draft_passes += 1
        out = np.zeros((len(batch.ids), 1), np.float32)
        for i, s, position, _ in self._walk(batch):
            now = int(hidden[i, 0])
            if now == self._entry(0, batch, s, position):
                seen = self._cache[:, batch.tables[s, : position // PAGE + 1].numpy()].reshape(2, -1)
                self.wrong_mtp_entries += int((seen[1, :position] != seen[0, 1 : position + 1]).sum())
            ahead = mix(now, int(next_ids[i]))
            self._cache[1, int(batch.tables[s, position // PAGE]), position % PAGE] = ahead
            out[i] = ahead + 1 if self._wrong_every and ahead % self._wrong_every == 0 else ahead
        return torch.from_numpy(out)

    def copy_page(self, source: int, target: int) -> None:
        self._cache[:, target] = self._cache[:, source]


def check_pages(engine: Engine) -> None:
    """Every page is free, idle or held, by as many sequences as it says."""
    pool, scheduler = engine.pool, engine.scheduler
    held: dict[int, int] = {}
    for sequence in scheduler.running:
        assert len(set(sequence.pages)) == len(sequence.pages)
        assert sequence.table[: len(sequence.pages)].tolist() == sequence.pages
        assert len(sequence.pages) * PAGE >= sequence.computed
        for page in sequence.pages:
            held[page] = held.get(page, 0) + 1
    assert not any(sequence.pages for sequence in scheduler.waiting)
    assert {page: pool._holders[page] for page in range(pool.pages) if pool._holders[page]} == held
    free, idle = pool._free, list(pool._idle)
    assert sorted([*free, *idle, *held]) == list(range(pool.pages))
    assert set(idle) <= set(pool._by_page)
    assert not set(free) & set(pool._by_page)
    assert sum(map(len, pool._after.values())) == len(pool._by_page)
    if not engine.has_work:
        assert pool.in_use == 0
