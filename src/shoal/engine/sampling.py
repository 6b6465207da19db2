"""Chooses tokens from logits, one request at a time, in numpy. V is the size of the vocabulary.

A sampled token is the winner of a race: token i gets the time E_i / p_i with E_i exponential, and the least time wins, which
happens with probability p_i. The E_i are drawn from (seed, position) alone. So a request's text depends neither on the batch
nor on how far multi-token prediction guessed ahead: a guess runs the same race with the module's own p, and is right if the
main model's race has the same winner ("drafter-invariant" speculation, Daliri, Musco and Suresh, 2408.07978). The distribution
of the text is exactly the main model's, and the closer the two p are, the oftener both races end alike.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from ..config import SamplingOptions, UserError
from ..kernels.serving import draw_rows
from .requests import TokenMask
from .runner import on_host


class Sampler:
    """What one request needs to choose its next token; `accept` keeps it up to date."""

    def __init__(
        self, options: SamplingOptions, prompt: Sequence[int], vocab_size: int, eos: Collection[int], mask: TokenMask | None = None
    ) -> None:
        self.options, self.mask = options, mask
        self.seed = secrets.randbits(64) if options.seed is None else options.seed
        self.stops = frozenset(options.stop_token_ids if options.ignore_eos else (*eos, *options.stop_token_ids))
        outside = [token for token in (*options.logit_bias, *options.stop_token_ids) if not 0 <= token < vocab_size]
        if outside:
            raise UserError(f"token {outside[0]} is not in the vocabulary of {vocab_size}")
        self._bias_ids = np.fromiter(options.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(options.logit_bias.values(), np.float32)
        self._stop_ids = np.fromiter((token for token in self.stops if token < vocab_size), np.int64)
        self._counts_answer = bool(options.presence_penalty or options.frequency_penalty)
        self._repeats = options.repetition_penalty != 1
        self._answer: Counter[int] = Counter()
        self._seen = set(prompt) if self._repeats else set()
        self._length = 0
        changes = self._counts_answer or self._repeats or bool(options.logit_bias) or mask is not None
        self.is_plain = not (options.temperature or changes)
        """Greedy without anything that changes logits: an argmax over a whole batch serves it (once `min_tokens` are there)."""
        self.is_free = bool(options.temperature) and not (changes or options.top_k > 0 or options.top_p < 1 or options.min_p)
        """Drawn from all tokens without anything that changes logits: `draw` serves a whole batch (once `min_tokens` are there)."""

    @property
    def holds_back_stops(self) -> bool:
        """Whether the answer is still shorter than `min_tokens`."""
        return self._length < self.options.min_tokens

    def accept(self, token: int) -> None:
        """`token` is the next one of the answer."""
        self._length += 1
        if self._counts_answer:
            self._answer[token] += 1
        if self._repeats:
            self._seen.add(token)
        if self.mask is not None:
            self.mask.accept(token)

    def choose(self, logits: np.ndarray, position: int) -> int:
        """The token that stands at `position`, from `logits [V]` fp32.

        Raises:
            SamplingError: nothing can be chosen.
        """
        scores = self.adjust(logits)
        if not self.options.temperature:
            best = int(scores.argmax())
            if not np.isfinite(scores[best]):
                raise SamplingError(_why_nothing(scores[best]))
            return best
        ids, weights = self.candidates(scores)
        return int(ids[np.argmax(weights / race_times(self.seed, position, ids))])

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """Logits after penalties, bias, `min_tokens` and mask; a copy where anything changes."""
        if self.is_plain and not self.holds_back_stops:
            return logits
        options, scores = self.options, logits.copy()
        if self._repeats:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            held = scores[seen]
            scores[seen] = np.where(held > 0, held / options.repetition_penalty, held * options.repetition_penalty)
        if self._counts_answer and self._answer:
            ids = np.fromiter(self._answer.keys(), np.int64, len(self._answer))
            counts = np.fromiter(self._answer.values(), np.float32, len(self._answer))
            scores[ids] -= options.presence_penalty + options.frequency_penalty * counts
        if len(self._bias_ids):
            scores[self._bias_ids] += self._bias
        if self.holds_back_stops:
            scores[self._stop_ids] = -np.inf
        allowed = self.mask.allowed() if self.mask is not None else None
        if allowed is not None:
            scores[~allowed] = -np.inf
        return scores

    def candidates(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that can be chosen, and their probabilities (fp64) up to a common factor.

        Temperature, top-k, top-p and min-p are applied in this order; tokens tied with the last one kept are kept too.
        """
        options, top = self.options, scores.max()
        if not np.isfinite(top):
            raise SamplingError(_why_nothing(top))
        ids = np.flatnonzero(scores >= top - NEVER * options.temperature)
        # In fp64, so that a tiny temperature cannot overflow.
        weights = np.subtract(scores[ids], top, dtype=np.float64)
        weights /= options.temperature
        np.exp(weights, out=weights)
        if 0 < options.top_k < len(ids):
            heavy = _heaviest(weights, lambda some: len(some) >= options.top_k)
            kept = weights >= np.partition(heavy, -options.top_k)[-options.top_k]
            ids, weights = ids[kept], weights[kept]
        if options.top_p < 1:
            wanted = options.top_p * weights.sum()
            ordered = np.sort(_heaviest(weights, lambda some: bool(some.sum() >= wanted)))[::-1]
            last = min(int(np.searchsorted(np.cumsum(ordered), wanted)), len(ordered) - 1)
            kept = weights >= ordered[last]
            ids, weights = ids[kept], weights[kept]
        if options.min_p:
            kept = weights >= options.min_p  # the largest weight is 1
            ids, weights = ids[kept], weights[kept]
        return ids, weights


