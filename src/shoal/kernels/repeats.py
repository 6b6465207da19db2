"""Repetitions of the last tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import cpu, reference
from .reference import AGAIN as AGAIN
from .reference import ONCE as ONCE
from .reference import OTHERWISE as OTHERWISE


def find_repeats(texts: Tensor, numbers: Tensor, fresh: int, window: int, lengths: Sequence[int]) -> Tensor:
    """For each of the last `fresh` tokens of every text, what followed the last tokens when the text had them before.

    Args:
        texts: [B, S] int64.
        numbers: [B, S] int64, the same for tokens of one text where a row holds several.
        fresh: Tokens that are asked about; a repetition of those may begin earlier.
        window: Tokens that a repetition may lie back, 1 or more.
        lengths: Tokens of a repetition that are told apart, increasing: the longest counts, of several the latest.

    Returns:
        [B, fresh, 2] int64: the token that followed, and 0 for no repetition, or 1 + 3 times the place of its length among `lengths` + one
        of `ONCE`, `OTHERWISE`, `AGAIN`.
    """
    if cpu.looks_up(texts):
        return cpu.find_repeats(texts, numbers, fresh, window, lengths)
    return reference.find_repeats(texts, numbers, fresh, window, lengths)
