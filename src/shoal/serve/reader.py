"""An answer as it comes, split into thought, content and tool calls."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from .partial_json import PartialObject

THINK, END_THINK = "<think>", "</think>"
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


@dataclass
class CallPart:
    """A piece of a tool call. The first of a call has its `name` and `id`, all have more of its `arguments`, which together are JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Piece:
    """More of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallPart, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class AnswerReader:
    """Splits text that comes in pieces; where it is cut does not matter.

    `thinking`: the answer begins in a thought (the prompt ends with `<think>`). Otherwise one may open it, if `may_think`.
    `calls`: look for tool calls, in the forms of DeepSeek-R1 and V3.1; at most one unless `parallel`.
    """

    def __init__(self, thinking: bool = False, may_think: bool = False, calls: bool = False, parallel: bool = True) -> None:
        self._calls, self._parallel = calls, parallel
        self._state = "think" if thinking else "start" if may_think else "content"
        self._held = ""
        self._space = ""
        """White space at the end of the thought so far: passed on once something follows."""
        self._trims = True
        self._index = -1
        self._arguments = PartialObject()

    @property
    def is_thinking(self) -> bool:
        return self._state == "think"

    @property
    def has_calls(self) -> bool:
        return self._index >= 0

    def push(self, text: str) -> Piece:
        """What `text` adds."""
        self._held += text
        piece = Piece()
        while self._read(piece):
            pass
        return piece

    def finish(self) -> Piece:
        """What is still held back, at the end of the answer."""
        piece = Piece()
        held, self._held = self._held, ""
        if self._state == "think":
            self._think(piece, held)
        elif self._state in ("start", "content"):
            piece.content += held
        elif self._state == "arguments":
            self._argue(piece, held)
            self._end_call(piece)
        return piece

    def _read(self, piece: Piece) -> bool:
        """Read on from what is held; False when more text is needed."""
        if not self._held:
            return False
        return bool(getattr(self, f"_in_{self._state}")(piece))

    def _in_start(self, piece: Piece) -> bool:
        begin = self._held.lstrip()
        if begin.startswith(THINK):
            self._held, self._state = begin[len(THINK) :], "think"
        elif THINK.startswith(begin):
            return False
        else:
            self._state = "content"
        return True

    def _in_think(self, piece: Piece) -> bool:
        before, found = self._take_until(END_THINK)
        self._think(piece, before)
        if found:
            self._state = "after"
        return found

    def _in_after(self, piece: Piece) -> bool:
        """White space between thought and content belongs to neither."""
        self._held = self._held.lstrip()
        if not self._held:
            return False
        self._state = "content"
        return True

    def _in_content(self, piece: Piece) -> bool:
        if not self._calls:
            piece.content += self._held
            self._held = ""
            return False
        before, found = self._take_until(CALLS)
        piece.content += before
        if found:
            self._state = "calls"
        return found

    def _in_calls(self, piece: Piece) -> bool:
        """Between calls: nothing but their beginning or the end of all counts."""
        begin, end = self._held.find(CALL), self._held.find(END_CALLS)
        if end >= 0 and not 0 <= begin < end:
            self._held, self._state = "", "end"
        elif begin >= 0:
            self._held = self._held[begin + len(CALL) :]
            self._state = "end" if self._index >= 0 and not self._parallel else "name"
        else:
            self._held = self._held[-max(len(CALL), len(END_CALLS)) :]
            return False
        return True

    def _in_name(self, piece: Piece) -> bool:
        before, found, after = self._held.partition(SEPARATOR)
        if not found:
            return False
        name = before.strip()
        if name == "function" and not after.lstrip().startswith("{"):  # R1's form, and no tool of that name
            line, end, rest = after.partition("\n")
            if not end:
                return False
            name, after = line.strip(), rest
        self._held, self._state = after, "arguments"
        self._index += 1
        self._arguments = PartialObject()
        piece.calls += (CallPart(self._index, f"call_{secrets.token_hex(12)}", name),)
        return True

    def _in_arguments(self, piece: Piece) -> bool:
        before, found = self._take_until(END_CALL)
        self._argue(piece, before)
        if found:
            self._end_call(piece)
            self._state = "calls"
        return found

    def _in_end(self, piece: Piece) -> bool:
        self._held = ""
        return False

    def _think(self, piece: Piece, text: str) -> None:
        """Pass thought on, without white space around it."""
        text = self._space + text
        if self._trims:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :] if shown or not self._trims else ""
        self._trims = self._trims and not shown
        piece.reasoning += shown

    def _argue(self, piece: Piece, text: str) -> None:
        self._add_arguments(piece, self._arguments.push(text))

    def _end_call(self, piece: Piece) -> None:
        self._add_arguments(piece, self._arguments.finish())

    def _add_arguments(self, piece: Piece, text: str) -> None:
        if not text:
            return
        if piece.calls and piece.calls[-1].index == self._index:
            piece.calls[-1].arguments += text
        else:
            piece.calls += (CallPart(self._index, arguments=text),)

    def _take_until(self, marker: str) -> tuple[str, bool]:
        """Text up to `marker`, which is dropped, and whether it is there; else all with which it cannot begin."""
        before, found, after = self._held.partition(marker)
        if found:
            self._held = after
            return before, True
        kept = next((size for size in range(min(len(marker) - 1, len(before)), 0, -1) if marker.startswith(before[-size:])), 0)
        self._held = before[len(before) - kept :]
        return before[: len(before) - kept], False
