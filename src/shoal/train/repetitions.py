"""What a text says twice, for a teacher: what followed the last tokens when the row had them before, and how far that can be believed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..config.model import REPEAT_LENGTHS, REPEAT_STATES
from ..data import TokenShards
from ..model.counted import CountedNgrams
from ..model.repeats import find_repetitions

KINDS = 1 + len(REPEAT_LENGTHS) * REPEAT_STATES
FITTED = 1 << 16
"""Tokens of text that trust is fitted to."""
ROWS = 16
"""Looked up at a time: without kernels that takes memory for the whole vocabulary of every token."""
ROUNDS = 20


class Repetitions:
    """Finds repetitions within rows; `trust [KINDS]`: the share of what it says in a mixture with what counts say, by kind."""

    def __init__(self, trust: Tensor, end: int | None) -> None:
        self.trust, self._end = trust, end

    @classmethod
    def fit(cls, counted: CountedNgrams, text: TokenShards, length: int, end: int | None) -> Repetitions:
        """With the trust that makes rows of `length` tokens of `text` likeliest; `counted` knows other text. Texts end with `end`."""
        length = min(length, text.num_tokens - 1)
        number = max(1, min(text.num_tokens - 1, FITTED) // length)
        tokens = torch.from_numpy(text.tokens[: number * length + 1].astype("int64")).to(counted.entries.device)
        found = [
            _hints(counted, ids, targets, end)
            for ids, targets in zip(tokens[:-1].view(number, length).split(ROWS), tokens[1:].view(number, length).split(ROWS), strict=True)
        ]
        return cls(fit_trust(*map(torch.cat, zip(*found, strict=True))), end)

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For each of `ids [B, T]`: the token that followed the longest repetition, and how far to trust it (0 where there is none)."""
        hints, kinds = find_repetitions(ids, None, self._end, ids.shape[1]).unbind(-1)
        return hints, self.trust.to(ids.device)[kinds]


def _hints(counted: CountedNgrams, ids: Tensor, targets: Tensor, end: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """For every position of `ids [B, T]`, `[B * T]`: the kind of its hint, whether it is the target, and the target by what is counted."""
    hints, kinds = find_repetitions(ids, None, end, ids.shape[1]).flatten(0, 1).unbind(1)
    keys = counted.keys(ids, torch.arange(ids.shape[1], device=ids.device)[None], None).flatten(0, 1)
    wanted = targets.reshape(-1, 1)
    _, probabilities, _ = kernels.counted_candidates(counted.filled, keys, wanted, 0, wanted[:, :0])
    return kinds.cpu(), (hints == wanted[:, 0]).cpu(), probabilities[:, 0].cpu()


def fit_trust(kinds: Tensor, right: Tensor, otherwise: Tensor) -> Tensor:
    """By expectation maximisation the trust t of every kind, `[KINDS]`, for which t * right + (1 - t) * otherwise is likeliest.

    Of N hints: `kinds [N]`, `right [N]` whether they were, `otherwise [N]` the probability without them. Kinds that are rare get less.
    """
    number = 1 + torch.bincount(kinds, minlength=KINDS)
    trust = torch.full((KINDS,), 0.5)
    trust[0] = 0
    for _ in range(ROUNDS):
        hinted = trust[kinds] * right
        responsible = hinted / (hinted + (1 - trust[kinds]) * otherwise).clamp(min=torch.finfo(torch.float32).tiny)
        trust = torch.zeros(KINDS).index_add_(0, kinds, responsible) / number
    return trust
