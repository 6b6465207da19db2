"""Multi-token prediction guesses tokens ahead; the main model checks several positions in one step.

Nothing changes but the speed: see `race` for why the text stays the same. The MTP module runs over the same positions as the
main model, one step later in effect, because its entry at position i needs token i + 1. While guessing is switched off, the
hidden states of the positions it misses are kept (some hundred at most), so that it can catch up in one pass.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from statistics import median
from typing import Literal

import numpy as np
import torch

from .batch import PAGE, Batch
from .race import Races
from .runner import Runner, on_host
from .sampling import Sampler, SamplingError
from .scheduler import Sequence

MOST_BEHIND = 512
"""Positions whose hidden states are kept for the MTP module to catch up."""
PROBE = 8
"""Steps that measure one way of running."""
REST, LONGEST_REST = 64, 2048
"""Steps with the fastest way before the others are measured again; twice as many each time that the result is the same."""
HOPELESS = 1.1
"""Times the seconds per token without guesses that one guess takes where more are not even tried: trying them costs most."""
MEASURED = 2 * PROBE
"""Latest steps of one way of running that its rate is taken from."""


def keep_behind(sequence: Sequence, hidden: torch.Tensor, first: int, count: int) -> None:
    """Remember some rows of hidden states `[N, D]`, those of positions just computed, until the MTP module has seen them."""
    if not sequence.drafting:
        return
    sequence.behind.append(hidden if count == len(hidden) else hidden[first : first + count])
    if sequence.computed - sequence.ahead > MOST_BEHIND:
        sequence.drafting, sequence.behind = False, []


class Drafter:
    """Runs the MTP module and guesses tokens, those after the first by running it on its own output."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, sequences: Iterable[tuple[Sequence, Sampler]], most: int) -> None:
        """Bring the MTP cache of all sequences up to date; up to `most` guesses for those whose next token is to be chosen next."""
        active = [(sequence, sampler) for sequence, sampler in sequences if sequence.drafting and sequence.behind]
        if not active:
            return
        ids, next_ids, firsts = [], [], []
        hidden: list[torch.Tensor] = []
        races = Races([], [])
        for sequence, sampler in active:
            ids.append(sequence.tokens[sequence.ahead : sequence.computed])
            next_ids += sequence.tokens[sequence.ahead + 1 : sequence.computed + 1]
            firsts.append(sequence.ahead)
            hidden += sequence.behind
            first = len(sequence.tokens)
            races.temperatures.append(sampler.options.temperature)
            races.starts.append([sampler.race_start(first + i) for i in range(_count(sequence, sampler, most))])
        batch = Batch.lay_out(ids, firsts, [sequence.table for sequence, _ in active], most - 1)
        guesses = self._runner.guess(
            batch, hidden[0] if len(hidden) == 1 else torch.cat(hidden), torch.from_numpy(np.array(next_ids)), races
        )
        row = 0
        for (sequence, sampler), tokens, starts in zip(active, guesses.tokens, races.starts, strict=True):
            sequence.ahead, sequence.behind = sequence.computed, []
            if starts and sampler.changes:
                tokens = _chosen(sampler, guesses.logits[row], len(sequence.tokens))
            sequence.drafts += tokens
            row += bool(starts)


def _count(sequence: Sequence, sampler: Sampler, most: int) -> int:
    """How many tokens to guess: the last guess is checked before the limit, and the module needs pages for all but two."""
    if sequence.todo != 1:
        return 0
    first = len(sequence.tokens)
    return max(min(1 if sampler.changes else most, sequence.limit - first - 1, len(sequence.pages) * PAGE - first + 2), 0)


def _chosen(sampler: Sampler, logits: torch.Tensor, position: int) -> list[int]:
    """One guess for a request with penalties, a mask or the like, whose draws are no plain races; none where it may choose nothing."""
    try:
        return [sampler.choose(on_host(logits), position)]
    except SamplingError:
        return []


class _Rate:
    """Seconds per token of one way of running, from its latest steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=MEASURED)

    def add(self, seconds: float, tokens: int) -> None:
        self._steps.append((seconds, tokens))

    @property
    def is_known(self) -> bool:
        return bool(self._steps)

    @property
    def per_token(self) -> float:
        """By the median of the steps' times: a single one that something else held up must not decide."""
        return median(seconds for seconds, _ in self._steps) * len(self._steps) / sum(tokens for _, tokens in self._steps)


class _Choice:
    """What is known about one size of batch, and what is done next."""

    def __init__(self, ways: tuple[int, ...]) -> None:
        """`ways`: numbers of guesses, increasing."""
        self.rates = {way: _Rate() for way in ways}
        self._best: int | None = None
        self._measure(ways)

    def _measure(self, ways: Iterable[int]) -> None:
        """These ways next, one after the other."""
        self.way, *self._to_measure = ways
        self._left, self._rest, self._resting = PROBE, REST, False

    def another_text(self) -> None:
        """How often guesses are right has to be found out anew; what a step without them takes has not."""
        for way in filter(None, self.rates):
            self.rates[way] = _Rate()
        self._measure([way for way in self.rates if not self.rates[way].is_known])

    def add(self, seconds: float, tokens: int) -> None:
        """A step went this way."""
        now = self.rates[self.way]
        now.add(seconds, tokens)
        self._left -= 1
        if self._resting and self.way and self._left % PROBE == 0 and now.per_token > self.rates[0].per_token:
            self._left = 0  # guesses are right more seldom than they were
        if self._left > 0:
            return
        if self._resting:
            self._to_measure, self._resting = [way for way in self.rates if way != self.way], False
        while self._to_measure:
            way = self._to_measure.pop(0)
            if way <= 1 or self.rates[1].per_token < HOPELESS * self.rates[0].per_token:
                self.way, self._left = way, PROBE
                return
            self.rates[way] = _Rate()
        known = [way for way in self.rates if self.rates[way].is_known]
        self.way = min(known, key=lambda way: self.rates[way].per_token)
        self._rest = min(2 * self._rest, LONGEST_REST) if self.way == self._best else REST
        self._best, self._left, self._resting = self.way, self._rest, True


class Switch:
    """Decides by measured seconds per token how many tokens to guess ahead, if any: for every size of batch by itself, and for an
    answer that is alone by itself, since how often guesses are right depends on the text."""

    def __init__(self, mode: Literal["auto", "on", "off"], most: int) -> None:
        """`most`: the number of guesses that "on" means; "auto" takes as many, one, or none."""
        self._fixed = {"auto": None, "on": most, "off": 0}[mode]
        ways = tuple(sorted({0, 1, most}))
        self._choices: defaultdict[int, _Choice] = defaultdict(lambda: _Choice(ways))
        self._alone: int | None = None

    def guesses(self, answering: list[int]) -> int:
        """How many tokens the next step should guess of each of these answers (their numbers)."""
        if self._fixed is not None:
            return self._fixed
        choice = self._choices[len(answering).bit_length()]
        if len(answering) == 1 and self._alone != answering[0]:
            if self._alone is not None:
                choice.another_text()
            self._alone = answering[0]
        return choice.way

    def record(self, sequences: int, guesses: int, tokens: int, seconds: float) -> None:
        """A step with `sequences` answers, `guesses` of each and no prompt gave `tokens`."""
        choice = self._choices[sequences.bit_length()]
        if self._fixed is None and choice.way == guesses:
            choice.add(seconds, tokens)
