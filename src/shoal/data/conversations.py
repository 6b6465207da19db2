"""Conversations to learn from: read in the usual forms, brought to OpenAI's, and turned into tokens of which some are the model's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UserError
from .chat_template import encode_turns
from .readers import JSON_SUFFIXES, data_suffix, existing, read_rows
from .tokenizer import Tokenizer

SIDES = ("chosen", "rejected")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
"""`from` of ShareGPT -> role."""


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, and the tools they may call. Thoughts are part of an answer: `<think>...</think>answer`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Example:
    """One conversation in tokens."""

    ids: np.ndarray
    """`[n]` int32."""
    written: np.ndarray
    """`[n]` bool: the tokens that the model is to write, end-of-text among them."""


def read_conversations(paths: Sequence[str]) -> Iterator[tuple[str, Conversation]]:
    """Conversations of JSON Lines or Parquet files, or of all such files in a folder, each with its place.

    Rows hold `messages` (OpenAI), `conversations` (ShareGPT) or `instruction`, `input` and `output` (Alpaca). Raises `UserError`
    naming the place of what is none of these.
    """
    for path in paths:
        for file in _files(existing(path)):
            for place, row in read_rows(file):
                yield place, conversation_of(row, place)


def read_pairs(paths: Sequence[str]) -> Iterator[tuple[str, Conversation, Conversation]]:
    """Pairs of conversations of which the first was preferred, each with its place.

    Rows hold `chosen` and `rejected`: answers (text or messages) to `prompt` (text or messages), or whole conversations, beside which a
    `prompt` says what is in them already.
    """
    for path in paths:
        for file in _files(existing(path)):
            for place, row in read_rows(file):
                if not isinstance(row, dict) or "chosen" not in row or "rejected" not in row:
                    raise UserError(f"{place} is no pair: prompt, chosen and rejected are expected")
                opening = _messages(row.get("prompt"), "user", place)
                chosen, rejected = (_answered(opening, _messages(row[name], "assistant", place), f"{place}: {name}") for name in SIDES)
                yield place, Conversation(chosen, row.get("tools") or None), Conversation(rejected, row.get("tools") or None)


def _answered(opening: list[dict[str, Any]], answer: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """The conversation that `answer` ends; it goes on from `opening`, or holds it."""
    if not answer or answer[-1]["role"] != "assistant":
        raise UserError(f"{place} does not end with an answer: a text, or messages of which the last is the assistant's, are expected")
    if answer[0]["role"] == "assistant":
        return opening + answer
    said = [(message["role"], message["content"]) for message in answer]
    if any((message["role"], message["content"]) not in said for message in opening):
        raise UserError(f"{place} is a whole conversation, but not to the prompt beside it: give one of the two")
    return answer


def _messages(value: Any, role: str, place: str) -> list[dict[str, Any]]:
    """Messages, or one of them from its text."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{place}: {type(value).__name__} where text or messages are expected")
    return [_openai(message, place) for message in value]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and data_suffix(file) in (*JSON_SUFFIXES, ".parquet"))
    if not found:
        raise UserError(f"{path} holds no .jsonl or .parquet file: check --data")
    return found


def conversation_of(row: Any, place: str) -> Conversation:
    """A row in any of the known forms."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is not an object with named fields: one with messages, conversations or instruction is expected")
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, f"{place}: tools")
    if isinstance(row.get("messages"), list):
        messages = [_openai(message, place) for message in row["messages"]]
    elif isinstance(row.get("conversations"), list):
        messages = [_sharegpt(message, place) for message in row["conversations"]]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row, place)
    else:
        raise UserError(f"{place} has neither messages, nor conversations, nor instruction and output, but {', '.join(row) or 'nothing'}")
    return Conversation(messages, tools or None)


def _openai(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{place}: a message without a role: each is to be like {{'role': 'user', 'content': ...}}")
    # Parquet gives every message all fields that any of them has.
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content", "")
    if isinstance(content, list):
        parts = [part.get("text") or "" for part in content if isinstance(part, dict)]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(content, str):
        raise UserError(f"{place}: the content of a message is {type(content).__name__}: text is expected")
    thought = kept.pop("reasoning_content", None)
    if thought and kept["role"] == "assistant":
        if not isinstance(thought, str):
            raise UserError(f"{place}: the reasoning_content of a message is {type(thought).__name__}: text is expected")
        content = f"<think>\n{thought.strip()}\n</think>\n{content}"
    return kept | {"content": content}


def _sharegpt(message: Any, place: str) -> dict[str, Any]:
    speaker = message.get("from") if isinstance(message, dict) else None
    if speaker not in SPEAKERS or not isinstance(message.get("value"), str):
        raise UserError(f"{place}: a message from {speaker!r}: known are {', '.join(SPEAKERS)}, each with a text as value")
    return {"role": SPEAKERS[speaker], "content": message["value"]}


def _alpaca(row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    parts = [row.get(name) or "" for name in ("system", "instruction", "input", "output")]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{place}: instruction, input and output must be text")
    system, instruction, given, output = parts
    question = f"{instruction}\n\n{given}" if given else instruction
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None


def tokenize(tokenizer: Tokenizer, conversation: Conversation, place: str, **variables: Any) -> Example:
    """The tokens of a conversation, in which the prompt before every answer is the one that the server would make.

    `variables` are what the chat template knows besides. Raises `UserError` as `encode_turns` does, with `place` in front.
    """
    ids: list[int] = []
    written: list[bool] = []
    try:
        for piece, is_written in encode_turns(tokenizer, conversation.messages, conversation.tools, **variables):
            ids += piece
            written += [is_written] * len(piece)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return Example(np.array(ids, np.int32), np.array(written, bool))
