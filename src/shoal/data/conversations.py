"""Conversations to learn from: read in the usual forms, brought to OpenAI's, and turned into tokens of which some are the model's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import CorpusConfig, UserError
from .chat_template import encode_turns
from .readers import JSON_SUFFIXES, data_suffix, existing, read_rows
from .sources import file_sources
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
    """`[n]` bool: the tokens that the model is to write, end-of-text among them, but for answers of weight 0."""


def read_conversations(paths: Sequence[str]) -> Iterator[tuple[str, Conversation]]:
    """Conversations of JSON Lines or Parquet files, or of such files in a folder (see `_files`), each with its place.

    Rows hold `messages` (OpenAI), `conversations` (ShareGPT) or `instruction`, `input` and `output` (Alpaca). Raises `UserError`
    naming the place of what is none of these.
    """
    for path in paths:
        for file in _files(existing(path)):
            for place, row in read_rows(file):
                yield place, conversation_of(row, place)


def read_pairs(paths: Sequence[str]) -> Iterator[tuple[str, Conversation, Conversation]]:
    """Pairs of conversations of which the first was preferred, each with its place.

    Rows hold `chosen` and `rejected`: answers (text or messages) to `prompt` or `question` (text or messages), or whole conversations,
    beside which a `prompt` says what is in them already. Both may have a `system` text beside them.
    """
    for path in paths:
        for file in _files(existing(path)):
            for place, row in read_rows(file):
                if not isinstance(row, dict) or "chosen" not in row or "rejected" not in row:
                    raise UserError(f"{place} is no pair: prompt, chosen and rejected are expected")
                opening = _messages(row.get("prompt") or row.get("question"), "user", place)
                answered = [_answered(opening, _messages(row[name], "assistant", place), f"{place}: {name}") for name in SIDES]
                tools = _tools(row, place)
                chosen, rejected = (Conversation(_behind_system(row, messages, place), tools) for messages in answered)
                yield place, chosen, rejected


def _answered(opening: list[dict[str, Any]], answer: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """The conversation that `answer` ends; it goes on from `opening`, or holds it."""
    if not answer or answer[-1]["role"] != "assistant":
        raise UserError(f"{place} does not end with an answer: a text, or messages of which the last is the assistant's, are expected")
    if answer[0]["role"] == "assistant":
        if not any(message["role"] == "user" for message in opening):
            raise UserError(f"{place} answers nothing: give what was asked as prompt beside it, or whole conversations as messages")
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
    """The file that `path` is, or those of a folder; where some are marked as train and others as val or test, the former, as in
    pretraining."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and data_suffix(file) in (*JSON_SUFFIXES, ".parquet"))
    if not found:
        raise UserError(f"{path} holds no .jsonl or .parquet file: check --data")
    names = {file: file.relative_to(path).as_posix() for file in found}
    learnt = {source.name for source in file_sources(names, CorpusConfig()) if source.split != "val"}
    return [file for file in found if names[file] in learnt]


def conversation_of(row: Any, place: str) -> Conversation:
    """A row in any of the known forms."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is not an object with named fields: one with messages, conversations or instruction is expected")
    if isinstance(row.get("messages"), list):
        messages = [_openai(message, place) for message in row["messages"]]
    elif isinstance(row.get("conversations"), list):
        messages = [_sharegpt(message, place) for message in row["conversations"]]
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row, place)
    else:
        raise UserError(
            f"{place} has neither messages, nor conversations, nor instruction and output, but {', '.join(row) or 'nothing'}: "
            "shoal sft --help says what these hold"
        )
    return Conversation(_behind_system(row, messages, place), _tools(row, place))


def _behind_system(row: dict[str, Any], messages: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """The messages of a row after the `system` text that stands beside them, unless they begin with it."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise UserError(f"{place}: system is {type(system).__name__}: text is expected")
    first = {"role": "system", "content": system}
    return [first, *messages] if system and messages[:1] != [first] else messages


def _tools(row: dict[str, Any], place: str) -> list[dict[str, Any]] | None:
    """The tools that stand beside a row's messages, also as JSON text; None where there are none. Before tools, OpenAI had `functions`."""
    found = {name: row.get(name) for name in ("tools", "functions")}
    found = {name: _parsed(value, f"{place}: {name}") if isinstance(value, str) else value for name, value in found.items()}
    return found["tools"] or [{"type": "function", "function": function} for function in found["functions"] or []] or None


def _openai(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{place}: a message without a role: each is to be like {{'role': 'user', 'content': ...}}")
    # A message may name what it lacks, as OpenAI's do.
    kept = {key: value for key, value in message.items() if value is not None}
    if kept.get("weight", 1) not in (0, 1):
        raise UserError(f"{place}: the weight of a message is {kept['weight']!r}: 0 (not to be learnt) or 1 is expected")
    # Before tools, OpenAI had functions: one call in a message, its result in the next one.
    if "function_call" in kept:
        kept["tool_calls"] = [{"type": "function", "function": kept.pop("function_call")}]
    if kept["role"] == "function":
        kept["role"] = "tool"
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
    instruction, given, output = parts = [row.get(name) or "" for name in ("instruction", "input", "output")]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{place}: instruction, input and output must be text")
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or list(map(type, turn)) != [str, str] for turn in history):
        raise UserError(f"{place}: history must be a list of earlier turns, each as [INSTRUCTION, OUTPUT]")
    turns = [*history, [f"{instruction}\n\n{given}" if given else instruction, output]]
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None


def tokenize(tokenizer: Tokenizer, conversation: Conversation, place: str) -> Example:
    """The tokens of a conversation, in which the prompt before every answer is the one that the server would make.

    Raises `UserError` as `encode_turns` does, with `place` in front.
    """
    try:
        pieces = encode_turns(tokenizer, conversation.messages, conversation.tools)
        learnt = _learnt([is_written for _, is_written in pieces], conversation.messages)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    ids = [token for piece, _ in pieces for token in piece]
    lengths = [len(piece) for piece, _ in pieces]
    return Example(np.array(ids, np.int32), np.repeat(np.array(learnt, bool), lengths))


def _learnt(written: list[bool], messages: list[dict[str, Any]]) -> list[bool]:
    """Which pieces are to be learnt: those that the model writes, but for answers that OpenAI's `weight` 0 takes out."""
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if all(weights):
        return written
    if sum(written) != len(weights):
        raise UserError("the chat template does not mark every answer by itself, which messages with weight 0 need: leave those away")
    answers = iter(weights)
    return [is_written and bool(next(answers)) for is_written in written]
