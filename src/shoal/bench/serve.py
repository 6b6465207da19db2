"""`shoal bench serve`: the server under load, beside its engine and beside llama.cpp's server."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..config import BenchServeCommand, EngineOptions, MachineOptions, SamplingOptions, UserError
from ..data import Tokenizer
from ..engine import Engine, Request, load
from ..formats.gguf import export_gguf
from ..formats.locate import locate_model
from .load import Load, Seen, run_load
from .machine import family, memory_of
from .sides import require_peer

START_SECONDS = 120
STOP_SECONDS = 40
WARM_UP_SECONDS = 2.0
"""Before anything is counted."""
MOST_ALONE_SECONDS = 10.0
"""Of the engine alone, in every round."""


def run_bench(command: BenchServeCommand) -> dict[str, Any]:
    """Measure, print a table, and return the JSON object."""
    command.validate()
    folder = locate_model(command.model)
    tokenizer = Tokenizer.load(folder)
    prompts = Prompts(tokenizer, command)
    result: dict[str, Any] = {"clients": command.clients, "seconds": command.seconds, "rounds": command.rounds}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        if command.vs is not None:  # before anything is measured
            require_peer("llama_cpp.server.__main__", "llama-cpp-python[server]", command.llama_python)
            export_gguf(folder, tokenizer, file, "f16")
        result |= _measure_shoal(command, folder, prompts)
        if command.vs is not None:
            result["llama_cpp"] = _measure_llama(command, file, prompts)
            result["times_llama_cpp"] = result["shoal"]["tokens_per_second"] / result["llama_cpp"]["tokens_per_second"]
    _print(result)
    return result


class Prompts:
    """Random texts of about so many tokens, a new one for every request: a prefix cache finds a first token now and then, and no more."""

    def __init__(self, tokenizer: Tokenizer, command: BenchServeCommand) -> None:
        self._tokenizer, self._tokens = tokenizer, command.prompt_tokens
        self._draw = random.Random(command.seed)
        # Pieces of characters, and tags, become other tokens, and more of them, when their text is read again.
        self._words = [token for token in range(tokenizer.vocab_size) if tokenizer.encode(tokenizer.decode([token])) == [token]]

    def __call__(self) -> str:
        return self._tokenizer.decode(self._draw.choices(self._words, k=self._tokens))


def _measure_shoal(command: BenchServeCommand, folder: Path, prompts: Prompts) -> dict[str, Any]:
    """The server and the engine alone, in turns. Tokens are counted while all clients are busy, not while they come and go."""
    port = _free_port()
    server = [sys.executable, "-m", "shoal", "serve", str(folder), "--port", str(port), "--max-waiting", str(command.clients)]
    seconds, all_seen = command.seconds / command.rounds, Seen()
    watched: list[Watch] = []
    alone: list[float] = []
    with _engine_alone(command, folder, min(seconds, MOST_ALONE_SECONDS)) as rate, _running(server, port, "/health") as process:
        _load(command, port, prompts, WARM_UP_SECONDS)
        for _ in range(command.rounds):
            watch = Watch(process.pid, port, seconds)
            watch.start()
            all_seen.add(_load(command, port, prompts, seconds + WARM_UP_SECONDS))
            watch.join()
            watched.append(watch)
            _wait_until_idle(port)
            alone.append(rate())
        held = _metrics(port)["shoal_cache_pages_in_use"]
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
    figures = _figures(all_seen, statistics.median(watch.rate for watch in watched), command.tokens)
    figures |= {"memory": [sample for watch in watched for sample in watch.memory], "pages_held_after": held, "exit_code": code}
    shares = [watch.rate / rate for watch, rate in zip(watched, alone, strict=True)]
    return {
        "shoal": figures,
        "engine_tokens_per_second": statistics.median(alone),
        "of_engine_rounds": shares,
        "of_engine": statistics.median(shares),
    }


class Watch(threading.Thread):
    """Looks at a server under load from when it is warm: `rate` in tokens per second, `memory` after every tenth of the time."""

    def __init__(self, process: int, port: int, seconds: float) -> None:
        super().__init__(daemon=True)  # nobody waits for it where a signal ends the load
        self._process, self._port, self._seconds = process, port, seconds
        self.rate = 0.0
        self.memory: list[int] = []

    def run(self) -> None:
        time.sleep(WARM_UP_SECONDS)
        began, before = time.perf_counter(), _metrics(self._port)
        for _ in range(10):
            time.sleep(self._seconds / 10)
            self.memory.append(sum(memory_of(process).resident for process in family(self._process)))
        made = _metrics(self._port)["shoal_generated_tokens_total"] - before["shoal_generated_tokens_total"]
        self.rate = made / (time.perf_counter() - began)


@contextlib.contextmanager
def _engine_alone(command: BenchServeCommand, folder: Path, seconds: float) -> Iterator[Callable[[], float]]:
    """A function that measures the engine without a server, in a process that stands still meanwhile."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_rates, args=(theirs, command, folder, seconds), daemon=True)
    process.start()
    theirs.close()

    def rate() -> float:
        try:
            ours.send(True)
            measured: float = ours.recv()
        except (EOFError, OSError):
            raise UserError("the engine alone did not run to its end: see above") from None
        return measured

    try:
        yield rate
    finally:
        process.kill()
        process.join()


