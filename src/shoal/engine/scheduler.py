"""Which tokens the next step computes.

One budget of tokens per step is shared by answers (one token each, and what multi-token prediction guessed) and prompts (in
pieces, with what is left: guesses leave them half). Requests are served in the order in which they came. Pages that run out are
taken from the youngest, which starts over later (what it had computed is often still known to the prefix cache). All running
requests are older than all waiting ones, so the oldest can always go on, and nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .batch import PAGE
from .pages import ROOT, PagePool


class Sequence:
    """The tokens of one request and where their entries lie in the cache."""

    def __init__(self, number: int, prompt: list[int], limit: int) -> None:
        self.number = number
        """Requests that came later have larger ones."""
        self.tokens = list(prompt)
        self.limit = limit
        """It never has more tokens than this."""
        self.reads_all = False
        """Every token has to be computed, although the prefix cache may know it: for prompt log-probabilities and the like."""
        self.drafts: list[int] = []
        """Guesses of the tokens that follow."""
        self.table = np.zeros(16, np.int32)
        self.reset()

    def reset(self) -> None:
        """Nothing is computed, no page is held."""
        self.pages: list[int] = []
        self.computed = 0
        """Positions whose entries are in the cache."""
        self.published, self.serial = 0, ROOT
        """Pages that others may use, and the serial number of the last of them."""
        self.origin = self.ahead = 0
        """Between these positions there are MTP entries: to the module, the text begins at `origin`, where a page begins."""
        self.drafted = 0
        """Pages that are done with: others may use their MTP entries, or they have none."""
        self.behind: list[Tensor] = []
        """Hidden states `[n, D]` of the positions from `ahead` to `computed`."""
        self.drafts = []

    @property
    def todo(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    def begin_drafts(self, origin: int, ahead: int) -> None:
        """There are MTP entries from `origin`, where a page begins, to `ahead`."""
        self.origin, self.ahead, self.drafted = origin, ahead, ahead // PAGE

    def add_pages(self, pages: list[int]) -> None:
        end = len(self.pages) + len(pages)
        if end > len(self.table):
            self.table = np.resize(self.table, 2 * end)
        self.table[len(self.pages) : end] = pages
        self.pages += pages


class Work(NamedTuple):
    """A sequence's share of a step."""

    sequence: Sequence
    length: int
    """Tokens to compute, guesses among them."""
    drafts: int
    """How many of them are guesses."""


@dataclass
class Limits:
    """What a step may hold."""

    step_tokens: int
    max_running: int


class Scheduler:
    """Decides what every step computes and gives out the pages for it. `copy_page(source, target)` copies a page's content."""

    def __init__(self, pool: PagePool, limits: Limits, copy_page: Callable[[int, int], None]) -> None:
        self._pool, self._limits, self._copy_page = pool, limits, copy_page
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """The oldest first."""
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its number is larger than all before."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._pool.release(sequence.pages)
            sequence.reset()
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Work]:
        """The next step; empty only if there is nothing to do."""
        work = self._answers()
        budget = self._limits.step_tokens - sum(share.length for share in work)
        for sequence in self.running:
            if budget and sequence.todo > 1:
                count = min(sequence.todo, budget)
                work.append(Work(sequence, count, 0))
                budget -= count
        while budget and self.waiting and len(self.running) < self._limits.max_running and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            count = min(sequence.todo, budget)
            work.append(Work(sequence, count, 0))
            budget -= count
        return work

    def _answers(self) -> list[Work]:
        """One token (and guesses) of every running sequence that has no more than that to compute."""
        work = []
        spare = self._limits.step_tokens - len(self.running)
        if any(sequence.todo > 1 for sequence in self.running) or (self.waiting and len(self.running) < self._limits.max_running):
            spare //= 2  # guesses of many answers could take all of it, step after step
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            position += 1
            if sequence.todo > 1:
                continue
            drafts = min(len(sequence.drafts), spare, sequence.limit - len(sequence.tokens) - 1)
            if drafts > 0 and not self._grow(sequence, len(sequence.tokens) + drafts):
                drafts = 0
            drafts = max(drafts, 0)
            while not self._grow(sequence, len(sequence.tokens)):
                if self._preempt_youngest() is sequence:
                    break
            else:
                del sequence.drafts[drafts:]
                spare -= drafts
                work.append(Work(sequence, 1 + drafts, drafts))
        return work

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Give `sequence` pages for `length` positions; False where there are not enough."""
        missing = -(-length // PAGE) - len(sequence.pages)
        if missing > self._pool.available:
            return False
        if missing > 0:
            sequence.add_pages([self._pool.take() for _ in range(missing)])
        return True

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self._pool.release(sequence.pages)
        sequence.reset()
        self.waiting.appendleft(sequence)
        self.preemptions += 1
        return sequence

    def _admit(self, sequence: Sequence) -> bool:
        """Give `sequence` the pages of all its tokens; False where it has to wait."""
        pool = self._pool
        match = pool.match([] if sequence.reads_all else sequence.tokens)
        if not sequence.reads_all and self._is_being_computed(sequence, match.positions):
            return False
        missing = -(-len(sequence.tokens) // PAGE) - len(match.pages)
        room = pool.available - sum(map(pool.is_idle, match.pages))
        # Everyone running may need a page soon: admitting on the last ones would only lead to preemption.
        if missing + len(self.running) > room:
            return False
        if match.partial is not None and missing == room:
            match.positions, match.partial = len(match.pages) * PAGE, None
        for page in match.pages:
            pool.hold(page)
        if match.partial is not None:
            pool.hold(match.partial)
        sequence.add_pages(match.pages + [pool.take() for _ in range(missing)])
        if match.partial is not None:
            self._copy_page(match.partial, sequence.pages[len(match.pages)])
            pool.release([match.partial])
        sequence.computed = match.positions
        sequence.begin_drafts(match.origin, max(match.origin, match.positions))
        sequence.published, sequence.serial = len(match.pages), match.serial
        return True

    def _is_being_computed(self, sequence: Sequence, known: int) -> bool:
        """Whether the page of `sequence` after the `known` positions is just being computed for another prompt."""
        end = (known // PAGE + 1) * PAGE
        if end >= len(sequence.tokens) or not self._pool.shares:
            return False
        return any(
            other.computed < end < len(other.tokens) and other.tokens[: end + 1] == sequence.tokens[: end + 1] for other in self.running
        )

    def publish(self, sequence: Sequence) -> None:
        """Let others use the full pages of `sequence`, and their MTP entries as soon as they are made."""
        end = PAGE * (sequence.published + 1)
        while end <= sequence.computed and self._pool.can_publish(len(sequence.tokens), end - PAGE):
            page = sequence.pages[sequence.published]
            sequence.serial = self._pool.publish(sequence.serial, sequence.tokens, end - PAGE, page)
            sequence.published += 1
            end += PAGE
        while sequence.drafted < min(sequence.published, sequence.ahead // PAGE):
            self._pool.publish_drafts(sequence.pages[sequence.drafted], sequence.origin)
            sequence.drafted += 1
