"""Multi-token prediction guesses tokens ahead; the main model checks several positions in one step.

Nothing changes but the speed: see `race` for why the text stays the same. The MTP module runs over the same positions as the
main model, one step later in effect, because its entry at position i needs token i + 1. While guessing is switched off, the
hidden states of the last positions that it misses are kept, so that it can catch up in one pass. What is before those, and what
the prefix cache knows without entries, it does without: it sees the text as if that began with a later page.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from math import inf
from statistics import median
from typing import Literal

import numpy as np
import torch

from .batch import PAGE, Batch
from .race import Races
from .runner import Runner, on_host
from .sampling import Sampler
from .scheduler import Sequence

MOST_BEHIND = 512
"""Positions whose hidden states are kept for the MTP module to catch up."""
PROBE = 8
"""Steps that measure one way of running."""
REST, LONGEST_REST = 64, 2048
"""Steps without a look at another way; twice as many each time that a look changes nothing."""
STALE = 512
"""Steps after which the time of another way is measured again, even if it was too long to be worth a look."""
REMEMBERED, CREDIT = 32, 4
"""How many guesses say how often they are right, and how many right ones a text or a look begins with: what is tried for nothing ends
after some steps, what is not tried is missed for many."""


def keep_behind(sequence: Sequence, hidden: torch.Tensor, first: int, count: int) -> None:
    """Remember some rows of hidden states `[N, D]`, those of positions just computed, until the MTP module has seen them.

    If they become too many, the module never sees the oldest: to it, the text begins with a later page.
    """
    wanted = min(count, sequence.computed - sequence.ahead)
    if wanted > 0:
        rows = hidden[first + count - wanted : first + count]
        # A view of some rows would keep all of them in memory.
        sequence.behind.append(rows if wanted == len(hidden) else rows.clone())
    if sequence.computed - sequence.ahead > MOST_BEHIND:
        origin = -(-(sequence.computed - MOST_BEHIND) // PAGE) * PAGE
        sequence.behind = [torch.cat(sequence.behind)[origin - sequence.ahead :].clone()]
        sequence.begin_drafts(origin, origin)


class Drafter:
    """Runs the MTP module and guesses tokens, those after the first by running it on its own output."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, sequences: Iterable[tuple[Sequence, Sampler]], most: int) -> None:
        """Bring the MTP cache of all sequences up to date; up to `most` guesses for those whose next token is to be chosen next."""
        active = [(sequence, sampler) for sequence, sampler in sequences if sequence.behind]
        if not active:
            return
        ids, next_ids, firsts = [], [], []
        hidden: list[torch.Tensor] = []
        races = Races([], [])
        for sequence, sampler in active:
            ids.append(sequence.tokens[sequence.ahead : sequence.computed])
            next_ids += sequence.tokens[sequence.ahead + 1 : sequence.computed + 1]
            firsts.append(sequence.ahead - sequence.origin)
            hidden += sequence.behind
            first = len(sequence.tokens)
            races.temperatures.append(sampler.options.temperature)
            races.starts.append([sampler.race_start(first + i) for i in range(_count(sequence, sampler, most))])
        batch = Batch.lay_out(ids, firsts, [sequence.table[sequence.origin // PAGE :] for sequence, _ in active], most - 1)
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
    except Exception:  # nothing is allowed, or a grammar failed: the request is told when the token itself is chosen
        return []


class _Choice:
    """What is known about one size of batch, and what is done next.

    What a step with so many guesses takes is a matter of the machine and stays known; how often guesses are right is a matter of
    the text. Both together say which way is the fastest.
    """

    def __init__(self, ways: tuple[int, ...]) -> None:
        """`ways`: numbers of guesses, increasing."""
        self._seconds: dict[int, deque[float]] = {way: deque(maxlen=PROBE) for way in ways}
        self._checked = self._right = float(CREDIT)
        """Guesses of late that the model has checked, and those that were right."""
        self._unseen = dict.fromkeys(ways, 0)
        """Steps since the last one of every way."""
        self._unknown = list(ways[1:])
        self.way, self._left, self._looks = ways[0], PROBE, True
        self._best: int | None = None
        self._rest = self._until_look = REST

    def another_text(self) -> None:
        """How often guesses are right has to be found out anew, and whether they pay is what the first steps are for."""
        self._checked = self._right = float(CREDIT)
        if not self._unknown:
            self.way, self._left, self._looks, self._best = self._fastest(filter(None, self._seconds)), PROBE, True, None

    def add(self, guesses: int, checked: int, right: int, seconds: float) -> None:
        """A step with so many guesses; of those `checked`, which end with the first that is wrong, so many were right."""
        if guesses in self._seconds:
            self._seconds[guesses].append(seconds)
        self._checked, self._right = self._checked + checked, self._right + right
        if self._checked > REMEMBERED:
            self._checked, self._right = REMEMBERED, self._right * REMEMBERED / self._checked
        self._left, self._until_look = self._left - 1, self._until_look - 1
        if self._left:
            return
        self._left = PROBE
        for way in self._unseen:
            self._unseen[way] = 0 if way == self.way else self._unseen[way] + PROBE
        if self._unknown:
            self.way = self._unknown.pop(0)
            return
        fastest = self._fastest(self._seconds)
        if self._looks or fastest != self.way:
            self._rest = min(2 * self._rest, LONGEST_REST) if fastest == self._best else REST
            self._best, self._until_look, self._looks = fastest, self._rest, False
        elif self._until_look <= 0:
            if not fastest:  # nothing was guessed for a while
                self._checked = self._right = float(CREDIT)
            others = [way for way in self._seconds if way != fastest]
            oldest = max(others, key=self._unseen.__getitem__)
            fastest, self._looks = oldest if self._unseen[oldest] > STALE else self._fastest(others), True
        self.way = fastest

    def _fastest(self, ways: Iterable[int]) -> int:
        share = self._right / self._checked

        def per_token(way: int) -> float:
            # The median: a single step that something else held up must not decide. A guess counts if all before it were right.
            return median(self._seconds[way]) / sum(share**i for i in range(way + 1)) if self._seconds[way] else inf

        return min(ways, key=per_token)


class Switch:
    """Decides by measured times how many tokens to guess ahead, if any: for every size of batch by itself, and for an answer that is
    alone by itself, since how often guesses are right depends on the text."""

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

    def record(self, sequences: int, guesses: int, checked: int, right: int, seconds: float) -> None:
        """A step with `sequences` answers and no prompt had up to `guesses` of each to check; see `_Choice.add` for the rest."""
        if self._fixed is None:
            self._choices[sequences.bit_length()].add(guesses, checked, right, seconds)
