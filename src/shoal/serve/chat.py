"""`/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ..engine import Request
from .dialect import Dialect, several_calls
from .errors import APIError, bad
from .form import answer_grammar
from .host import Host, numbered
from .options import sampling_of
from .protocol import ChatBody
from .reader import CallPart, reader_behind
from .sse import DONE, JSON, EventStream, event, unless_gone
from .tokens import chat_logprobs, expert_report
from .turn import Answer, Step, Turn


async def prepare(host: Host, body: ChatBody, param: str = "messages") -> Turn:
    """The engine's requests for a conversation, which came in the field `param`. Raises `APIError` 400 if it cannot be served."""
    began = time.perf_counter()
    host.check_model(body.model)
    if body.functions:
        raise bad("functions are not supported any more: use tools", "functions")
    if set(body.modalities or ()) - {"text"}:
        raise bad("this model writes text only: leave modalities away", "modalities")
    if body.prompt_logprobs is not None:
        raise bad("prompt_logprobs are not told here: use /v1/completions", "prompt_logprobs")
    vocab_size = host.engine.config.vocab_size
    dialect = Dialect(host.tokenizer)
    prompt = await host.read(lambda: dialect.prompt(body))
    host.check_prompt(prompt, param)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    sampling = sampling_of(body, most, logprobs, vocab_size)
    form = await dialect.form(body, prompt, host.trial, await answer_grammar(body, host.trial))
    request = Request(prompt, sampling, mask=form, experts=body.experts)
    requests = [numbered(request, index) for index in range(body.n or 1)]
    calls = bool(body.tools) and body.tool_choice != "none"
    readers = [reader_behind(host.tokenizer, prompt, calls, several_calls(body)) for _ in requests]
    return Turn(host, requests, readers, began, len(requests))


async def create(host: Host, body: ChatBody, http: HTTPRequest) -> Response:
    """Answer a conversation."""
    turn = await unless_gone(http, prepare(host, body))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": host.name, "system_fingerprint": None}
    if body.stream:
        return EventStream(_stream(turn, body, head), failed)
    answers = await unless_gone(http, turn.answers())
    choices = [_choice(turn, body, index, answer) for index, answer in enumerate(answers)]
    return JSON(head | {"object": "chat.completion", "choices": choices, "usage": turn.usage()})


def failed(error: APIError) -> bytes:
    """The last event of a stream that cannot go on."""
    return event(error.body()) + DONE


def _choice(turn: Turn, body: ChatBody, index: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [_call(part) for part in answer.calls]
    choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    if body.logprobs:
        choice["logprobs"] = chat_logprobs(turn.host.tokenizer, answer.tokens)
    if body.experts:
        choice["shoal"] = expert_report(turn.host.tokenizer, answer.tokens)
    return choice


def _call(part: CallPart) -> dict[str, Any]:
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


async def _stream(turn: Turn, body: ChatBody, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    options = body.stream_options
    head = head | {"object": "chat.completion.chunk"}

    def chunk(choices: list[dict[str, Any]]) -> bytes:
        more: dict[str, Any] = {"choices": choices}
        if options is not None and options.include_usage:
            more["usage"] = turn.usage() if options.continuous_usage_stats else None
        return event(head | more)

    async with turn.host.serving(turn.requests) as tickets:
        opening = {"role": "assistant", "content": ""}
        yield chunk([{"index": i, "delta": opening, "finish_reason": None, "logprobs": None} for i in range(len(tickets))])
        async for step in turn.steps(tickets):
            yield chunk([_delta(turn, body, step)])
    if options is not None and options.include_usage:
        yield event(head | {"choices": [], "usage": turn.usage()})
    yield DONE


def _delta(turn: Turn, body: ChatBody, step: Step) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if step.piece.reasoning:
        delta["reasoning_content"] = step.piece.reasoning
    if step.piece.content:
        delta["content"] = step.piece.content
    if step.piece.calls:
        delta["tool_calls"] = [_call_delta(part) for part in step.piece.calls]
    choice: dict[str, Any] = {"index": step.index, "delta": delta, "finish_reason": step.finish_reason, "logprobs": None}
    if body.logprobs:
        choice["logprobs"] = chat_logprobs(turn.host.tokenizer, step.tokens)
    if body.experts:
        choice["shoal"] = expert_report(turn.host.tokenizer, step.tokens)
    return choice


def _call_delta(part: CallPart) -> dict[str, Any]:
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index} | _call(part)
