"""Counting n-grams of the training text: for models with a counted prior, and to teach models without.

What the network trusts must not know the answers already. So the two halves of the documents are counted each by itself, and a step
studies one half with the counts of the other, in turns. When training is over, a model with a counted prior gets the counts of all.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig, TeacherConfig, TrainConfig, UserError
from ..data import Batches, TokenShards
from ..kernels import CountTables
from ..model import Transformer
from ..model.counted import CountedNgrams, Counts, count_ngrams
from ..runtime import require_memory
from .repetitions import Repetitions

LONG, PIECE = 1 << 16, 1 << 12
"""Tokens of a document that is counted in pieces, and of a piece."""

UNEVEN = 0.05
"""Share of all tokens by which one half may be ahead of the other where documents go to them in turns."""

WITHOUT = "train a model that needs no counts: shoal train default"
"""What to do instead. Sampled softmax and repetitions of a teacher stand on counts, too: more settings than a line has room for."""

COUNTING_BYTES = 200
"""Memory that counting takes for every token."""


def counts_while_training(config: TrainConfig) -> bool:
    """Whether the text is counted. A model that brings its counts along (`--start`) keeps them."""
    return bool(config.teacher.order or (config.model.count_order and not config.model.count_entries))


def in_pieces(text: TokenShards) -> TokenShards:
    """The same tokens with every very long document as many: of a corpus in one file nothing would be in two documents otherwise."""
    bounds = [np.arange(a, b, PIECE if b - a > LONG else b - a) for a, b in pairwise(text.documents.tolist()) if a < b]
    cuts = np.concatenate([*bounds, text.documents[-1:]])
    return TokenShards(text.tokens, cuts, np.zeros(len(cuts) - 1, np.int64))


def halves(text: TokenShards) -> tuple[TokenShards, TokenShards]:
    """Two parts of about as many tokens; copies in memory. Neighbours, which often speak of the same things, are apart, so that one part
    knows something of the other; equal documents are together, or it would know it by heart.

    Raises `UserError` where there are not two documents that differ.
    """
    text = in_pieces(text)
    sums = [zlib.crc32(text.document(i).tobytes()) for i in range(text.num_documents)]
    lengths: Counter[int] = Counter()
    for one, length in zip(sums, np.diff(text.documents).tolist(), strict=True):
        lengths[one] += length
    if len(lengths) < 2:
        raise UserError(f"counting n-grams needs two documents that differ: give more data, or {WITHOUT}")
    part_of: dict[int, int] = {}
    sizes, last = [0, 0], 1
    for one, length in lengths.items():
        if sizes[1 - last] - sizes[last] <= UNEVEN * text.num_tokens:
            last = 1 - last
        part_of[one] = last
        sizes[last] += length

    def part(number: int) -> TokenShards:
        chosen = [i for i, one in enumerate(sums) if part_of[one] == number]
        found = [text.document(i) for i in chosen]
        return TokenShards(np.concatenate(found), np.cumsum([0, *map(len, found)], dtype=np.int64), text.document_bytes[chosen])

    return part(0), part(1)


def count_into(model: Transformer, text: TokenShards) -> float:
    """Give a model with a counted prior the counts of `text`; returns the seconds it took."""
    began = time.perf_counter()
    assert model.model.counted is not None
    model.model.counted.fill(_count(model.config, text))
    return time.perf_counter() - began


def require_enough(text: TokenShards) -> None:
    """Raise `UserError` where there is not enough memory to count `text`."""
    require_memory(COUNTING_BYTES * text.num_tokens, f"counting n-grams of {text.num_tokens:,} tokens", WITHOUT)


def _count(config: ModelConfig, text: TokenShards) -> Counts:
    """Raises `UserError` where there is not enough memory."""
    require_enough(text)
    text = in_pieces(text)
    return count_ngrams(text.tokens, text.documents, config.count_order, config.vocab_size)


class Counting:
    """The counts of both halves, of which `module` has one at a time."""

    def __init__(self, config: TrainConfig, text: TokenShards) -> None:
        began = time.perf_counter()
        if config.model.count_order:  # all of it is counted when training is over: better refused now than then
            require_enough(text)
        shape = replace(config.model, count_order=config.model.count_order or config.teacher.order, num_nextn_predict_layers=0)
        self.module = CountedNgrams(shape)
        """Answers by the counts of one half: the teacher's, until a model's own takes its place."""
        self.texts = halves(text)
        self._filled: list[CountTables] = []
        for half in self.texts:
            self.module.fill(_count(shape, half))
            self._filled.append(self.module.filled)
        self.seconds = time.perf_counter() - began
        """Taken by counting, and by what was found out with the counts."""

    def serve(self, module: CountedNgrams) -> None:
        """From now on `module` has the counts."""
        self.module = module
        self._filled = [filled.to(module.entries.device) for filled in self._filled]
        self.study(0)

    def study(self, half: int) -> None:
        """Answer by what is not in this half."""
        self.module.filled = self._filled[1 - half]


class AlternatingBatches:
    """Batches of one half and of the other in turns; `study` is told which half comes."""

    def __init__(self, first: Batches, second: Batches, study: Callable[[int], None]) -> None:
        self._batches, self._study = (first, second), study
        self._turn = 0

    def next(self) -> Tensor:
        """See `Batches`."""
        half, self._turn = self._turn, 1 - self._turn
        self._study(half)
        return self._batches[half].next()

    def state_dict(self) -> dict[str, Any]:
        """See `Batches`."""
        return {"turn": self._turn, "halves": [batches.state_dict() for batches in self._batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Batches`."""
        self._turn = state["turn"]
        for batches, its in zip(self._batches, state["halves"], strict=True):
            batches.load_state_dict(its)


class Teacher:
    """Knows what followed the last tokens in other documents. One token of text says what came once; counts say what could have come.

    What it knows comes from all of the text, which the model has yet to read: the more it has read, the less there is to be learnt.
    """

    def __init__(self, config: TeacherConfig, counting: Counting, repetitions: Repetitions | None = None) -> None:
        """With `repetitions` it also knows what followed the last tokens in the same row."""
        self._config, self._counting, self.repetitions = config, counting, repetitions
        self._fades_from = config.fade * sum(text.num_tokens for text in counting.texts)
        self.share = config.share
        """Weight of what it says in the next targets."""

    @classmethod
    def of(cls, config: TrainConfig, counting: Counting) -> Teacher:
        """The one that `config.teacher` describes, with `counting` of its text."""
        repetitions = None
        if config.teacher.repetitions:
            began = time.perf_counter()
            counting.study(0)
            repetitions = Repetitions.fit(counting.module, counting.texts[0], config.sequence_length, config.model.eos_token_id)
            counting.seconds += time.perf_counter() - began
        return cls(config.teacher, counting, repetitions)

    def fade(self, tokens: int) -> None:
        """The model has read so many tokens."""
        self.share = min(self._config.share, self._fades_from / max(tokens, 1))

    def __call__(self, ids: Tensor) -> tuple[Tensor, float]:
        """Probabilities `[B, T, V]` fp32 of what follows each of `ids [B, T]`, and their share in what is learnt."""
        probabilities = self._counting.module.probabilities(self.keys(ids))[0]
        if self.repetitions is not None:
            hints, trust = (found.unsqueeze(-1) for found in self.repetitions(ids))
            probabilities = (probabilities * (1 - trust)).scatter_add_(-1, hints, trust)
        return probabilities, self.share

    def keys(self, ids: Tensor) -> Tensor:
        """Contexts `[B, T, K]` of what follows each of `ids [B, T]`."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self._counting.module.keys(ids, positions, None)
