"""Documents packed end to end, each of which sees itself alone.

Attention gathers documents of about equal length into one batch, runs causally there, and puts the results back: what pads a
document comes after it, so that the kernels need no mask. Everything else in the model works token by token.
Shapes: N tokens in all, R gathered rows (N and padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels

SHORTEST = 0.8
"""Of a group's longest document: shorter ones begin a group of their own."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of one packed row lie."""

    positions: Tensor
    """`[1, N]`: of every token in its document."""
    groups: list[tuple[int, int]]
    """Documents and length of every batch that attention runs."""
    rows: Tensor
    """`[R]`: the token of every gathered row; padding repeats the last one of its document."""
    place: Tensor
    """`[N]`: the gathered row of every token."""
    is_padding: Tensor
    """`[R, 1]` bool."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Documents:
        """Documents of so many tokens, at least one each, in the order in which they are packed."""
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        order = sizes.argsort(descending=True, stable=True)
        groups: list[tuple[int, int]] = []
        rows, padding = [], []
        first = 0
        while first < len(order):
            longest = int(sizes[order[first]])
            last = first + int((sizes[order[first:]] >= SHORTEST * longest).sum())
            members = order[first:last]
            column = torch.arange(longest)
            ends = sizes[members, None] - 1
            rows.append((starts[members, None] + torch.minimum(column, ends)).flatten())
            padding.append((column > ends).flatten())
            groups.append((len(members), longest))
            first = last
        all_rows, is_padding = torch.cat(rows), torch.cat(padding)
        place = torch.empty(int(sizes.sum()), dtype=torch.long)
        place[all_rows[~is_padding]] = (~is_padding).nonzero().flatten()
        positions = torch.arange(len(place)) - starts.repeat_interleave(sizes)
        return cls(positions.unsqueeze(0), groups, all_rows, place, is_padding.unsqueeze(1))

    def to(self, device: torch.device) -> Documents:
        """The same on another device."""
        moved = (tensor.to(device) for tensor in (self.positions, self.rows, self.place, self.is_padding))
        positions, rows, place, is_padding = moved
        return Documents(positions, self.groups, rows, place, is_padding)

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`kernels.causal_attention` within every document; tensors are `[1, N, heads, width]`."""
        sizes = [count * length for count, length in self.groups]
        gathered = [_Gather.apply(x.flatten(0, 1), self.rows, self.place).split(sizes) for x in (q, k, v)]
        mixed = []
        for (count, length), *parts in zip(self.groups, *gathered, strict=True):
            q, k, v = (part.unflatten(0, (count, length)) for part in parts)
            mixed.append(kernels.causal_attention(q, k, v, scale).flatten(0, 1))
        return _PutBack.apply(torch.cat(mixed), self).unsqueeze(0)


class _Gather(torch.autograd.Function):
    # Autograd's own backward of a gather adds row by row. No gradient comes from padding: its outputs are dropped, and no
    # token of its document sees it.
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x.index_select(0, documents.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        documents = ctx.documents
        gathered = grad.index_select(0, documents.rows)
        return gathered.masked_fill_(documents.is_padding.view(-1, *[1] * (grad.ndim - 1)), 0), None
