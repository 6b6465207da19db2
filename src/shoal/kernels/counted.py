"""Distributions of counted n-grams: the tables, and the operation on them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import cpu, reference


@dataclass
class CountTables:
    """E entries for a vocabulary of V; contexts of 1 to K tokens."""

    entries: Tensor
    """`[E]` int64, sorted, all different: the key of a context and, in the lowest `token_bits`, a token that followed."""
    counts: Tensor
    """`[E]` int16, more than 0."""
    token_bits: int
    discounts: Tensor
    """`[K, 4]` fp32: what is taken off a count of 0, 1, 2, and 3 or more in contexts of this length."""
    base: Tensor
    """`[V]` fp32: probabilities without a context."""
    index_shift: int = 47
    """Bits of an entry below those that the index knows; an entry has 63."""
    index: Tensor = field(init=False)
    """`[2^16 + 1]` int64: where entries begin whose upper bits are 0, 1, ..., and E."""
    frequent: Tensor = field(init=False)
    """`[V]` int64: tokens by falling `base`."""

    def __post_init__(self) -> None:
        firsts = torch.arange(1 << 63 - self.index_shift, device=self.entries.device) << self.index_shift
        starts = torch.searchsorted(self.entries, firsts)
        self.index = torch.cat([starts, starts.new_tensor([len(self.entries)])])
        self.frequent = self.base.argsort(descending=True, stable=True)

    def to(self, device: torch.device) -> CountTables:
        """The same on another device."""
        if self.entries.device == device:
            return self
        parts = (part.to(device) for part in (self.entries, self.counts, self.discounts, self.base))
        entries, counts, discounts, base = parts
        return CountTables(entries, counts, self.token_bits, discounts, base)


def counted_prior(tables: CountTables, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolated absolute discounting: p_n(v) = max(c(v) - D, 0) / C + (sum of D) / C p_{n-1}(v), from `base` up to the longest
    context that was ever counted.

    Args:
        tables: what was counted.
        keys: [R, K] int64, contexts of 1, 2, ... K tokens of every row; -1 where there is none.

    Returns:
        Probabilities [R, V] fp32, and the length of the longest context found, [R] int64.
    """
    if cpu.looks_up(tables.entries):
        return cpu.counted_prior(tables, keys)
    return reference.counted_prior(tables.entries, tables.counts, tables.token_bits, tables.discounts, tables.base, keys)


def counted_candidates(tables: CountTables, keys: Tensor, certain: Tensor, likeliest: int, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that may follow, and how likely `counted_prior` holds them.

    Args:
        tables: what was counted.
        keys: [R, K] int64, as for `counted_prior`.
        certain: [R, C] int64, tokens to begin with.
        likeliest: so many of those that are likeliest come next; V must be at least C + likeliest.
        drawn: [R, M] int64, tokens that come last.

    Returns:
        Tokens [R, C + likeliest + M]; their probabilities, 0 for a certain one that stands in its row for the second time and for a drawn
        one that is certain or among the likeliest; the length of the longest context found, [R] int64.
    """
    if cpu.looks_up(tables.entries):
        return cpu.counted_candidates(tables, keys, certain, likeliest, drawn)
    return reference.candidates_of(*counted_prior(tables, keys), certain, likeliest, drawn)
