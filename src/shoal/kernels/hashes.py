"""Hashes of the last few tokens, for everything that is looked up by them.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""2^64 divided by the golden ratio, odd, as a signed number."""


def tokens_back(ids: Tensor, before: Tensor | None, count: int) -> Iterator[Tensor]:
    """Of every one of `ids [B, T]` the token itself, the one before it, ... `count` in all; `[B, T]` each.

    `before [B, count - 1]` or more stand in front of `ids`; None: zeros do.
    """
    if before is None:
        before = ids.new_zeros(ids.shape[0], count - 1)
    text = torch.cat([before[:, before.shape[1] - count + 1 :], ids], dim=1)
    for back in range(count):
        yield text[:, count - 1 - back :][:, : ids.shape[1]]


def hashes_back(ids: Tensor, before: Tensor | None, count: int) -> Iterator[Tensor]:
    """Hashes of the 1, 2, ... `count` tokens that end at each of `ids [B, T]`; `[B, T]` int64 each. `before` as for `tokens_back`."""
    mixed = torch.zeros_like(ids)
    for token in tokens_back(ids, before, count):
        mixed = (mixed ^ (token + 1)) * GOLDEN
        mixed = mixed ^ (mixed >> 29)
        yield mixed
