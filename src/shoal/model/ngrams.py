"""Conditional memory: hashed tables of n-grams, whose rows join the embedding of a token (Engram, 2601.07372; N-Grammer, 2207.06366).

Looking rows up costs no matrix product. Which tokens come before one another is known from the text alone, so that nothing
waits for the network. Shapes: B sequences, T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.hashes import tokens_back

MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x2C1B3C6D, 0x297A2D39, 0x5851F42D)
"""Odd constants of common multiplicative hashes, one for every place of an n-gram."""


class Ngrams(nn.Module):
    """One table of `ngram_rows` rows for every length from 2 to `ngram_order`, all in one matrix; n-grams that meet in a row share it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.order, self.rows = config.ngram_order, config.ngram_rows
        self.sparse_gradient = False
        """Whether the gradient holds only the rows that were read; for a process by itself, whose optimizer knows how."""
        self.weight = nn.Parameter(torch.empty((self.order - 1) * self.rows, config.hidden_size))

    def forward(self, ids: Tensor, positions: Tensor, before: Tensor | None) -> Tensor:
        """The sum of the rows of the n-grams that end at every token, `[B, T, D]`; see `keys`."""
        keys = self.keys(ids, positions, before)
        found = nn.functional.embedding(torch.stack(keys), self.weight, sparse=self.sparse_gradient)
        return found.sum(0)

    def keys(self, ids: Tensor, positions: Tensor, before: Tensor | None) -> list[Tensor]:
        """Row of every n-gram `[B, T]`, by length.

        `ids [B, T]` stand at `positions [B or 1, T]`, after `before [B, order - 1]` or more (any ids where a text begins; None: nothing is
        before them). An n-gram that would reach beyond the beginning of its text has an empty place there.
        """
        last, *before_it = tokens_back(ids, before, self.order)
        mixed = (last + 1) * MULTIPLIERS[0]
        keys = []
        for back, token in enumerate(before_it, 1):
            earlier = (token + 1).masked_fill(positions < back, 0)  # 0 is the empty place
            mixed = mixed ^ (earlier * MULTIPLIERS[back])
            keys.append(((mixed ^ (mixed >> 15)) * 0x2545F491 >> 7) % self.rows + (back - 1) * self.rows)
        return keys
