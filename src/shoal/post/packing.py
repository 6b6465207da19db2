"""Texts of any length as full batches: best-fit packing, and the tensors of one packed row.

N tokens in a row. Rows hold no padding: documents lie end to end, each with positions from 0 on and blind to the others.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.reference import IGNORED
from ..model import Documents


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of items in bins that hold at most `capacity`: each item, the longest first, goes where least room is left over.

    Bins, and items within them, keep the order of their indices. `ValueError` for an item that is longer than a bin.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an item of {max(lengths)} does not fit in bins of {capacity}")
    room: list[tuple[int, int]] = []  # of every bin that is not full: what is left, and its number; sorted
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        if left > lengths[index]:
            bisect.insort(room, (left - lengths[index], number))
    return sorted(sorted(items) for items in bins)


@dataclass(frozen=True)
class Text:
    """A text to learn from: every token but the last is read, every token but the first may be learnt."""

    ids: np.ndarray
    """`[n + 1]` int."""
    learnt: np.ndarray
    """`[n + 1]` bool: the tokens whose prediction counts."""
    experts: np.ndarray | None = None
    """`[MoE layers, n, K]` int: the experts to use for every token read (routing replay)."""

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Row:
    """Several texts as one row of N tokens."""

    ids: Tensor
    """`[1, N]`."""
    targets: Tensor
    """`[N]`: the next token where it is learnt, else `IGNORED`."""
    mtp_ids: list[Tensor]
    """Per MTP depth k, `[1, N]`: the token k ahead; the last of its text where that ends before."""
    mtp_targets: list[Tensor]
    """Per MTP depth k, `[N]`: the token k + 1 ahead where it is learnt."""
    documents: Documents
    experts: list[Tensor] | None
    """Per MoE layer, `[1, N, K]`."""

    @property
    def learnt(self) -> int:
        """Number of targets that count."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Row:
        return replace(
            self,
            ids=self.ids.to(device),
            targets=self.targets.to(device),
            mtp_ids=[ids.to(device) for ids in self.mtp_ids],
            mtp_targets=[targets.to(device) for targets in self.mtp_targets],
            documents=self.documents.to(device),
            experts=None if self.experts is None else [chosen.to(device) for chosen in self.experts],
        )


def make_row(texts: Sequence[Text], depth: int = 0) -> Row:
    """Texts, each with at least one token to read, laid end to end; with inputs and targets of `depth` MTP modules."""
    offsets = range(1, depth + 2)
    ahead: list[list[np.ndarray]] = [[] for _ in offsets]
    targets: list[list[np.ndarray]] = [[] for _ in offsets]
    for text in texts:
        columns = np.arange(text.length)
        for k in offsets:
            at = np.minimum(columns + k, text.length)
            ahead[k - 1].append(text.ids[at])
            counts = text.learnt[at] & (columns + k <= text.length)
            targets[k - 1].append(np.where(counts, text.ids[at], IGNORED))
    shifted = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in ahead]
    wanted = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in targets]
    experts = None
    replayed = [text.experts for text in texts if text.experts is not None]
    if replayed:
        whole = torch.from_numpy(np.concatenate(replayed, axis=1).astype(np.int64))
        experts = [layer.unsqueeze(0) for layer in whole]
    return Row(
        torch.from_numpy(np.concatenate([text.ids[:-1] for text in texts]).astype(np.int64)).unsqueeze(0),
        wanted[0],
        [ids.unsqueeze(0) for ids in shifted[:depth]],
        wanted[1:],
        Documents.of([text.length for text in texts]),
        experts,
    )


def make_rows(texts: Sequence[Text], capacity: int, depth: int = 0) -> list[Row]:
    """Texts in as few rows of at most `capacity` tokens as best-fit packing finds."""
    return [make_row([texts[i] for i in items], depth) for items in best_fit([text.length for text in texts], capacity)]
