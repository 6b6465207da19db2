"""The race that draws a token. V is the size of the vocabulary.

Token i gets the time E_i / p_i with E_i exponential, and the least time wins, which happens with probability p_i. The E_i are drawn from
(seed, position) alone. So a request's text depends neither on the batch nor on how far multi-token prediction guessed ahead: a guess
runs the same race with the module's own p, and is right if the main model's race has the same winner ("drafter-invariant"
speculation, Daliri, Musco and Suresh, 2408.07978). The distribution of the text is exactly the main model's, and the closer the two p
are, the oftener both races end alike. At temperature 0 the likeliest token wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.serving import draw_rows

NEVER = 28.0
"""Tokens this many nats below the most likely one (7e-13 times as likely) are not drawn."""
DRAWN_AT_ONCE = 1 << 18
"""Logits that numpy works on at a time."""


def race_times(start: int, ids: np.ndarray) -> np.ndarray:
    """Exponentially distributed numbers (fp64, mean 1), one for each of `ids`, that depend on `start` and id alone.

    A counter-based generator: the id is the counter, and the mixing function that of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    x = ids.astype(np.uint64)
    x *= np.uint64(_GOLDEN)
    x += np.uint64(start)
    return _times(x)


def race_start(seed: int, position: int) -> int:
    """Where the random numbers of the race for the token at `position` begin."""
    return _mixed((seed + (position + 1) * _GOLDEN) & _MASK)


@dataclass
class Races:
    """What guesses are drawn with, for S sequences."""

    temperatures: list[float]
    """`[S]`."""
    starts: list[list[int]]
    """Of every sequence: where the random numbers of each of its guesses begin. As many as are wanted at most, perhaps none."""


def draw(table: np.ndarray, rows: Sequence[int], temperatures: Sequence[float], starts: Sequence[int], room: Room) -> list[int]:
    """The winners of the races of `rows` of logits `table [M, V]`, all of them at once; -1 where a row has no finite maximum.

    By the C++ kernels where there are some, which round differently in the last bits of a double.
    """
    winners = draw_rows(table, rows, temperatures, starts)
    return _draw(table, rows, temperatures, starts, room) if winners is None else winners


class Room:
    """Memory for numpy to draw in. It is kept, as the system would have to clear new pages for every step."""

    def __init__(self) -> None:
        self._memory = np.empty((3, 0))

    def take(self, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One array of fp64 and two of uint64, all `[rows, columns]`, with whatever content."""
        size = rows * columns
        if self._memory.shape[1] < size:
            self._memory = np.empty((3, size))
        floats, counters, shifted = (part[:size].reshape(rows, columns) for part in self._memory)
        return floats, counters.view(np.uint64), shifted.view(np.uint64)


def _draw(table: np.ndarray, rows: Sequence[int], temperatures: Sequence[float], starts: Sequence[int], room: Room) -> list[int]:
    """In numpy: one call for many rows is faster, and leaves the interpreter to other threads meanwhile."""
    winners: list[int] = []
    many = max(DRAWN_AT_ONCE // table.shape[1], 1)
    steps = np.arange(table.shape[1], dtype=np.uint64) * np.uint64(_GOLDEN)
    for first in range(0, len(rows), many):
        part = slice(first, first + many)
        scores = table[rows[part]]
        weights, counters, shifted = room.take(*scores.shape)
        tops = scores.max(1, keepdims=True)
        heats = np.array(temperatures[part])[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            never = scores < tops - (NEVER * heats).astype(np.float32)
            np.subtract(scores, tops, out=weights, dtype=np.float64)
            weights /= heats
            np.exp(weights, out=weights)
            weights[never] = 0.0
            np.add(steps, np.array(starts[part], np.uint64)[:, None], out=counters)
            weights /= _times(counters, shifted)
        best = np.where(heats[:, 0] > 0, weights.argmax(1), scores.argmax(1))
        winners += np.where(np.isfinite(tops[:, 0]), best, -1).tolist()
    return winners


def _times(x: np.ndarray, shifted: np.ndarray | None = None) -> np.ndarray:
    """Turns counters (uint64, overwritten with the result) into exponentially distributed numbers; `shifted` is room to work in."""
    shifted = np.empty_like(x) if shifted is None else shifted
    for shift, factor in _ROUNDS:
        x ^= np.right_shift(x, np.uint64(shift), out=shifted)
        x *= np.uint64(factor)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    np.right_shift(x, np.uint64(12), out=shifted)
    uniform = np.add(shifted, 0.5, out=x.view(np.float64))  # of 2^52: neither 0 nor 1 once scaled
    uniform *= 2.0**-52
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform)


_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mixed(x: int) -> int:
    for shift, factor in _ROUNDS:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 31)
