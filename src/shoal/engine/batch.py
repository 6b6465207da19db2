"""What one step of the engine computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

PAGE = 32
"""Positions of one page of the cache."""


@dataclass
class Batch:
    """What one step computes: the new tokens of S sequences laid end to end, N in all."""

    ids: Tensor
    """`[N]` int64."""
    positions: Tensor
    """`[N]` int64, consecutive within a sequence."""
    starts: Tensor
    """`[S + 1]` int64: where the tokens of every sequence start; the last is N."""
    tables: Tensor
    """`[S, P]` int32: pages of the positions 0 ..., `PAGE` positions a page, padded with 0."""

    @classmethod
    def lay_out(cls, ids: Sequence[Sequence[int]], firsts: Sequence[int], tables: Sequence[np.ndarray], ahead: int = 0) -> Batch:
        """From every sequence's new tokens, the position of the first of them, and pages (int32, as many as needed or more).

        The tables have room for the pages of `ahead` more positions, as far as a sequence has them.
        """
        ends = [first + len(new) for first, new in zip(firsts, ids, strict=True)]
        pages = -(-(max(ends) + ahead) // PAGE)
        if len(ids) == 1:  # the usual case of one reader, where every microsecond shows
            arrays = [np.array(ids[0]), np.arange(firsts[0], ends[0]), np.array((0, len(ids[0]))), tables[0][None, :pages]]
            return cls(*map(torch.from_numpy, arrays))
        starts = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(new) for new in ids], out=starts[1:])
        padded = np.zeros((len(ids), pages), np.int32)
        for row, table, end in zip(padded, tables, ends, strict=True):
            count = min(-(-(end + ahead) // PAGE), len(table))
            row[:count] = table[:count]
        positions = np.fromiter(chain.from_iterable(map(range, firsts, ends)), np.int64, starts[-1])
        flat = np.fromiter(chain.from_iterable(ids), np.int64, starts[-1])
        return cls(*map(torch.from_numpy, (flat, positions, starts, padded)))
