"""Multi-token prediction guesses tokens ahead; the main model checks several positions in one step.

Nothing changes but the speed: see `sampling` for why the text stays the same. The MTP module runs over the same positions as the
main model, one step later in effect, because its entry at position i needs token i + 1. While guessing is switched off, the
hidden states of the positions it misses are kept (some hundred at most), so that it can catch up in one pass.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch

from .batch import PAGE, Batch
from .runner import Runner, take_rows
from .sampling import Room, Rows, Sampler, SamplingError
from .scheduler import Sequence

MOST_BEHIND = 512
"""Positions whose hidden states are kept for the MTP module to catch up."""
PROBE = 12
"""Steps that measure one way of running."""
REST, LONGEST_REST = 128, 2048
"""Steps with the faster way before the other is measured again; twice as many each time that the result is the same."""
MEASURED = 2 * PROBE
"""Latest steps of one way of running that its rate is taken from."""


def keep_behind(sequence: Sequence, hidden: torch.Tensor) -> None:
    """Remember hidden states `[n, D]` of positions just computed, until the MTP module has seen them."""
    if not sequence.drafting:
        return
    sequence.behind.append(hidden)
    if sequence.computed - sequence.ahead > MOST_BEHIND:
        sequence.drafting, sequence.behind = False, []


class Drafter:
    """Runs the MTP module and guesses up to `depth` tokens, those after the first by running it on its own output."""

    def __init__(self, runner: Runner, depth: int) -> None:
        self._runner, self._depth = runner, depth
        self._room = Room()

    def run(self, sequences: Iterable[tuple[Sequence, Sampler]]) -> None:
        """Bring the MTP cache of all sequences up to date and guess for those whose next token is to be chosen next."""
        active = [(sequence, sampler) for sequence, sampler in sequences if sequence.drafting and sequence.behind]
        if not active:
            return
        ids, next_ids, firsts = [], [], []
        for sequence, _ in active:
            ids.append(sequence.tokens[sequence.ahead : sequence.computed])
            next_ids += sequence.tokens[sequence.ahead + 1 : sequence.computed + 1]
            firsts.append(sequence.ahead)
        batch = Batch.lay_out(ids, firsts, [sequence.table for sequence, _ in active])
        rows = [part for sequence, _ in active for part in sequence.behind]
        hidden = self._runner.draft(batch, rows[0] if len(rows) == 1 else torch.cat(rows), torch.tensor(next_ids))
        for sequence, _ in active:
            sequence.ahead, sequence.behind = sequence.computed, []
        guessing, last, end = [], [], 0
        for (sequence, sampler), new in zip(active, ids, strict=True):
            end += len(new)
            if sequence.todo == 1 and len(sequence.tokens) < sequence.limit - 1:
                guessing.append((sequence, sampler))
                last.append(end - 1)
        if guessing:
            self._guess(guessing, take_rows(hidden, last))

    def _guess(self, active: list[tuple[Sequence, Sampler]], hidden: torch.Tensor) -> None:
        """One guess for each of `active` from `hidden [len(active), D]`, then further ones."""
        for depth in range(1, self._depth + 1):
            places = [(sampler, len(sequence.tokens) + depth - 1) for sequence, sampler in active]
            rows = Rows(self._runner.logits(hidden), places, self._room)
            keep = []
            for i, (sequence, sampler) in enumerate(active):
                place = len(sequence.tokens) + depth - 1
                try:
                    sequence.drafts.append(rows.choose(i, sampler, place))
                except SamplingError:
                    continue
                if sampler.mask is None and place <= len(sequence.pages) * PAGE and place < sequence.limit - 2:
                    keep.append(i)
            if depth == self._depth or not keep:
                return
            active = [active[i] for i in keep]
            ids = [[(sequence.tokens[-1:] + sequence.drafts)[-2]] for sequence, _ in active]
            firsts = [len(sequence.tokens) + depth - 2 for sequence, _ in active]
            batch = Batch.lay_out(ids, firsts, [sequence.table for sequence, _ in active])
            # The entries that this writes are made anew once the true hidden states are there.
            hidden = self._runner.draft(batch, take_rows(hidden, keep), torch.tensor([sequence.drafts[-1] for sequence, _ in active]))


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


@dataclass
class _Choice:
    """What is known about one size of batch."""

    guess: bool = True
    left: int = PROBE
    """Steps until the next decision."""
    rest: int = REST
    rates: dict[bool, _Rate] = field(default_factory=lambda: {True: _Rate(), False: _Rate()})

    def add(self, seconds: float, tokens: int) -> None:
        self.rates[self.guess].add(seconds, tokens)
        self.left -= 1
        if self.left > 0:
            return
        if not self.rates[not self.guess].is_known:
            self.guess, self.left = not self.guess, PROBE
            return
        best = self.rates[True].per_token < self.rates[False].per_token
        if self.guess != best:
            self.guess, self.left = best, self.rest
            self.rest = min(2 * self.rest, LONGEST_REST)
        else:
            # Either the rest is over, or a probe has turned out to be the better way.
            self.guess, self.left = not self.guess, PROBE


class Switch:
    """Decides by measured seconds per token whether guessing pays, for every size of batch by itself."""

    def __init__(self, mode: Literal["auto", "on", "off"]) -> None:
        self._mode = mode
        self._choices: defaultdict[int, _Choice] = defaultdict(_Choice)

    def guesses(self, sequences: int) -> bool:
        """Whether the next step with so many answers should guess."""
        return self._mode == "on" or (self._mode == "auto" and self._choices[sequences.bit_length()].guess)

    def record(self, sequences: int, guessed: bool, tokens: int, seconds: float) -> None:
        """A step with `sequences` answers and no prompt gave `tokens`."""
        choice = self._choices[sequences.bit_length()]
        if self._mode == "auto" and choice.guess == guessed:
            choice.add(seconds, tokens)
