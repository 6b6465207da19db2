"""An answer as it comes, split into thought, content and tool calls."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..data import Tokenizer
from ..engine.text import TextStream
from .partial_json import PartialObject

THINK, END_THINK = "<think>", "</think>"
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
SIGNS = {mark: chr(0xD800 + i) for i, mark in enumerate((THINK, END_THINK, CALLS, END_CALLS, CALL, SEPARATOR, END_CALL))}
"""What stands for the token of a mark while an answer is read: half characters, which no text that tokens write can hold."""


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


class Marks:
    """Finds the marks in an answer to `prompt` by their tokens: where ordinary tokens spell one, it is text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._stream = TextStream(tokenizer, prompt)
        tokens = {tokenizer.token_id(mark): sign for mark, sign in SIGNS.items()}
        self.signs = {token: sign for token, sign in tokens.items() if token is not None}
        self.texts = {ord(sign): tokenizer.decode([token]) for token, sign in self.signs.items()}
        """What the tokens behind the signs write, for `str.translate`; nothing where they are marked special."""
        self._written = 0
        """Characters that the tokens so far write."""
        self._found: deque[tuple[int, int, str]] = deque()
        """Where marks begin and end that the text has not reached, and their signs."""
        self._held = ""
        self._at = 0
        """Where that begins."""

    def push(self, text: str, tokens: Sequence[int]) -> str:
        """`text` with signs in place of marks; `tokens` may run ahead of it."""
        for token in tokens:
            self._written += len(self._stream.push(token))
            if (sign := self.signs.get(token)) is not None:
                self._found.append((self._written - len(self.texts[ord(sign)]), self._written, sign))
        self._held += text
        signed = ""
        while self._found and self._found[0][1] <= self._at + len(self._held):
            begin, end, sign = self._found.popleft()
            signed += self._take(begin) + sign
            self._take(end)
        return signed + self._take(self._found[0][0] if self._found else self._at + len(self._held))

    def _take(self, end: int) -> str:
        """What is held, up to a place in the answer."""
        size = end - self._at
        taken, self._held = self._held[:size], self._held[size:]
        self._at += len(taken)
        return taken


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether answers may hold a thought: the chat template writes its marks, and they are tokens."""
    return THINK in (tokenizer.chat_template or "") and None not in (tokenizer.token_id(THINK), tokenizer.token_id(END_THINK))


def thought_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[bool, bool]:
    """Whether `prompt` leaves its answer in a thought, and whether the answer may open one: where the prompt has not decided it."""
    if not thinks(tokenizer):
        return False, False
    last = next((token for token in reversed(prompt) if not tokenizer.token_bytes(token).isspace()), None)
    return last == tokenizer.token_id(THINK), last not in (tokenizer.token_id(THINK), tokenizer.token_id(END_THINK))


def reader_behind(tokenizer: Tokenizer, prompt: Sequence[int], calls: bool = False, parallel: bool = True) -> AnswerReader:
    """For one answer of a chat model to `prompt`; `calls` and `parallel` as `AnswerReader` has them."""
    return AnswerReader(Marks(tokenizer, prompt), *thought_of(tokenizer, prompt), calls=calls, parallel=parallel)


class AnswerReader:
    """Splits text that comes in pieces; where it is cut does not matter.

    `marks` finds the marks of thoughts and calls; without it, all is content.
    `thinking`: the answer begins in a thought (the prompt ends with `<think>`). Otherwise its first token may open one, if `may_think`.
    `calls`: look for tool calls, in the forms of DeepSeek-R1 and V3.1; at most one unless `parallel`.
    """

    def __init__(
        self, marks: Marks | None = None, thinking: bool = False, may_think: bool = False, calls: bool = False, parallel: bool = True
    ) -> None:
        self._marks, self._calls, self._parallel = marks, calls, parallel
        self._thinks, self._may_think = thinking, may_think
        self.thought_tokens = 0
        """Tokens of the thought, without its marks."""
        self._state = "think" if thinking else "start" if may_think else "content"
        self._held = ""
        self._space = ""
        """White space at the end of the thought so far: passed on once something follows."""
        self._trims = True
        self._index = -1
        self._arguments = PartialObject()

    @property
    def has_calls(self) -> bool:
        return self._index >= 0

    def push(self, text: str, tokens: Sequence[int] = ()) -> Piece:
        """What `text` adds, which `tokens` have written; they may run ahead of it."""
        self._held += text if self._marks is None else self._marks.push(text, tokens)
        self._count(tokens)
        piece = Piece()
        while self._read(piece):
            pass
        return piece

    def finish(self) -> Piece:
        """What closes a call that is open at the end of the answer."""
        piece = Piece()
        if self._state == "arguments":
            self._end_call(piece)
        return piece

    def _read(self, piece: Piece) -> bool:
        """Read on from what is held; False when more text is needed."""
        if not self._held:
            return False
        return bool(getattr(self, f"_in_{self._state}")(piece))

    def _in_start(self, piece: Piece) -> bool:
        if self._held.startswith(SIGNS[THINK]):
            self._held, self._state = self._held[1:], "think"
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
            piece.content += self._plain(self._held)
            self._held = ""
            return False
        before, found = self._take_until(CALLS)
        piece.content += self._plain(before)
        if found:
            self._state = "calls"
        return found

    def _in_calls(self, piece: Piece) -> bool:
        """Between calls: nothing but their beginning or the end of all counts."""
        begin, end = self._held.find(SIGNS[CALL]), self._held.find(SIGNS[END_CALLS])
        if end >= 0 and not 0 <= begin < end:
            self._held, self._state = "", "end"
        elif begin >= 0:
            self._held = self._held[begin + 1 :]
            self._state = "end" if self._index >= 0 and not self._parallel else "name"
        else:
            self._held = ""
        return bool(self._held)

    def _in_name(self, piece: Piece) -> bool:
        before, found, after = self._held.partition(SIGNS[SEPARATOR])
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
        piece.calls += (CallPart(self._index, f"call_{secrets.token_hex(12)}", self._plain(name)),)
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
        text = self._space + self._plain(text)
        if self._trims:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :] if shown or not self._trims else ""
        self._trims = self._trims and not shown
        piece.reasoning += shown

    def _argue(self, piece: Piece, text: str) -> None:
        self._add_arguments(piece, self._arguments.push(self._plain(text)))

    def _end_call(self, piece: Piece) -> None:
        self._add_arguments(piece, self._arguments.finish())

    def _add_arguments(self, piece: Piece, text: str) -> None:
        if not text:
            return
        if piece.calls and piece.calls[-1].index == self._index:
            piece.calls[-1].arguments += text
        else:
            piece.calls += (CallPart(self._index, arguments=text),)

    def _take_until(self, mark: str) -> tuple[str, bool]:
        """Text up to `mark`, which is dropped, and whether it is there."""
        before, found, self._held = self._held.partition(SIGNS[mark])
        return before, bool(found)

    def _plain(self, text: str) -> str:
        """`text` as its tokens write it, marks that mean nothing here included."""
        return text if self._marks is None else text.translate(self._marks.texts)

    def _count(self, tokens: Sequence[int]) -> None:
        signs = self._marks.signs if self._marks is not None else {}
        for token in tokens:
            sign = signs.get(token)
            if not self._thinks:
                self._thinks = self._may_think and sign == SIGNS[THINK]
            elif sign == SIGNS[END_THINK]:
                self._thinks = False
            else:
                self.thought_tokens += 1
            self._may_think = False
