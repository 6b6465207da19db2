"""Repetitions: the token that followed the last few tokens when this text had them before, as a hint for the output.

Texts repeat themselves, and a small network takes long to learn to look (induction heads, Olsson et al., 2209.11895). Where the last tokens
were seen is known from the text alone: comparing finds it without a matrix product, as the match model of a compressor does
(Mahoney, 2005), farther back than attention sees. What is learnt is how much to trust it, as with pointers and caches (Merity et al.,
1609.07843; Grave et al., 1612.04426).

Shapes: B sequences, T tokens, S = T and the tokens before them, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from ..config.model import REPEAT_LENGTHS, REPEAT_STATES

START = (1.0, 0.5, 1.5)
"""How much of the bonus `ONCE`, `OTHERWISE` and `AGAIN` begin with."""
NOTHING = -1
"""In place of a token where the text has not begun."""
APART = 2**32
"""More than there are tokens."""


class Repeats(nn.Module):
    """Finds the longest repetition within `config.repeat_window` tokens, the latest of several, and says how much to trust it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._window, self._end = config.repeat_window, config.eos_token_id
        self.trust = nn.Parameter(torch.empty(config.hidden_size))
        self.trust_in_kind = nn.Parameter(torch.empty(len(REPEAT_LENGTHS), REPEAT_STATES))

    @torch.no_grad()
    def reset(self) -> None:
        """About what training finds."""
        self.trust.zero_()
        self.trust_in_kind.copy_(torch.tensor([[1.5 * (1 + math.log(length)) * share for share in START] for length in REPEAT_LENGTHS]))

    @torch.no_grad()
    def find(self, ids: Tensor, before: Tensor | None, begins: Tensor | None = None) -> Tensor:
        """See `find_repetitions`."""
        return find_repetitions(ids, before, self._end, self._window, begins)

    def bonus(self, trusted: Tensor, kinds: Tensor) -> Tensor:
        """What is added to the logit of the token that was found, `[...]` fp32, for hidden states times `trust` and `kinds` of `find`."""
        by_kind = nn.functional.pad(self.trust_in_kind.float().flatten(), (1, 0))
        return by_kind[kinds] + (kinds > 0) * trusted


def find_repetitions(ids: Tensor, before: Tensor | None, end: int | None, window: int, begins: Tensor | None = None) -> Tensor:
    """For each of `ids [B, T]` the token that followed the repetition, and of what kind that was: 0 for none, then by length
    (`REPEAT_LENGTHS`), and for every length whether what followed was the same the time before (`ONCE`, `OTHERWISE`, `AGAIN`).

    `before [B, S - T]` stands in front of `ids`, `NOTHING` where there is no token. Returns `[B, T, 2]` int64. Only the last `window`
    tokens of the same text are searched: one ends with the token `end` (None: there is none), and without `before`, texts begin where
    `begins [B, T]` says so.
    """
    text = ids if before is None else torch.cat([before, ids], dim=1)
    ended = text == NOTHING
    ends = (ended if end is None else ended | (text == end)).long()
    number = ends.cumsum(1) - ends
    if begins is not None:
        # Every packed text gets tokens of its own: a run of tokens that reached back into the text before it equals no other.
        text = text + begins.cumsum(1) * APART
    found = kernels.find_repeats(text, number, ids.shape[1], window, REPEAT_LENGTHS)
    found[..., 0] %= APART
    return found
