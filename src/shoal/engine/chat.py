"""`shoal chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator

from ..config import ChatCommand, UserError
from ..data.chat_template import render_chat
from .command import engine_for_one
from .engine import Engine
from .load import load
from .requests import Request

HELP = "/reset starts over, /quit (or Ctrl-D) leaves; Ctrl-C stops an answer"


def run_chat(command: ChatCommand) -> None:
    """Read a line, answer it, until the input ends."""
    command.sampling.validate()
    command.run.validate()
    loaded = load(command.model, command.machine)
    tokenizer, engine = loaded.tokenizer, engine_for_one(loaded, command.run)
    is_base = tokenizer.chat_template is None
    if is_base and command.system:
        raise UserError(f"{command.model} is a base model without a chat template: it has no system prompt, leave out --system")
    print(f"{loaded.folder}: {'a base model, it continues what you type' if is_base else 'a chat model'}. {HELP}.", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte in what someone pastes is no reason to leave
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    opening = [{"role": "system", "content": command.system}] if command.system else []
    messages: list[dict[str, str]] = list(opening)
    while True:
        try:
            line = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            messages = list(opening)
            continue
        if line.startswith("/"):
            print(HELP)
            continue
        if not line.strip():
            continue
        if is_base:
            prompt = tokenizer.encode(line, bos=True)
        else:
            messages.append({"role": "user", "content": line})
            prompt = tokenizer.encode(render_chat(tokenizer, messages), special=True)
        answer = ""
        try:
            answer = _say(engine, Request(prompt, command.sampling))
        except UserError as error:
            print(f"shoal: {error}; /reset starts over", file=sys.stderr)
        print()
        messages.append({"role": "assistant", "content": answer})


def _say(engine: Engine, request: Request) -> str:
    """Print the answer as it comes, until its end or Ctrl-C."""
    answer = ""
    number = engine.add_request(request)
    with _interrupts() as interrupted:
        while engine.has_work:
            for increment in engine.step().values():
                answer += increment.text
                print(increment.text, end="", flush=True)
                if increment.error:
                    raise UserError(increment.error)
            if interrupted.is_set():
                engine.abort(number)
                print(" [stopped]", end="")
    return answer


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that it never cuts a step in two."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
