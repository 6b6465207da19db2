"""Counting n-grams of the training text: for models with a counted prior, and to teach models without.

Half of the documents are counted and the network studies the others: what it trusts must not know the answers already. When training is
over, a model with a counted prior gets the counts of all documents.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig, TeacherConfig, TrainConfig, UserError
from ..data import TokenShards
from ..model import Transformer
from ..model.counted import CountedNgrams, count_ngrams

LONG, PIECE = 1 << 16, 1 << 12
"""Tokens of a document that is counted in pieces, and of a piece."""


def counts_while_training(config: TrainConfig) -> bool:
    """Whether half of the text is counted. A model that brings its counts along (`--start`) keeps them and studies everything."""
    return bool(config.teacher.order or (config.model.count_order and not config.model.count_entries))


def studied(config: TrainConfig, text: TokenShards) -> TokenShards:
    """What the network is trained on."""
    return _every_second(text, 1) if counts_while_training(config) else text


def counted(text: TokenShards) -> TokenShards:
    """The documents that are counted meanwhile."""
    return _every_second(text, 0)


def _every_second(text: TokenShards, first: int) -> TokenShards:
    """Documents `first`, `first` + 2, ..., as a copy in memory. Raises `UserError` where there is only one."""
    text = in_pieces(text)
    chosen = [text.document(i) for i in range(first, text.num_documents, 2)]
    if not chosen:
        raise UserError("counting n-grams needs at least two documents: give more data, or set model.count_order and teacher.order to 0")
    return TokenShards(np.concatenate(chosen), np.cumsum([0, *map(len, chosen)], dtype=np.int64), text.document_bytes[first::2])


def in_pieces(text: TokenShards) -> TokenShards:
    """The same tokens with every very long document as many: of a corpus in one file nothing would be in two documents otherwise."""
    bounds = [np.arange(a, b, PIECE if b - a > LONG else b - a) for a, b in pairwise(text.documents.tolist()) if a < b]
    cuts = np.concatenate([*bounds, text.documents[-1:]])
    return TokenShards(text.tokens, cuts, np.zeros(len(cuts) - 1, np.int64))


def count_into(model: Transformer, text: TokenShards) -> float:
    """Give a model with a counted prior the counts of `text`; returns the seconds it took."""
    began = time.perf_counter()
    assert model.model.counted is not None
    model.config.count_entries = _count(model.model.counted, model.config, text)
    return time.perf_counter() - began


def _count(counted: CountedNgrams, config: ModelConfig, text: TokenShards) -> int:
    text = in_pieces(text)
    counts = count_ngrams(text.tokens, text.documents, config.count_order, config.vocab_size)
    counted.fill(counts)
    return len(counts.entries)


class Teacher:
    """Knows what followed the last tokens in other documents. One token of text says what came once; counts say what could have come."""

    def __init__(self, config: TeacherConfig, model: ModelConfig, text: TokenShards) -> None:
        began = time.perf_counter()
        self.share = config.share
        shape = replace(model, count_order=config.order, count_entries=0, num_nextn_predict_layers=0)
        self._counted = CountedNgrams(shape)
        _count(self._counted, shape, text)
        self.seconds = time.perf_counter() - began
        """Taken by counting."""

    def __call__(self, ids: Tensor) -> tuple[Tensor, float]:
        """Probabilities `[B, T, V]` fp32 of what follows each of `ids [B, T]`, and their share in what is learnt."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self._counted.probabilities(self._counted.keys(ids, positions, None))[0], self.share
