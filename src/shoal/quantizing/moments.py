"""Second moments of a layer's inputs, gathered batch by batch.

Shapes: N tokens, I input channels, `...` leading dimensions (heads).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class MeanMoment:
    """The mean of x x' over all rows added so far."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Count `x [..., N, I]` in."""
        moment = x.mT @ x
        self._sum = moment if self._sum is None else self._sum.add_(moment)
        self._rows += x.shape[-2]

    def value(self) -> Tensor:
        """`[..., I, I]`."""
        assert self._sum is not None
        return self._sum / self._rows


def mean_moment(inputs: Iterable[Tensor]) -> Tensor:
    """`[I, I]` from batches `[..., I]`."""
    moment = MeanMoment()
    for x in inputs:
        moment.add(x.flatten(0, -2))
    return moment.value()


def weighted_moment(x: Tensor, weights: Tensor, typical: Tensor, borrowed: float) -> Tensor:
    """Mean of x x' over rows `x [N, I]` that count as `weights [N]`, with `typical [I, I]` counted as `borrowed` rows of mean weight.

    So a few rows, or none, still give a moment that is worth trusting.
    """
    if not len(x):
        return typical
    share = weights / weights.mean().clamp_min(1e-30)
    return ((x * share.unsqueeze(-1)).T @ x + borrowed * typical) / (len(x) + borrowed)
