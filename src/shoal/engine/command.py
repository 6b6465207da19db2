"""`shoal generate`."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..config import GenerateCommand, SamplingOptions, UserError
from .generate import TextStream, generate
from .load import Loaded, load


def run_generate(command: GenerateCommand) -> dict[str, Any]:
    """Continue the prompt, streaming to stdout unless JSON was asked for; returns the JSON object."""
    command.sampling.validate()
    prompt = _read_prompt() if command.prompt == "-" else command.prompt
    loaded = load(command.model, command.machine)
    if not command.json:
        print(prompt, end="", flush=True)
    result = complete(loaded, prompt, command.sampling, stream=not command.json)
    if not command.json:
        print()
    return result


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on standard input is not valid UTF-8 (byte {error.start}): check its encoding") from None


def complete(loaded: Loaded, prompt: str, sampling: SamplingOptions, stream: bool = False) -> dict[str, Any]:
    """Continuation of `prompt`: `text`, `tokens` (their number), `finish_reason` (`stop` or `length`), `tokens_per_second`."""
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(prompt, bos=True)
    if not ids:
        raise UserError("the prompt is empty and this tokenizer has no begin-of-text token: give at least one character")
    pieces, tokens, reason = TextStream(tokenizer), [], "length"
    text = ""
    began = time.perf_counter()
    for token in generate(loaded.model, loaded.machine, ids, sampling, {tokenizer.eos_id}):
        tokens.append(token)
        if token == tokenizer.eos_id:
            reason = "stop"
            break
        text += _emit(pieces.push(token), stream)
    text += _emit(pieces.finish(), stream)
    seconds = time.perf_counter() - began
    return {
        "text": text,
        "tokens": len(tokens),
        "prompt_tokens": len(ids),
        "finish_reason": reason,
        "tokens_per_second": len(tokens) / seconds,
    }


def _emit(piece: str, stream: bool) -> str:
    if stream and piece:
        print(piece, end="", flush=True)
    return piece
