"""Anthropic's `/v1/messages`, turned into a chat and back."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from .blocks import Block, blocks_of, fragments
from .chat import prepare
from .dialect import Dialect, texts
from .errors import APIError, bad
from .host import Host
from .protocol import MOST_MESSAGES, Body, ChatBody, Several
from .sse import JSON, EventStream, event, unless_gone
from .turn import Turn

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
MOST_DIGITS = 4000
"""Of an integer: Python reads hardly longer ones."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Several[dict[str, Any]]


class AnthropicTool(Body):
    type: str = "custom"
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class OutputConfig(Body):
    format: dict[str, Any] | None = None
    """As `response_format` of the chat API."""


class CountBody(Body):
    """`/v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[Several[AnthropicMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: str | Several[dict[str, Any]] | None = None
    tools: Several[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesBody(CountBody):
    """`/v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31)]
    stream: bool = False
    stop_sequences: Several[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    output_config: OutputConfig = OutputConfig()


async def create(host: Host, body: MessagesBody, http: HTTPRequest) -> Response:
    """Answer a conversation."""
    turn = await unless_gone(http, _prepare(host, body))
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": host.name}
    if body.stream:
        return EventStream(_stream(turn, body, head), failed)
    answer = (await unless_gone(http, turn.answers()))[0]
    content = [_block(block) for block in blocks_of(answer)]
    return JSON(head | {"content": content} | _ending(turn, body, answer.finish_reason) | {"usage": _usage(turn)})


async def _prepare(host: Host, body: MessagesBody) -> Turn:
    return await prepare(host, await host.read(lambda: as_chat(body)))


async def count(host: Host, body: CountBody) -> JSON:
    """Tokens of a conversation."""
    host.check_model(body.model)
    ids = await host.read(lambda: Dialect(host.tokenizer).prompt(as_chat(body)))
    host.log_prompt(ids)
    return JSON({"input_tokens": len(ids)})


def failed(error: APIError) -> bytes:
    return event({"type": "error", "error": {"type": error.type, "message": error.message}}, "error")


def as_chat(body: CountBody) -> ChatBody:
    """The same request as OpenAI's chat API has it."""
    messages: list[dict[str, Any]] = []
    if body.system:
        system = texts(body.system, ("text",), "system")
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        messages += _as_messages(message, f"messages[{index}]")
    fields: dict[str, Any] = {"model": body.model, "messages": messages}
    fields["continue_final_message"] = messages[-1]["role"] == "assistant"
    fields["chat_template_kwargs"] = {"thinking": (body.thinking or {}).get("type") in ("enabled", "adaptive")}
    if body.tools:
        for tool in body.tools:
            if tool.type != "custom":
                raise bad(f"tools of type {tool.type[:40]!r} are not supported: only custom ones", "tools")
        fields["tools"] = [
            {"function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}} for tool in body.tools
        ]
    fields |= _choice(body.tool_choice or {"type": "auto"})
    if isinstance(body, MessagesBody):
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences, "temperature": body.temperature}
        fields |= {"top_p": body.top_p, "top_k": body.top_k, "stream": body.stream}
        fields["response_format"] = body.output_config.format
    return ChatBody(**fields)


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    parallel = {"parallel_tool_calls": not choice.get("disable_parallel_tool_use", False)}
    if kind == "tool":
        return parallel | {"tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    if not isinstance(kind, str) or kind not in CHOICES:
        raise bad("tool_choice is of type auto, any, tool or none", "tool_choice")
    return parallel | {"tool_choice": CHOICES[kind]}


def _as_messages(message: AnthropicMessage, param: str) -> list[dict[str, Any]]:
    """One of Anthropic's messages is several of OpenAI's where it brings results of tools."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    parts = []
    for part in message.content:
        kind = part.get("type")
        if kind == "tool_result" and message.role == "user":
            text = texts(part.get("content") or "", ("text",), param)
            results.append({"role": "tool", "tool_call_id": str(part.get("tool_use_id", "")), "content": text})
        elif kind == "tool_use" and message.role == "assistant":
            function = {"name": part.get("name"), "arguments": json.dumps(part.get("input") or {}, ensure_ascii=False)}
            calls.append({"id": str(part.get("id", "")), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):
            parts.append(part)
    text = texts(parts, ("text",), param)
    if text or calls or not results:
        results.append({"role": message.role, "content": text} | ({"tool_calls": calls} if calls else {}))
    return results


def _block(block: Block) -> dict[str, Any]:
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": block.text, "citations": None}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _read(block.text or "{}")}


def _read(arguments: str) -> Any:
    """JSON with the nearest number that fp64 holds for those beyond: Python would make infinity of them, which is no JSON."""

    def number(text: str) -> float:
        return max(-sys.float_info.max, min(float(text), sys.float_info.max))

    return json.loads(arguments, parse_float=number, parse_int=lambda text: int(text) if len(text) < MOST_DIGITS else number(text))


def _delta(block: Block) -> dict[str, Any]:
    if block.kind == "thinking":
        return {"type": "thinking_delta", "thinking": block.text}
    if block.kind == "text":
        return {"type": "text_delta", "text": block.text}
    return {"type": "input_json_delta", "partial_json": block.text}


def _ending(turn: Turn, body: MessagesBody, finish_reason: str | None) -> dict[str, Any]:
    stopped_by = turn.stopped_by[0]
    if isinstance(stopped_by, str) and finish_reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
    return {"stop_reason": STOP_REASONS.get(str(finish_reason), "end_turn"), "stop_sequence": None}


def _usage(turn: Turn) -> dict[str, Any]:
    usage = turn.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


async def _stream(turn: Turn, body: MessagesBody, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    def send(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    index, kind, finish = -1, "", None
    async with turn.host.serving(turn.requests) as tickets:
        message = head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(turn)}
        yield send("message_start", message=message)
        async for step in turn.steps(tickets):
            finish = step.finish_reason or finish
            for begins, block in fragments(step.piece):
                if begins or block.kind != kind:
                    if index >= 0:
                        yield send("content_block_stop", index=index)
                    index, kind = index + 1, block.kind
                    yield send("content_block_start", index=index, content_block=_block(Block(block.kind, "", block.id, block.name)))
                if block.text:
                    yield send("content_block_delta", index=index, delta=_delta(block))
    if index >= 0:
        yield send("content_block_stop", index=index)
    yield send("message_delta", delta=_ending(turn, body, finish), usage=_usage(turn))
    yield send("message_stop")
