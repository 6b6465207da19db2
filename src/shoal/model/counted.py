"""Counted n-grams: what followed a context in the training text, as a prior that the network corrects.

The prior is interpolated modified Kneser-Ney (Chen & Goodman, 1999) with one change: an n-gram of the greatest length counts once for
every document it is in, as what one document repeats says little about others. Shorter ones count the different tokens before them.
Nothing here is a matrix product, and which row is read is known from the text alone.

Shapes: B sequences, T tokens, V vocabulary, K longest context.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig, UserError
from ..kernels import CountTables
from ..kernels.hashes import hashes_back

MOST = 2**15 - 1
"""Largest count that is kept."""
_KEY_AND_TOKEN_BITS = 60
_DISCOUNT_MARGIN = 0.05


class Counts(NamedTuple):
    """Sorted entries and how much each counts."""

    entries: Tensor
    """`[E]` int64: the length of a context less one (3 bits), a hash of it, and in the lowest bits the token that followed."""
    counts: Tensor
    """`[E]` int16."""


def token_bits(vocabulary: int) -> int:
    """Bits that an entry has for its token."""
    return max(1, (vocabulary - 1).bit_length())


def context_keys(ids: Tensor, positions: Tensor, before: Tensor | None, order: int, bits: int) -> Iterator[Tensor]:
    """Keys `[B, T]` of the contexts of 1, 2, ... `order` tokens that end at each of `ids [B, T]`; -1 where the text is shorter.

    `positions [B or 1, T]`; `before [B, order - 1]` are the ids in front of them (any where a text begins; None: nothing is there).
    """
    mask = (1 << (_KEY_AND_TOKEN_BITS - bits)) - 1
    for back, mixed in enumerate(hashes_back(ids, before, order)):
        key = (mixed & mask) | (back << (_KEY_AND_TOKEN_BITS - bits))
        yield key.masked_fill(positions < back, -1)


def count_ngrams(tokens: np.ndarray, documents: np.ndarray, order: int, vocabulary: int) -> Counts:
    """Count every n-gram of 2 to `order` + 1 tokens of `tokens`, whose documents begin at `documents [:-1]` and end at `documents [1:]`.

    Those with `order` + 1 tokens count the documents they are in. A shorter one counts the different tokens before it, and the documents
    that begin with it.
    """
    bits = token_bits(vocabulary)
    ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
    bounds = documents - documents[0]
    places = np.arange(len(tokens)) - np.repeat(bounds[:-1], np.diff(bounds))
    found: list[Counts] = []
    shorter = np.empty(0, np.int64)
    for length, key in enumerate(context_keys(ids[None], torch.from_numpy(places)[None], None, order, bits), 1):
        entries = (key[0, :-1] << bits | ids[1:]).numpy()
        if length > 1:
            (inside,) = np.nonzero(places[1:] >= length)
            _, first = np.unique(entries[inside], return_index=True)
            found.append(_tally(np.concatenate([shorter[inside[first]], shorter[places[1:] == length - 1]])))
        shorter = entries
    usable = places[1:] >= order
    # Once per document, then documents per entry: sorting many short pieces and one long array of plain integers is fast.
    once = [np.unique(shorter[a:b][usable[a:b]]) for a, b in zip(np.maximum(bounds[:-1] - 1, 0), bounds[1:] - 1, strict=True)]
    found.append(_tally(np.concatenate(once)))
    return Counts(torch.cat([part.entries for part in found]), torch.cat([part.counts for part in found]))


def _tally(values: np.ndarray) -> Counts:
    values.sort()
    first = np.flatnonzero(np.diff(values, prepend=-1))
    counts = np.diff(first, append=len(values))
    return Counts(torch.from_numpy(values[first]), torch.from_numpy(np.minimum(counts, MOST).astype(np.int16)))


class CountedNgrams(nn.Module):
    """Log-probabilities by counting, and how far the network trusts them."""

    entries: Tensor
    counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.order, self.vocabulary, self.bits = config.count_order, config.vocab_size, token_bits(config.vocab_size)
        self.register_buffer("entries", torch.zeros(config.count_entries, dtype=torch.int64))
        self.register_buffer("counts", torch.ones(config.count_entries, dtype=torch.int16))
        self.trust = nn.Parameter(torch.empty(config.hidden_size))
        self.trust_in_length = nn.Parameter(torch.empty(config.count_order + 1))
        self._tables: CountTables | None = None

    def fill(self, counts: Counts) -> None:
        """Hold these counts in place of those there were."""
        self.entries, self.counts = (part.to(self.entries.device) for part in counts)
        self._tables = None

    @property
    def filled(self) -> CountTables:
        """The counts with what is computed from them; setting it costs nothing. Getting raises `UserError` where they are damaged."""
        if self._tables is None or self._tables.entries is not self.entries:
            self._tables = self._prepare()
        return self._tables

    @filled.setter
    def filled(self, tables: CountTables) -> None:
        self.entries, self.counts, self._tables = tables.entries, tables.counts, tables

    def keys(self, ids: Tensor, positions: Tensor, before: Tensor | None) -> Tensor:
        """See `context_keys`; `[B, T, K]`."""
        return torch.stack(list(context_keys(ids, positions, before, self.order, self.bits)), dim=-1)

    def forward(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms of `probabilities`, and the lengths."""
        probabilities, lengths = self.probabilities(keys)
        return probabilities.log_(), lengths

    @torch.no_grad()
    def probabilities(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Of contexts `keys [..., K]`: probabilities `[..., V]` fp32 of the token that follows, and the length of the longest context
        that was ever counted, `[...]` int64."""
        probabilities, lengths = kernels.counted_prior(self.filled, keys.flatten(0, -2))
        return probabilities.view(*keys.shape[:-1], -1), lengths.view(keys.shape[:-1])

    def scale(self, trusted: Tensor, lengths: Tensor) -> Tensor:
        """The factor of the log-probabilities, `[...]` fp32, for hidden states times `trust`; 1 at the beginning."""
        return 1 + self.trust_in_length.float()[lengths] + trusted

    def _prepare(self) -> CountTables:
        """What is computed from the counts once. Raises `UserError` where they cannot be counts of this vocabulary."""
        entries, counts = self.entries, self.counts
        tokens = entries & ((1 << self.bits) - 1)
        valid = len(entries) and bool(entries[0] >= 0) and bool((entries[1:] > entries[:-1]).all()) and bool((counts > 0).all())
        if not valid or int(tokens.max()) >= self.vocabulary:
            raise UserError("the counted n-grams of this model are damaged or were never filled: copy the model again, or train it")
        firsts = torch.arange(self.order, device=entries.device) << _KEY_AND_TOKEN_BITS  # of each length
        starts = [*torch.searchsorted(entries, firsts).tolist(), len(entries)]
        discounts = [_discounts(counts[a:b]) for a, b in pairwise(starts)]
        first = slice(starts[0], starts[1])
        base = torch.bincount(tokens[first], minlength=self.vocabulary).double() + 0.5
        return CountTables(entries, counts, self.bits, torch.tensor(discounts, device=entries.device), (base / base.sum()).float())


def _discounts(counts: Tensor) -> list[float]:
    """What to take off counts of 0, 1, 2, and 3 or more (Chen & Goodman, 1999, equation 26); always less than the count."""
    ones, twos, threes, fours = (max(int((counts == n).sum()), 1) for n in range(1, 5))
    share = ones / (ones + 2 * twos)
    raw = (1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos, 3 - 4 * share * fours / threes)
    return [0.0, *(min(max(d, _DISCOUNT_MARGIN), n - _DISCOUNT_MARGIN) for n, d in enumerate(raw, 1))]