def _heaviest(weights: np.ndarray, enough: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The largest of `weights` (at most 1), unordered: enough of them and rarely many more, to spare sorting all."""
    level = 1 / 8
    while level > np.exp(-NEVER):
        some = weights[weights >= level]
        if enough(some):
            return some
        level /= 8
    return weights


NEVER = 28.0
"""Tokens this many nats below the most likely one (7e-13 times as likely) are not drawn."""


def race_times(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Exponentially distributed numbers (fp64, mean 1), one for each of `ids`, that depend on seed, position and id alone.

    A counter-based generator: the id is the counter, and the mixing function that of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    x = ids.astype(np.uint64)
    x *= np.uint64(_GOLDEN)
    x += np.uint64(_start(seed, position))
    return _times(x)


def _start(seed: int, position: int) -> int:
    return _mixed((seed + (position + 1) * _GOLDEN) & _MASK)


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


class SamplingError(Exception):
    """One request cannot go on; the others can."""


class Rows:
    """Logits `[M, V]` of M places, brought to the host; what can be chosen for many of them at once is.

    `places`: the sampler and the position of every row, for drawing all at once, in `room`.
    """

    def __init__(self, logits: Tensor, places: Sequence[tuple[Sampler, int]] = (), room: Room | None = None) -> None:
        self.table = on_host(logits)
        self._drawn = draw(self.table, {row: place for row, place in enumerate(places) if place[0].is_free}, room or Room())

    @cached_property
    def _best(self) -> list[int]:
        best: list[int] = self.table.argmax(-1).tolist()
        return best

    def choose(self, row: int, sampler: Sampler, position: int) -> int:
        """See `Sampler.choose`."""
        if row in self._drawn and not sampler.holds_back_stops:
            return self._drawn[row]
        if not sampler.is_plain or sampler.holds_back_stops:
            return sampler.choose(self.table[row], position)
        best = self._best[row]
        if not math.isfinite(self.table[row, best]):
            raise SamplingError(_why_nothing(self.table[row, best]))
        return best


DRAWN_AT_ONCE = 1 << 18
"""Logits that numpy works on at a time."""


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


def draw(table: np.ndarray, places: Mapping[int, tuple[Sampler, int]], room: Room) -> dict[int, int]:
    """What `Sampler.choose` gives for these rows of `table [M, V]` (samplers that are `is_free`, and positions), all of them at once.

    By the C++ kernels where there are some, which round differently in the last bits of a double. Rows without a finite maximum are left
    out.
    """
    if not places:
        return {}
    rows = list(places)
    temperatures = [sampler.options.temperature for sampler, _ in places.values()]
    starts = [_start(sampler.seed, position) for sampler, position in places.values()]
    winners = draw_rows(table, rows, temperatures, starts)
    if winners is None:
        winners = _draw_rows(table, rows, temperatures, starts, room)
    return {row: winner for row, winner in zip(rows, winners, strict=True) if winner >= 0}


def _draw_rows(table: np.ndarray, rows: list[int], temperatures: list[float], starts: list[int], room: Room) -> list[int]:
    """In numpy: one call for many rows is faster, and leaves the interpreter to other threads meanwhile."""
    winners: list[int] = []
    many = max(DRAWN_AT_ONCE // table.shape[1], 1)
    steps = np.arange(table.shape[1], dtype=np.uint64) * np.uint64(_GOLDEN)
    for first in range(0, len(rows), many):
        part = slice(first, first + many)
        scores = table if len(rows[part]) == len(table) else table[rows[part]]
        weights, counters, shifted = room.take(*scores.shape)
        tops = scores.max(1, keepdims=True)
        heats = np.array(temperatures[part])[:, None]
        with np.errstate(invalid="ignore"):
            never = scores < tops - (NEVER * heats).astype(np.float32)
            np.subtract(scores, tops, out=weights, dtype=np.float64)
            weights /= heats
            np.exp(weights, out=weights)
            weights[never] = 0.0
            np.add(steps, np.array(starts[part], np.uint64)[:, None], out=counters)
            weights /= _times(counters, shifted)
        winners += np.where(np.isfinite(tops[:, 0]), weights.argmax(1), -1).tolist()
    return winners


def _why_nothing(score: float) -> str:
    if score == -np.inf:
        return "no token is allowed here: the grammar or the logit bias forbids all of them"
    return "the model gave logits that are not numbers"


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of `logits [..., V]`, fp32."""
    shifted = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def most_likely(logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` largest of `logprobs [V]` with their ids, best first."""
    if not count:
        return ()
    count = min(count, len(logprobs))
    ids = np.argpartition(-logprobs, count - 1)[:count]
    ids = ids[np.lexsort((ids, -logprobs[ids]))]
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
