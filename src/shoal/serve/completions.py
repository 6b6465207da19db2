"""`/v1/completions`: text goes on."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ..data import Tokenizer
from ..engine import Request, Token
from .chat import failed
from .errors import bad
from .form import answer_grammar
from .grammar import AnswerForm
from .host import Host, numbered
from .options import sampling_of
from .protocol import CompletionBody
from .reader import AnswerReader
from .sse import DONE, JSON, EventStream, event, unless_gone
from .tokens import Offsets, completion_logprobs, expert_report, prompt_logprobs
from .turn import Turn

DEFAULT_TOKENS = 16
"""OpenAI's."""
MOST_ANSWERS = 256


async def create(host: Host, body: CompletionBody, http: HTTPRequest) -> Response:
    """Continue one or several prompts."""
    turn = await unless_gone(http, prepare(host, body))
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": host.name}
    if body.stream:
        return EventStream(_stream(turn, body, head), failed)
    answers = await unless_gone(http, turn.answers())
    choices = [_Choice(turn, body, index).part(answer.content, answer.tokens, answer.finish_reason) for index, answer in enumerate(answers)]
    return JSON(head | {"choices": choices, "usage": turn.usage()})


async def prepare(host: Host, body: CompletionBody) -> Turn:
    """The engine's requests: `n` for each prompt. Raises `APIError` 400 if one cannot be served."""
    began = time.perf_counter()
    host.check_model(body.model)
    count = body.n or 1
    if body.suffix:
        raise bad("suffix is not supported: this model only continues text", "suffix")
    if body.best_of not in (None, count):
        raise bad("best_of is not supported: leave it away", "best_of")
    vocab_size = host.engine.config.vocab_size
    grammar = await answer_grammar(body, host.trial)
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = sampling_of(body, most, body.logprobs, vocab_size)
    if body.echo and body.logprobs is not None:
        sampling = replace(sampling, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    prompts = await host.read(lambda: prompts_of(body.prompt, host.tokenizer, count))
    requests = []
    for prompt in prompts:
        if most:
            host.check_prompt(prompt, "prompt")
        request = Request(prompt, sampling, mask=None if grammar is None else AnswerForm(grammar), experts=body.experts)
        requests += [numbered(request, index) for index in range(count)]
    return Turn(host, requests, [AnswerReader() for _ in requests], began, count)


async def _stream(turn: Turn, body: CompletionBody, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    options = body.stream_options
    wants_usage = options is not None and options.include_usage
    each = options is not None and options.continuous_usage_stats
    choices = [_Choice(turn, body, index) for index in range(len(turn.requests))]
    async with turn.host.serving(turn.requests) as tickets:
        yield b""
        async for step in turn.steps(tickets):
            choice = choices[step.index].part(step.piece.content, step.tokens, step.finish_reason)
            yield event(head | {"choices": [choice]} | ({"usage": turn.usage() if each else None} if wants_usage else {}))
    if wants_usage:
        yield event(head | {"choices": [], "usage": turn.usage()})
    yield DONE


class _Choice:
    """One choice, whole or in parts, of which the first has the prompt in front where that shall be echoed."""

    def __init__(self, turn: Turn, body: CompletionBody, index: int) -> None:
        self._turn, self._body, self._index = turn, body, index
        self._tokenizer = turn.host.tokenizer
        self._offsets: Offsets | None = None
        """Of the answer's tokens; None before the first part."""

    def part(self, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """`text` and `tokens` that follow those before."""
        body, tokenizer = self._body, self._tokenizer
        known: tuple[Token, ...] = ()
        before = ""
        if self._offsets is None:
            report = self._turn.reports[self._index]
            known = report.logprobs or () if report is not None else ()
            asked = self._turn.requests[self._index].prompt
            before = tokenizer.decode(asked) if body.echo else ""
            self._offsets = Offsets(tokenizer, len(before), asked)
        choice: dict[str, Any] = {"index": self._index, "text": before + text, "finish_reason": finish, "logprobs": None}
        if body.logprobs is not None:
            echoed, prompt = known if body.echo else (), Offsets(tokenizer)
            places = [prompt.next(token.id) for token in echoed] + [self._offsets.next(token.id) for token in tokens]
            choice["logprobs"] = completion_logprobs(tokenizer, [*echoed, *tokens], body.logprobs, places)
        if body.prompt_logprobs is not None and known:
            choice["prompt_logprobs"] = prompt_logprobs(tokenizer, known)
        if body.experts:
            choice["shoal"] = expert_report(tokenizer, tokens)
        return choice


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]], tokenizer: Tokenizer, count: int = 1) -> list[list[int]]:
    """Ids of every prompt: texts get the begin-of-text token that the tokenizer adds, ids are taken as they are.

    Raises `APIError` 400 where these are too many prompts to give `count` answers to each.
    """
    if isinstance(prompt, str):
        texts: list[Any] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        texts = [prompt]
    else:
        texts = list(prompt)
    if not texts:
        raise bad("the prompt is empty", "prompt")
    if count * len(texts) > MOST_ANSWERS:
        raise bad(f"at most {MOST_ANSWERS} answers or embeddings can be had with one request")
    return [tokenizer.encode(text, bos=True) if isinstance(text, str) else list(text) for text in texts]
