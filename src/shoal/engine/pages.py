"""Who holds which page of the cache, and which pages' contents are known.

A full page is known by its tokens and the page before it. Its entries depend on no other tokens, except that the entry of an
MTP layer at position i is made from token i + 1 too: for models that speculate, the tokens of a page therefore include the one
after its last position (`ahead` = 1), and a page is found only where that token is the same.

Pages are looked up by (serial number of the known page before, tokens). The dictionary compares the tokens themselves and a
serial number is never used again, so that no collision of hashes can hand out a wrong page. Shared pages are never written: where
a sequence leaves a known page in its middle, it gets a copy of it and writes there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from .batch import PAGE

ROOT = 0
"""Stands for the page before the first."""
CANDIDATES = 8
"""Pages that are compared when one that is known only in part is looked for."""


@dataclass
class Known:
    """A page whose content others may use."""

    page: int
    serial: int
    before: int
    """Serial number of the page before it."""
    tokens: bytes
    origin: int | None = None
    """Where the text begins for the entries of the MTP layer; None: there are none."""


@dataclass
class Match:
    """The longest known beginning of some tokens."""

    pages: list[int] = field(default_factory=list)
    serial: int = ROOT
    """Of the last of them."""
    origin: int = 0
    """From this position on, where a page begins, there are MTP entries of one text: the next page to come if there are none."""
    partial: int | None = None
    """A page that goes on the same for some positions: to be copied."""
    positions: int = 0
    """How many tokens are known in all."""


class PagePool:
    """All pages of the cache, with the number of sequences that hold each.

    Pages that nobody holds are free, or known and kept until their room is needed; the one unused longest goes first.
    """

    def __init__(self, pages: int, *, prefix_cache: bool = True, ahead: int = 0) -> None:
        self.pages, self.shares, self._ahead = pages, prefix_cache, ahead
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._after: dict[int, dict[bytes, Known]] = {}
        """Serial number of a page -> known pages that follow it, by their tokens."""
        self._by_page: dict[int, Known] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Known pages that nobody holds, the one unused longest first."""
        self._serials = ROOT

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Pages that sequences hold."""
        return self.pages - self.available

    @property
    def known(self) -> int:
        """Pages whose content others may use."""
        return len(self._by_page)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def take(self) -> int:
        """A page for one holder, its content undefined. There must be one `available`."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that is held or known."""
        if not self._holders[page]:
            del self._idle[page]
        self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of every page of a sequence, in their order."""
        # From the last to the first: a page is of no use without those before it, so it has to be the first to go.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._by_page:
                self._idle[page] = None
            else:
                self._free.append(page)

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest known beginning of `tokens` that leaves at least one token to compute. Holds nothing yet."""
        found = Match()
        if not self.shares:
            return found
        while found.positions + PAGE < len(tokens):
            known = self._after.get(found.serial, {}).get(self._tokens(tokens, found.positions))
            if known is None:
                break
            found.pages.append(known.page)
            found.origin = _origin(found, known)
            found.positions += PAGE
            found.serial = known.serial
        self._match_part(found, tokens)
        return found

    def _match_part(self, found: Match, tokens: Sequence[int]) -> None:
        wanted, most = self._tokens(tokens, found.positions), len(tokens) - 1 - found.positions
        best: tuple[int, Known] | None = None
        for known in islice(reversed(self._after.get(found.serial, {}).values()), CANDIDATES):
            # The MTP entry of the last common token was made with another token after it.
            count = min(_common(wanted, known.tokens) - self._ahead, most)
            if count > (best[0] if best else 0):
                best = count, known
        if best:
            found.partial = best[1].page
            found.origin = _origin(found, best[1])
            found.positions += best[0]

    def can_publish(self, tokens: int, start: int) -> bool:
        """Whether so many tokens say all about the page at position `start`."""
        return start + PAGE + self._ahead <= tokens

    def publish(self, before: int, tokens: Sequence[int], start: int, page: int) -> int:
        """Make `page` known: it holds positions `start` ... `start + PAGE - 1` of `tokens`, after the page with serial `before`.

        Returns its serial number; if such a page is known already, that one's.
        """
        if not self.shares:
            return ROOT
        content = self._tokens(tokens, start)
        known = self._after.get(before, {}).get(content)
        if known is not None:
            return known.serial
        self._serials += 1
        known = Known(page, self._serials, before, content)
        self._after.setdefault(before, {})[content] = self._by_page[page] = known
        return self._serials

    def publish_drafts(self, page: int, origin: int) -> None:
        """`page` holds the MTP entries of a text that begins at `origin` too; nothing happens where another page is known in its place."""
        if page in self._by_page:
            self._by_page[page].origin = origin

    def forget_all(self) -> None:
        """No page is known any more: for when the model's weights have changed."""
        for page in list(self._by_page):
            self._forget(page)
        self._free += self._idle
        self._idle.clear()

    def _forget(self, page: int) -> None:
        known = self._by_page.pop(page)
        siblings = self._after[known.before]
        del siblings[known.tokens]
        if not siblings:
            del self._after[known.before]

    def _tokens(self, tokens: Sequence[int], start: int) -> bytes:
        """What the page at `start` depends on, besides the pages before it."""
        return array("i", tokens[start : start + PAGE + self._ahead]).tobytes()


def _origin(found: Match, after: Known) -> int:
    """Where MTP entries begin once the page `after` follows on `found`: those made for another beginning are of no use."""
    return after.origin if after.origin in (found.origin, found.positions) else found.positions + PAGE


def _common(a: bytes, b: bytes) -> int:
    """Number of tokens in which both begin alike."""
    size = array("i").itemsize
    for i in range(0, min(len(a), len(b)), size):
        if a[i : i + size] != b[i : i + size]:
            return i // size
    return min(len(a), len(b)) // size