def _serve_rates(pipe: Connection, command: BenchServeCommand, folder: Path, seconds: float) -> None:
    """The process: one rate for every message, until there is nobody to send one."""
    prompts = Prompts(Tokenizer.load(folder), command)
    loaded = load(str(folder), MachineOptions(), pin=True)
    engine = Engine(loaded.runner, loaded.tokenizer, EngineOptions())
    with contextlib.suppress(EOFError, OSError):
        while pipe.recv():
            pipe.send(_engine_rate(command, engine, prompts, seconds))


def _engine_rate(command: BenchServeCommand, engine: Engine, prompts: Prompts, seconds: float) -> float:
    """Tokens per second of the engine with as many requests of the same kind: where one ends, the next begins."""
    draw = random.Random(command.seed)

    def request() -> int:
        cut = draw.randrange(1, command.tokens) if draw.random() < command.hang_up and command.tokens > 1 else command.tokens
        return engine.add_request(Request(engine.encode(prompts()), SamplingOptions(max_tokens=cut, temperature=1.0, ignore_eos=True)))

    numbers = {request() for _ in range(command.clients)}
    began = time.perf_counter()
    counts_from, ends = began + WARM_UP_SECONDS, began + WARM_UP_SECONDS + seconds
    made = 0
    while (now := time.perf_counter()) < ends:
        increments = engine.step()
        if now >= counts_from:
            made += sum(len(increment.tokens) for increment in increments.values())
        for number in [number for number, increment in increments.items() if increment.finish_reason is not None]:
            numbers.remove(number)
            numbers.add(request())
    for number in numbers:
        engine.abort(number)
    return made / (now - counts_from)


def _measure_llama(command: BenchServeCommand, file: Path, prompts: Prompts) -> dict[str, Any]:
    port = _free_port()
    python = command.llama_python or sys.executable
    server = [python, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port), "--n_ctx", "1024"]
    # Without the last option, every new request breaks off the one that runs.
    with _running([*server, "--interrupt_requests", "false"], port, "/v1/models"):
        seen = _load(command, port, prompts, command.seconds)
    return _figures(seen, seen.pieces / seen.seconds, command.tokens)


def _load(command: BenchServeCommand, port: int, prompts: Prompts, seconds: float) -> Seen:
    return run_load(Load("127.0.0.1", port, prompts, command.tokens, command.hang_up, command.clients, seconds, command.seed))


def _figures(seen: Seen, rate: float, tokens_each: int) -> dict[str, Any]:
    if not seen.first:
        raise UserError(f"the server answered no request: {(seen.errors or ['no error told'])[0]}")
    return {
        "tokens_per_second": rate,
        "seconds": seen.seconds,
        "finished": seen.finished,
        "hung_up": seen.hung_up,
        "errors": len(seen.errors),
        "first_error": seen.errors[0] if seen.errors else None,
        "first_token_p50": _quantile(seen.first, 0.5),
        "first_token_p99": _quantile(seen.first, 0.99),
        "per_token_p50": _quantile(seen.answers, 0.5) / max(tokens_each - 1, 1),
        "per_token_p99": _quantile(seen.answers, 0.99) / max(tokens_each - 1, 1),
        "between_pieces_p50": _quantile(seen.between, 0.5),
        "between_pieces_p99": _quantile(seen.between, 0.99),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values) or [float("nan")]
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@contextlib.contextmanager
def _running(command: list[str], port: int, path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from when it answers on `path`. Raises `UserError` with the end of its output if it does not."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.time() + START_SECONDS
            while not _answers(port, path):
                if process.poll() is not None or time.time() > deadline:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                    raise UserError(f"{' '.join(command[1:4])} does not start: {last[0]}")
                time.sleep(0.1)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _metrics(port: int) -> dict[str, float]:
    """Figures without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


def _wait_until_idle(port: int) -> None:
    deadline = time.time() + 10
    while time.time() < deadline and _metrics(port)["shoal_requests_running"] + _metrics(port)["shoal_requests_waiting"]:
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _print(result: dict[str, Any]) -> None:
    print(f"{'':14}{'tokens/s':>10}{'first token':>22}{'per token':>20}{'between pieces':>20}{'done':>8}{'left':>8}{'errors':>8}")
    for name in ("shoal", "llama_cpp"):
        if name not in result:
            continue
        row = result[name]
        first = f"{1000 * row['first_token_p50']:.0f} / {1000 * row['first_token_p99']:.0f} ms"
        each = f"{1000 * row['per_token_p50']:.1f} / {1000 * row['per_token_p99']:.1f} ms"
        between = f"{1000 * row['between_pieces_p50']:.0f} / {1000 * row['between_pieces_p99']:.0f} ms"
        counts = f"{row['finished']:8}{row['hung_up']:8}{row['errors']:8}"
        print(f"{name.replace('_', '.'):14}{row['tokens_per_second']:10.0f}{first:>22}{each:>20}{between:>20}{counts}")
    megabytes = [f"{held / 1e6:.0f}" for held in result["shoal"]["memory"][:: result["rounds"]]]
    print(f"{'memory':14}{' '.join(megabytes)} MB, from the beginning to the end (pages of the cache take memory when they are first used)")
    rounds = ", ".join(f"{100 * share:.0f}" for share in result["of_engine_rounds"])
    share = f"the server reaches {100 * result['of_engine']:.0f}% of it (in rounds: {rounds})"
    print(f"{'engine alone':14}{result['engine_tokens_per_second']:10.0f}   {share}")
    if "times_llama_cpp" in result:
        print(f"{result['times_llama_cpp']:.1f} times llama.cpp's server; times are p50 / p99")
