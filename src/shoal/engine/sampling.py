"""Chooses tokens from logits, one request at a time, in numpy. V is the size of the vocabulary.

A sampled token is the winner of a race (`race`) among those that penalties, mask, top-k, top-p and min-p leave.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np
from torch import Tensor

from ..config import SamplingOptions, UserError
from .race import NEVER, Room, draw, race_start, race_times
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
        self.changes = self._counts_answer or self._repeats or bool(options.logit_bias) or mask is not None
        """Whether the request chooses by other logits than the model's."""
        leaves_out = bool(options.temperature) and (options.top_k > 0 or options.top_p < 1 or bool(options.min_p))
        self.is_simple = not (self.changes or leaves_out)
        """A race of all tokens by their logits chooses (once `min_tokens` are there): one call serves a whole batch."""

    @property
    def holds_back_stops(self) -> bool:
        """Whether the answer is still shorter than `min_tokens`."""
        return self._length < self.options.min_tokens

    @property
    def may_stop(self) -> bool:
        """Whether a stop may end the answer here."""
        return self.mask is None or self.mask.is_whole

    def accept(self, token: int) -> None:
        """`token` is the next one of the answer."""
        self._length += 1
        if self._counts_answer:
            self._answer[token] += 1
        if self._repeats:
            self._seen.add(token)
        if self.mask is not None:
            self.mask.accept(token)

    def race_start(self, position: int) -> int:
        """Where the random numbers of the race for the token at `position` begin; nothing is random at temperature 0."""
        return race_start(self.seed, position) if self.options.temperature else 0

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
        return int(ids[np.argmax(weights / race_times(self.race_start(position), ids))])

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """Logits after penalties, bias, `min_tokens` and mask; a copy where anything changes."""
        if not self.changes and not self.holds_back_stops:
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
        allowed = self.mask.allowed() if self.mask is not None else None
        if allowed is not None:
            scores[~allowed] = -np.inf
        # Where a grammar is at its end, it allows nothing but stops: it comes before `min_tokens`.
        if self.holds_back_stops and (allowed is None or allowed.sum() > allowed[self._stop_ids].sum()):
            scores[self._stop_ids] = -np.inf
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


class SamplingError(Exception):
    """One request cannot go on; the others can."""


class Rows:
    """Logits `[M, V]` of M places, brought to the host. Tokens of simple requests are chosen for all rows at once, in `room`.

    `places`: the sampler and the position of every row.
    """

    def __init__(self, logits: Tensor, places: Sequence[tuple[Sampler, int]], room: Room) -> None:
        self.table, self._places = on_host(logits), places
        rows = [row for row, (sampler, _) in enumerate(places) if sampler.is_simple]
        self._winners: dict[int, int] = {}
        if rows:
            temperatures = [places[row][0].options.temperature for row in rows]
            starts = [places[row][0].race_start(places[row][1]) for row in rows]
            self._winners = dict(zip(rows, draw(self.table, rows, temperatures, starts, room), strict=True))

    def choose(self, row: int) -> int:
        """See `Sampler.choose`."""
        sampler, position = self._places[row]
        winner = self._winners.get(row, -1)
        return winner if winner >= 0 and not sampler.holds_back_stops else sampler.choose(self.table[row], position)


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
