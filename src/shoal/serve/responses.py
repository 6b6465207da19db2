"""OpenAI's `/v1/responses`, turned into a chat and back. Nothing is stored: a conversation is sent whole each time."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from .blocks import Block, blocks_of, fragments
from .chat import prepare
from .dialect import TEXT_PARTS, texts
from .errors import APIError, bad
from .host import Host
from .protocol import MOST_MESSAGES, Body, ChatBody, Several
from .sse import JSON, EventStream, event, unless_gone
from .turn import Turn


class ResponsesBody(Body):
    """`/v1/responses`."""

    model: str | None = None
    input: str | Annotated[Several[dict[str, Any]], Field(max_length=MOST_MESSAGES)]
    instructions: str | None = None
    tools: Several[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = False
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    include: Several[str] | None = None
    top_logprobs: int | None = None


async def create(host: Host, body: ResponsesBody, http: HTTPRequest) -> Response:
    """Answer a conversation."""
    turn = await unless_gone(http, prepare(host, as_chat(body), "input"))
    record = _Record(turn, body)
    if body.stream:
        return EventStream(record.stream(), failed)
    answer = (await unless_gone(http, turn.answers()))[0]
    blocks = blocks_of(answer)
    for block in blocks:
        record.begin(block)
        record.text += block.text
        record.end("incomplete" if block is blocks[-1] and answer.finish_reason == "length" else "completed")
    return JSON(record.response(answer.finish_reason))


def failed(error: APIError) -> bytes:
    return event({"type": "error", "code": error.code or error.type, "message": error.message, "param": error.param}, "error")


def as_chat(body: ResponsesBody) -> ChatBody:
    """The same request as the chat API has it."""
    if body.previous_response_id is not None:
        raise bad("responses are not stored here: send the whole conversation as input", "previous_response_id")
    if body.background:
        raise bad("background is not supported", "background")
    if body.conversation is not None:
        raise bad("conversations are not stored here: send the whole conversation as input", "conversation")
    if body.prompt is not None:
        raise bad("prompts are not stored here: send their text as instructions and input", "prompt")
    if body.top_logprobs or "message.output_text.logprobs" in (body.include or ()):
        raise bad("log-probabilities are not told here: use /v1/chat/completions", "top_logprobs")
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for index, item in enumerate(body.input):
            _add_item(messages, item, f"input[{index}]")
    fields: dict[str, Any] = {"model": body.model, "messages": messages, "stream": bool(body.stream)}
    fields |= {"max_tokens": body.max_output_tokens, "temperature": body.temperature, "top_p": body.top_p}
    fields["reasoning_effort"] = (body.reasoning or {}).get("effort")
    if body.tools:
        kinds = {str(tool.get("type")) for tool in body.tools} - {"function"}
        if kinds:
            raise bad(f"tools of type {sorted(kinds)[0][:40]!r} are not supported: only functions", "tools")
        fields["tools"] = [{"type": "function", "function": tool} for tool in body.tools]
    fields |= {"tool_choice": body.tool_choice, "parallel_tool_calls": body.parallel_tool_calls}
    form = (body.text or {}).get("format")
    if isinstance(form, dict):
        fields["response_format"] = form
    return ChatBody(**fields)


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], param: str) -> None:
    kind = item.get("type", "message")
    if kind == "reasoning":
        return
    if kind == "message":
        messages.append({"role": item.get("role"), "content": texts(item.get("content") or "", TEXT_PARTS, param)})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": str(item.get("call_id", "")), "type": "function", "function": function}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        text = texts(item.get("output") or "", TEXT_PARTS, param)
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": text})
    else:
        raise bad(f"input of type {str(kind)[:40]!r} is not supported", param)


class _Record:
    """A response while it grows: its finished items, and the one that is open."""

    def __init__(self, turn: Turn, body: ResponsesBody) -> None:
        self._turn, self._body = turn, body
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open: Block | None = None
        self._open_id = ""
        self.text = ""
        self._number = -1

    def begin(self, block: Block) -> None:
        prefix = {"thinking": "rs", "text": "msg", "tool": "fc"}[block.kind]
        self._open, self._open_id, self.text = block, f"{prefix}_{uuid.uuid4().hex}", ""

    def end(self, status: str) -> dict[str, Any]:
        """Close the open item; it as a whole."""
        item = self._item(status)
        self._items.append(item)
        self._open = None
        return item

    def response(self, finish_reason: str | None, status: str | None = None) -> dict[str, Any]:
        body, usage = self._body, self._turn.usage()
        cut = finish_reason == "length"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status or ("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "model": self._turn.host.name,
            "output": list(self._items),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None
            if status == "in_progress"
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        finish = None
        async with self._turn.host.serving(self._turn.requests) as tickets:
            yield self._send("response.created", response=self.response(None, "in_progress"))
            yield self._send("response.in_progress", response=self.response(None, "in_progress"))
            async for step in self._turn.steps(tickets):
                finish = step.finish_reason or finish
                for begins, block in fragments(step.piece):
                    if self._open is not None and (begins or block.kind != self._open.kind):
                        for sent in self._closing("completed"):
                            yield sent
                    if self._open is None:
                        for sent in self._opening(block):
                            yield sent
                    if block.text:
                        self.text += block.text
                        yield self._send(f"{self._event}.delta", **self._place, delta=block.text, **self._logprobs)
        kind = "incomplete" if finish == "length" else "completed"
        if self._open is not None:
            for sent in self._closing(kind):
                yield sent
        yield self._send(f"response.{kind}", response=self.response(finish))

    def _opening(self, block: Block) -> list[bytes]:
        self.begin(Block(block.kind, "", block.id, block.name))
        sent = [self._send("response.output_item.added", output_index=len(self._items), item=self._item("in_progress"))]
        if block.kind == "text":
            sent.append(self._send("response.content_part.added", **self._place, part=self._part()))
        return sent

    def _closing(self, status: str) -> list[bytes]:
        assert self._open is not None
        whole = {"arguments": self.text, "name": self._open.name} if self._open.kind == "tool" else {"text": self.text}
        sent = [self._send(f"{self._event}.done", **self._place, **whole, **self._logprobs)]
        if self._open.kind == "text":
            sent.append(self._send("response.content_part.done", **self._place, part=self._part()))
        index = len(self._items)
        sent.append(self._send("response.output_item.done", output_index=index, item=self.end(status)))
        return sent

    def _item(self, status: str) -> dict[str, Any]:
        """The open item, so far."""
        assert self._open is not None
        if self._open.kind == "thinking":
            content = [{"type": "reasoning_text", "text": self.text}] if self.text else []
            return {"type": "reasoning", "id": self._open_id, "summary": [], "content": content, "status": status}
        if self._open.kind == "text":
            content = [] if status == "in_progress" else [self._part()]
            return {"type": "message", "id": self._open_id, "role": "assistant", "status": status, "content": content}
        call = {"call_id": self._open.id, "name": self._open.name, "arguments": self.text}
        return {"type": "function_call", "id": self._open_id, "status": status, **call}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    @property
    def _event(self) -> str:
        assert self._open is not None
        names = {"thinking": "reasoning_text", "text": "output_text", "tool": "function_call_arguments"}
        return f"response.{names[self._open.kind]}"

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        place: dict[str, Any] = {"item_id": self._open_id, "output_index": len(self._items)}
        return place if self._open.kind == "tool" else place | {"content_index": 0}

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._open is not None and self._open.kind == "text" else {}

    def _send(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)
