"""`shoal chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..config import ChatCommand, SamplingOptions, UserError
from ..data import Tokenizer
from ..data.chat_template import encode_chat
from ..engine.command import engine_for_one
from ..engine.engine import Engine
from ..engine.load import load
from ..engine.requests import Increment, Request
from .reader import END_THINK, THINK, AnswerReader, reader_behind

HELP = """/system TEXT sets the system prompt, /reset starts over, /save FILE writes the conversation as JSON, /stats tells its speed,
/quit (or Ctrl-D) leaves. A line that ends in \\ goes on in the next; \"\"\" begins and ends a longer text. Ctrl-C stops an answer."""
COMMANDS = ("/system", "/reset", "/save", "/stats", "/quit")
QUOTES = '"""'
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def run_chat(command: ChatCommand) -> None:
    """Read a text, answer it, until the input ends."""
    command.sampling.validate()
    command.run.validate()
    loaded = load(command.model, command.machine)
    is_base = loaded.tokenizer.chat_template is None
    if is_base and command.system:
        raise UserError(f"{command.model} is a base model without a chat template: it has no system prompt, leave out --system")
    print(f"{loaded.folder}: {'a base model, it continues what you type' if is_base else 'a chat model'}.\n{HELP}", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte in what someone pastes is no reason to leave
    with contextlib.suppress(ImportError):
        import readline  # line editing and history for input()

        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines that are pasted are one text
    talk = Talk(engine_for_one(loaded, command.run), loaded.tokenizer, command.sampling, command.system)
    while (text := read_text()) is not None:
        try:
            name, _, rest = text.strip().partition(" ")
            if name in COMMANDS or re.fullmatch(r"/\w*", text.strip()):  # a text may begin with a path
                if not talk.obey(name, rest):
                    return
            elif text.strip():
                talk.answer(text)
        except UserError as error:
            print(f"shoal: {error}", file=sys.stderr)


def read_text() -> str | None:
    """What someone types: a line, lines that end in a backslash and the one after them, or all between two `QUOTES`; None at the end."""
    try:
        line = input("\n> ")
        if line.strip().startswith(QUOTES):
            line = line.strip()[len(QUOTES) :]
            while QUOTES not in line:
                line += "\n" + input("... ")
            return line.partition(QUOTES)[0].strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input("... ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return line


class Talk:
    """One conversation. A base model continues every text by itself."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: SamplingOptions, system: str | None) -> None:
        self.engine, self.tokenizer, self.sampling, self.system = engine, tokenizer, sampling, system
        self.messages: list[dict[str, str]] = []
        self._tokens, self._seconds = 0, 0.0
        """Of the last answer."""

    def obey(self, name: str, rest: str) -> bool:
        """A command; False if it was to leave. Raises `UserError` where it cannot be done."""
        match name:
            case "/quit":
                return False
            case "/reset":
                self.messages = []
            case "/system":
                self._set_system(rest.strip())
            case "/save":
                self._save(rest.strip())
            case "/stats":
                print(self.stats())
            case _:
                print(HELP)
        return True

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it comes. Raises `UserError` if there can be none; the text is then forgotten."""
        conversation = [*self.messages, {"role": "user", "content": text}]
        if self.tokenizer.chat_template is None:
            prompt, reader = self.tokenizer.encode(text, bos=True), AnswerReader()
        else:
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = encode_chat(self.tokenizer, [*system, *conversation])
            reader = reader_behind(self.tokenizer, prompt)
        try:
            said = self._say(Request(prompt, self.sampling), _Printer(reader))
        except UserError as error:
            raise UserError(f"{error}; /reset starts over") from None
        finally:
            print()
        self.messages = [*conversation, {"role": "assistant", "content": said}]

    def stats(self) -> str:
        """Speed of the last answer, and what the cache and multi-token prediction did since the start."""
        figures = self.engine.stats()
        rate = f"{self._tokens / self._seconds:.1f} tokens/s" if self._seconds else "nothing"
        lines = [f"last answer     {self._tokens} tokens, {rate}"]
        lines.append(f"since the start {figures.prompt_tokens} tokens of prompts, {figures.generated_tokens} of answers")
        if figures.hit_rate is not None:
            lines.append(
                f"prefix cache    {100 * figures.hit_rate:.0f}% of the prompts were known, {figures.pages_known} of {figures.pages} pages"
            )
        if figures.acceptance is not None:
            lines.append(f"guesses         {100 * figures.acceptance:.0f}% of {figures.drafted_tokens} right")
        return "\n".join(lines)

    def _set_system(self, text: str) -> None:
        if self.tokenizer.chat_template is None:
            raise UserError("this is a base model without a chat template: it has no system prompt")
        self.system = text or None
        print(f"system prompt: {text}" if text else "no system prompt")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file")
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            Path(name).expanduser().write_text(
                json.dumps({"messages": system + self.messages}, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"cannot write {name}: {error.strerror}") from None
        print(f"saved {len(self.messages)} messages in {name}")

    def _say(self, request: Request, printer: _Printer) -> str:
        """Print the answer until its end or Ctrl-C; all of it, thought and marks included, as the chat template wants it later."""
        answer, began = "", time.perf_counter()
        self._tokens, self._seconds = 0, 0.0
        number = self.engine.add_request(request)
        with _interrupts() as interrupted:
            while self.engine.has_work and not interrupted.is_set():
                for increment in self.engine.step().values():
                    answer += increment.text
                    self._tokens += len(increment.tokens)
                    printer.push(increment)
                    if increment.error:
                        raise UserError(increment.error)
                self._seconds = time.perf_counter() - began
        printer.finish()
        if self.engine.has_work:
            self.engine.abort(number)
            print(" [stopped]", end="")
        return answer


class _Printer:
    """Prints an answer piece by piece: its thought dimmed, or between its marks where nobody sees colours."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self._before, self._behind = (DIM, f"{PLAIN}\n\n") if sys.stdout.isatty() else (f"{THINK}\n", f"\n{END_THINK}\n\n")
        self._thinks = False

    def push(self, increment: Increment) -> None:
        piece = self._reader.push(increment.text, [token.id for token in increment.tokens])
        self._print(piece.reasoning, piece.content)

    def finish(self) -> None:
        """Nothing more comes."""
        piece = self._reader.finish()
        self._print(piece.reasoning, piece.content)
        if self._thinks:
            print(self._behind.rstrip("\n"), end="", flush=True)

    def _print(self, reasoning: str, content: str) -> None:
        if reasoning:
            print(reasoning if self._thinks else self._before + reasoning, end="", flush=True)
            self._thinks = True
        if content:
            print(self._behind + content if self._thinks else content, end="", flush=True)
            self._thinks = False


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
