"""Counting n-grams for models with a counted prior.

Half of the documents are counted and the network studies the others: what it learns to trust must not know the answers already. When
training is over all documents are counted.
"""

from __future__ import annotations

import time

from ..config import ModelConfig
from ..data import TokenShards
from ..model import Transformer
from ..model.counted import count_ngrams


def studied(config: ModelConfig, text: TokenShards) -> TokenShards:
    """What the network is trained on: everything, or half where the other half is counted.

    A model that brings its counts along (`--start`) keeps them and studies everything.
    """
    return text.every_second(1) if config.count_order and not config.count_entries and text.num_documents > 1 else text


def counted_while_training(text: TokenShards) -> TokenShards:
    """The documents that `studied` leaves out (of a single one, that one)."""
    return text.every_second(0)


def count_into(model: Transformer, text: TokenShards) -> float:
    """Give a model the counts of `text`; returns the seconds it took."""
    began = time.perf_counter()
    assert model.model.counted is not None
    counts = count_ngrams(text.tokens, text.documents, model.config.count_order, model.config.vocab_size)
    model.model.counted.fill(counts)
    model.config.count_entries = len(counts.entries)
    return time.perf_counter() - began
