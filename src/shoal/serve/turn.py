"""One request's answers while the engine makes them: what the routes of all three APIs share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine import Increment, PromptReport, Request, Token
from ..engine.async_engine import Ticket
from .errors import APIError, closing
from .host import Host
from .reader import AnswerReader, CallPart, Piece


@dataclass
class Step:
    """What was added to one answer."""

    index: int
    piece: Piece
    tokens: Sequence[Token]
    finish_reason: str | None
    """As OpenAI names it: `stop`, `length` or `tool_calls`."""


@dataclass
class Answer:
    """One answer so far."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, step: Step) -> None:
        self.reasoning += step.piece.reasoning
        self.content += step.piece.content
        for part in step.piece.calls:
            if part.index == len(self.calls):
                self.calls.append(CallPart(part.index, part.id, part.name))
            self.calls[part.index].arguments += part.arguments
        self.tokens += step.tokens
        self.finish_reason = step.finish_reason or self.finish_reason


class Turn:
    """`requests` are the choices of one HTTP request, so many in a row for each prompt; `readers` split their answers."""

    def __init__(self, host: Host, requests: list[Request], readers: list[AnswerReader], began: float, choices: int) -> None:
        self.host, self.requests, self.readers, self.choices = host, requests, readers, choices
        self._clocks = [host.metrics.clock(began) for _ in requests]
        self.made = 0
        self.reports: list[PromptReport | None] = [None] * len(requests)
        """Of the prompts, once they are read."""
        self.stopped_by: list[int | str | None] = [None] * len(requests)

    async def steps(self, tickets: Sequence[Ticket]) -> AsyncIterator[Step]:
        """What comes, until all answers have ended. Raises `APIError` if one cannot go on."""
        async for index, increment in self.host.increments(tickets):
            tokens = increment.tokens
            now = time.perf_counter()
            self._clocks[index].tokens(len(tokens), now)
            self.made += len(tokens)
            self.reports[index] = self.reports[index] or increment.prompt
            reader = self.readers[index]
            piece = reader.push(increment.text, [token.id for token in tokens])
            finish = None
            if increment.finish_reason is not None:
                check_end(increment)
                piece = add_pieces(piece, reader.finish())
                finish = "tool_calls" if reader.has_calls and increment.finish_reason == "stop" else str(increment.finish_reason)
                self.stopped_by[index] = increment.stopped_by
                self._clocks[index].finished(now)
            if piece or tokens or finish:
                yield Step(index, piece, tokens, finish)

    async def answers(self) -> list[Answer]:
        """All answers, whole."""
        answers = [Answer() for _ in self.requests]
        async with self.host.serving(self.requests) as tickets:
            async for step in self.steps(tickets):
                answers[step.index].add(step)
        return answers

    def usage(self) -> dict[str, Any]:
        """Tokens so far, as OpenAI counts them: a prompt counts once, however many answers it gets."""
        prompt, cached = 0, 0
        for index in range(0, len(self.requests), self.choices):
            prompt += len(self.requests[index].prompt)
            report = self.reports[index]
            cached += report.cached_tokens if report is not None else 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.made,
            "total_tokens": prompt + self.made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(reader.thought_tokens for reader in self.readers)},
        }


def check_end(last: Increment) -> None:
    """Raises `APIError` where an answer did not end by itself."""
    if last.finish_reason == "error":
        raise APIError(400, last.error or "the answer could not be computed", code="generation_failed")
    if last.finish_reason == "abort":
        raise closing()


def add_pieces(first: Piece, second: Piece) -> Piece:
    if not second:
        return first
    calls = list(first.calls)
    for part in second.calls:
        if calls and calls[-1].index == part.index and part.id is None:
            calls[-1].arguments += part.arguments
        else:
            calls.append(part)
    return Piece(first.reasoning + second.reasoning, first.content + second.content, tuple(calls))
