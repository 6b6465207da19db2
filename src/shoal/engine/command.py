"""`shoal generate`."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..config import EngineOptions, GenerateCommand, RunOptions, SamplingOptions, UserError
from .engine import Engine
from .load import Loaded, load
from .requests import Request, Result


def run_generate(command: GenerateCommand) -> dict[str, Any]:
    """Continue the prompt, streaming to stdout unless JSON was asked for; returns the JSON object."""
    command.sampling.validate()
    command.run.validate()
    prompt = _read_prompt() if command.prompt == "-" else command.prompt
    loaded = load(command.model, command.machine)
    result = complete(loaded, prompt, command.sampling, command.run, stream=not command.json)
    if not command.json:
        print()
    return result


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on standard input is not valid UTF-8 (byte {error.start}): check its encoding") from None


def complete(loaded: Loaded, prompt: str, sampling: SamplingOptions, run: RunOptions | None = None, stream: bool = False) -> dict[str, Any]:
    """Continuation of `prompt`: `text`, `tokens` (their number), `finish_reason` (`stop` or `length`), `tokens_per_second`,
    `drafted_tokens` (guesses of multi-token prediction) and `acceptance` (the share that was right, None without guesses)."""
    engine = engine_for_one(loaded, run or RunOptions())
    request = Request(engine.encode(prompt), sampling)
    result = Result(len(request.prompt))
    began = time.perf_counter()
    engine.add_request(request)
    if stream:
        print(prompt, end="", flush=True)
    while engine.has_work:
        for increment in engine.step().values():
            result.add(increment)
            if stream and increment.text:
                print(increment.text, end="", flush=True)
    seconds = time.perf_counter() - began
    if result.error is not None:
        raise UserError(result.error)
    stats = engine.stats()
    return {
        "text": result.text,
        "tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "tokens_per_second": len(result.tokens) / seconds,
        "drafted_tokens": stats.drafted_tokens,
        "acceptance": stats.acceptance,
    }


def engine_for_one(loaded: Loaded, run: RunOptions) -> Engine:
    """An engine with room for one conversation at a time."""
    return Engine(loaded.runner, loaded.tokenizer, EngineOptions(**vars(run), max_running=1))
