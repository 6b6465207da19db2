"""Answers as a row of blocks (thought, text, tool calls), as Anthropic's and OpenAI's newer API have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .reader import Piece
from .turn import Answer


@dataclass
class Block:
    """A whole block, or what was added to it. Tool calls have `id` and `name`, and their arguments as `text`."""

    kind: Literal["thinking", "text", "tool"]
    text: str = ""
    id: str | None = None
    name: str | None = None


def fragments(piece: Piece) -> Iterator[tuple[bool, Block]]:
    """What `piece` adds, block by block, and whether it has to begin a new one even if the last was of its kind."""
    if piece.reasoning:
        yield False, Block("thinking", piece.reasoning)
    if piece.content:
        yield False, Block("text", piece.content)
    for part in piece.calls:
        yield part.id is not None, Block("tool", part.arguments, part.id, part.name)


def blocks_of(answer: Answer) -> list[Block]:
    """Of a whole answer."""
    blocks = [Block("thinking", answer.reasoning)] if answer.reasoning else []
    if answer.content:
        blocks.append(Block("text", answer.content))
    return blocks + [Block("tool", call.arguments, call.id, call.name) for call in answer.calls]
