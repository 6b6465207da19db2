"""What a machine was measured to sustain, by the size of the work: small matrices are slower than large ones."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from math import exp, log
from typing import Literal


@dataclass(frozen=True)
class Curve:
    """A rate measured at some sizes: between two of them on a line over logarithms, beyond the ends as at the nearest."""

    points: tuple[tuple[float, float], ...]
    """(size, rate), sizes rising."""

    def at(self, size: float) -> float:
        right = bisect_left(self.points, (size, 0.0))
        if right == 0 or right == len(self.points):
            return self.points[min(right, len(self.points) - 1)][1]
        (low, slow), (high, fast) = self.points[right - 1], self.points[right]
        share = log(size / low) / log(high / low)
        return exp((1 - share) * log(slow) + share * log(fast))


def product_size(*sides: float) -> float:
    """The size of a matrix product [n, i] x [i, o] that its speed depends on: FLOPs per number moved.

    n i o / (n i + n o + i o), twice: with many rows it is the harmonic mean of the weight's sides, for a square weight its side.
    """
    return 2 / sum(1 / side for side in sides)


@dataclass(frozen=True)
class Sustained:
    """Rates of the kernels that a training step is made of, in the precision that the trainer takes here."""

    precision: Literal["fp32", "bf16"]
    products: Curve
    """FLOP/s of x W and x W^T by `product_size`."""
    weight_gradients: Curve
    """FLOP/s of x^T y by `product_size`."""
    experts: Curve
    """FLOP/s of products with one matrix per expert, forward and both gradients, by `product_size` of an expert's share."""
    attention: Curve
    """FLOP/s of causal attention, forward and backward, by the channels of a head. Pairs of tokens that may see each other count."""
    newton_schulz: Curve
    """FLOP/s of Muon's iterations by the shorter side of the matrix, counted as `cost.newton_schulz_flops` does."""
    norm: float
    """Values per second through RMSNorm, forward and backward; so for the three below."""
    swiglu: float
    rope: float
    route: float
    """Values of tokens brought to experts and back."""
    softmax: float
    """Logits per second through the cross-entropy with its gradient."""
    add: float
    """Values per second of a sum of two tensors of some MiB, forward only."""
    packed_reads: dict[str, float] = field(default_factory=dict)
    """Bytes per second of packed weights (int8, int4) in a product with one token, as in decoding; empty where they cannot be measured."""
    packed_products: dict[str, float] = field(default_factory=dict)
    """Operations per second of products of many tokens with packed weights."""
