"""From tokens to text that can be shown: whole characters, and nothing that turns out to belong to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import islice

from ..data import Tokenizer


class TextStream:
    """Turns ids into text piece by piece, holding back bytes that do not yet make a whole character.

    The pieces together are what the tokenizer makes of all ids at once, behind those of the text that they continue.
    """

    def __init__(self, tokenizer: Tokenizer, behind: Sequence[int] = ()) -> None:
        self._text: _Bytes | _Pieces = _Bytes(tokenizer) if tokenizer.writes_bytes else _Pieces(tokenizer, behind)

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is still open."""
        return self._text.push(token)

    def finish(self) -> str:
        """What is still held back, at the end."""
        return self._text.finish()


class _Bytes:
    """For tokenizers whose tokens are bytes: far cheaper than to ask the tokenizer for every token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._written = tokenizer.written
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._written(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Pieces:
    """For all others. Some decode a token differently at the beginning of a text (they drop its space), so the tokens of the last
    piece are decoded again with what follows."""

    def __init__(self, tokenizer: Tokenizer, behind: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        """Tokens of the last piece."""
        if not tokenizer.begins_text(behind):  # half a character would spoil the bytes after it
            whole = (token for token in reversed(behind) if (text := tokenizer.decode([token])) and "\ufffd" not in text)
            self._shown = list(islice(whole, 1))
        self._open: list[int] = []
        """Tokens since then."""

    def push(self, token: int) -> str:
        self._open.append(token)
        piece = self._undecided()
        # A replacement character at the end may be the beginning of a character.
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._shown, self._open = self._open, []
        return piece

    def finish(self) -> str:
        piece = self._undecided()
        self._shown, self._open = [], []
        return piece

    def _undecided(self) -> str:
        """Text of the open tokens."""
        return self._tokenizer.decode(self._shown + self._open)[len(self._tokenizer.decode(self._shown)) :]


class StopStrings:
    """Finds the first stop string in text that comes in pieces; where the pieces are cut does not matter."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What can be shown now that `piece` has come: all but an end with which a stop string may begin.

        Once a stop string is complete, `found` is the one that ended first (of several that end there, the longest), and
        the text ends before it.
        """
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        ends = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            _, place, self.found = min(ends)
            self._held = ""
            return text[:place]
        shown = self._open_from(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What is still held back, when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _open_from(self, text: str) -> int:
        """Where the earliest end of `text` begins with which a stop string may begin; its length where there is none."""
        longest = max(map(len, self._stops)) - 1
        for start in range(max(len(text) - longest, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
