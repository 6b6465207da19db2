"""The text behind the paged cache, for models that look back beside attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.repeats import NOTHING
from .batch import PAGE, Batch


class Past:
    """Remembers which token stands at every cached position."""

    def __init__(self, pages: int, looks_back: int, device: torch.device) -> None:
        self._tokens = torch.zeros(pages, PAGE, dtype=torch.long, device=device)
        self._back = torch.arange(looks_back, 0, -1, device=device)

    def before(self, batch: Batch) -> Tensor:
        """Remember the new tokens; what stands before those of each sequence, `[S, looks_back]`, `NOTHING` where there is no token."""
        device = self._tokens.device
        tables, starts = batch.tables.to(device).long(), batch.starts.to(device)
        ids, positions = batch.ids.to(device), batch.positions.to(device)
        sequence = torch.repeat_interleave(torch.arange(len(tables), device=device), starts.diff())
        self._tokens[tables[sequence, positions // PAGE], positions % PAGE] = ids
        earlier = positions[starts[:-1]][:, None] - self._back
        there = earlier.clamp(min=0)
        return self._tokens[tables.gather(1, there // PAGE), there % PAGE].masked_fill_(earlier < 0, NOTHING)

    def copy_page(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._tokens[target] = self._tokens[source]
