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

from ..config import ModelConfig
from ..config.model import LONGEST_REPEAT

LENGTHS = (1, 2, 3, 4, 6, 8, 12, LONGEST_REPEAT)
"""Of repetitions that are told apart, in tokens."""
NOTHING = -1
"""In place of a token where the text has not begun."""
_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)  # odd, as signed numbers: 2^64 over the golden ratio, and one of xxHash's


class Repeats(nn.Module):
    """Finds the longest repetition within `config.repeat_window` tokens, the latest of several, and says how much to trust it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._window, self._end = config.repeat_window, config.eos_token_id
        self.trust = nn.Parameter(torch.empty(config.hidden_size))
        self.trust_in_length = nn.Parameter(torch.empty(len(LENGTHS)))

    @torch.no_grad()
    def reset(self) -> None:
        """About what training finds."""
        self.trust.zero_()
        self.trust_in_length.copy_(torch.tensor([1.5 * (1 + math.log(length)) for length in LENGTHS]))

    @torch.no_grad()
    def find(self, ids: Tensor, before: Tensor | None, begins: Tensor | None = None) -> Tensor:
        """For each of `ids [B, T]` the token that followed the repetition, and how long that was: 1, 2, ... by `LENGTHS`, 0 for none.

        `before [B, S - T]` stands in front of `ids`, `NOTHING` where there is no token. Returns `[B, T, 2]` int64. Only the same
        text is searched: one ends with its end-of-text token, and without `before`, texts begin where `begins [B, T]` says so.
        """
        text = ids if before is None else torch.cat([before, ids], dim=1)
        size, new = text.shape[1], ids.shape[1]
        ends = ((text == self._end) | (text == NOTHING)).long()
        number = ends.cumsum(1) - ends
        if begins is not None:
            number = number + begins.cumsum(1)
        number = number * _MULTIPLIERS[1]
        places = torch.arange(size, device=ids.device)[-new:]
        mixed, length, source = torch.zeros_like(text), torch.zeros_like(ids), torch.zeros_like(ids)
        for back in range(LENGTHS[-1]):
            earlier = nn.functional.pad(text, (back, 0), value=NOTHING)[:, :size]
            mixed = (mixed ^ (earlier + 1)) * _MULTIPLIERS[0]
            mixed = mixed ^ (mixed >> 29)
            if back + 1 not in LENGTHS:
                continue
            # Equal runs of tokens become neighbours, and those of one kind keep their order: the one to the left is the latest before.
            keys, order = (mixed ^ number).sort(dim=1, stable=True)
            left = torch.where(keys[:, 1:] == keys[:, :-1], order[:, :-1], -1)
            latest = torch.full_like(order, -1).scatter_(1, order[:, 1:], left)[:, -new:]
            found = (latest >= 0) & (places - latest <= self._window)
            length = torch.where(found, LENGTHS.index(back + 1) + 1, length)
            source = torch.where(found, latest, source)
        return torch.stack([text.gather(1, (source + 1).clamp(max=size - 1)) * (length > 0), length], dim=-1)

    def bonus(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """What is added to the logit of the token that was found, `[...]` fp32: for `hidden [..., D]` and `lengths [...]` of `find`."""
        by_length = nn.functional.pad(self.trust_in_length.float(), (1, 0))
        return by_length[lengths] + (lengths > 0) * (hidden.float() @ self.trust.float())
