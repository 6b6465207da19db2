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
from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from ..config import SamplingOptions, UserError
from .requests import TokenMask


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
        self.is_plain = not (options.temperature or self._counts_answer or self._repeats or options.logit_bias or mask)
        """Greedy without anything that changes logits: an argmax over a whole batch serves it (once `min_tokens` are there)."""

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
        weights = self.weights(scores)
        race = np.random.Generator(np.random.Philox(key=self.seed, counter=position)).standard_exponential(len(weights))
        return int(np.divide(weights, race, out=race).argmax())

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

    def weights(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities `[V]` fp64 up to a common factor, after temperature, top-k, top-p and min-p, in this order."""
        options = self.options
        top = scores.max()
        if not np.isfinite(top):
            raise SamplingError(_why_nothing(top))
        # In fp64, so that a tiny temperature cannot overflow.
        weights = np.subtract(scores, top, dtype=np.float64)
        weights /= options.temperature
        np.exp(weights, out=weights)
        if 0 < options.top_k < len(weights):
            weights[weights < np.partition(weights, -options.top_k)[-options.top_k]] = 0
        if options.top_p < 1:
            _keep_nucleus(weights, options.top_p)
        if options.min_p:
            weights[weights < options.min_p] = 0  # the largest weight is 1
        return weights


class SamplingError(Exception):
    """One request cannot go on; the others can."""


class Rows:
    """Logits `[M, V]` of M places, brought to the host; the largest of each are found all at once."""

    def __init__(self, logits: Tensor) -> None:
        self.table = logits.numpy(force=True)
        best = self.table.argmax(-1)
        self._best: list[int] = best.tolist()
        self._peaks: list[float] = self.table[np.arange(len(best)), best].tolist()

    def choose(self, row: int, sampler: Sampler, position: int) -> int:
        """See `Sampler.choose`."""
        if not sampler.is_plain or sampler.holds_back_stops:
            return sampler.choose(self.table[row], position)
        if not math.isfinite(self._peaks[row]):
            raise SamplingError(_why_nothing(self._peaks[row]))
        return self._best[row]


def _why_nothing(score: float) -> str:
    if score == -np.inf:
        return "no token is allowed here: the grammar or the logit bias forbids all of them"
    return "the model gave logits that are not numbers"


def _keep_nucleus(weights: np.ndarray, share: float) -> None:
    """Set to 0 all but the most likely tokens that together reach `share`."""
    wanted = share * weights.sum()
    # Most weight lies in few tokens: sort only those that can matter.
    count = 256
    while True:
        count = min(count, len(weights))
        likely = np.argpartition(weights, -count)[-count:] if count < len(weights) else np.arange(len(weights))
        likely = likely[np.argsort(-weights[likely], kind="stable")]
        total = np.cumsum(weights[likely])
        if total[-1] >= wanted or count == len(weights):
            break
        count *= 8
    kept = likely[: int(np.searchsorted(total, wanted)) + 1]
    values = weights[kept]
    weights[:] = 0
    weights[kept] = values


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
