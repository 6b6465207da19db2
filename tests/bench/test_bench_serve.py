"""`shoal bench serve`: its clients count rightly, and what it reports of a real server adds up; its speed is no test's business."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.bench import serve
from shoal.bench.load import Load, Seen, run_load
from shoal.cli import main
from shoal.config import BenchServeCommand, UserError
from shoal.data import Tokenizer
from shoal.data.tokenizer import train_tokenizer
from shoal.formats.locate import locate_model

OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
PIECE = b'data: {"choices":[{"text":"a"}]}\n\n'
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
Place = Callable[[Answer], int]


@pytest.fixture
def place() -> Iterator[Place]:
    """Servers that answer every request in the same way; their ports."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def start(answer: Answer) -> int:
        async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            try:
                await answer(reader, writer)
            except OSError:
                pass
            finally:
                writer.close()

        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(whole, "127.0.0.1", 0), loop).result()
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def end() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    yield start
    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def load(port: int, **changes: Any) -> Seen:
    options: dict[str, Any] = {"prompt": lambda: "a", "tokens": 4, "hang_up": 0.0, "clients": 3, "seconds": 0.2, "seed": 0}
    return run_load(Load("127.0.0.1", port, **options | changes))


async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK + PIECE)
    for _ in range(3):
        await asyncio.sleep(0.005)
        writer.write(PIECE)
        await writer.drain()
    writer.write(b"data: [DONE]\n\n")
    await writer.drain()


async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK + PIECE)
    await writer.drain()


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
    await writer.drain()


async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK + b'data: {"error":{"message":"no"}}\n\n')
    await writer.drain()


def test_clients_count_answers_pieces_and_times(place: Place) -> None:
    seen = load(place(speak))
    assert seen.errors == []
    assert seen.finished >= 3
    assert seen.hung_up == 0
    assert seen.pieces == 4 * seen.finished
    assert len(seen.first) == len(seen.answers) == seen.finished
    assert len(seen.between) == 3 * seen.finished
    assert max(seen.between) > 0.002
    assert seen.seconds >= 0.2


def test_some_hang_up(place: Place) -> None:
    seen = load(place(speak), hang_up=1.0)
    assert seen.errors == []
    assert seen.hung_up > 0
    assert seen.pieces < 4 * (seen.hung_up + seen.finished)


@pytest.mark.parametrize(("answer", "told"), [(break_off, "broke off"), (refuse, "503"), (fail, "no")])
def test_what_goes_wrong_is_counted(place: Place, answer: Answer, told: str) -> None:
    seen = load(place(answer), clients=1)
    assert seen.finished == 0
    assert seen.errors
    assert all(told in error for error in seen.errors)


def test_figures_of_a_server_that_answered_nothing_are_an_error() -> None:
    with pytest.raises(UserError, match="answered no request: gone"):
        serve._figures(Seen(errors=["gone"]), 0, 4)


def test_a_server_that_does_not_start_is_told_with_its_last_words() -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such model')"]
    with pytest.raises(UserError, match="no such model"), serve._running(command, 1, "/"):
        pass


def test_every_request_has_a_prompt_of_its_own(place: Place, trained: Path) -> None:
    asked: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"true}"))
        await speak(reader, writer)

    tokenizer = Tokenizer.load(locate_model(str(trained)))
    prompts = serve.Prompts(tokenizer, BenchServeCommand("x", prompt_tokens=6))
    port = place(note)
    finished = sum(load(port, prompt=prompts).finished for _ in range(2))
    texts = [json.loads(body)["prompt"] for body in asked]
    assert len(texts) >= finished > 6
    assert len(set(texts)) == len(texts)
    assert len({text[:2] for text in texts}) > 5


def test_prompts_have_about_so_many_tokens_with_any_vocabulary(trained: Path) -> None:
    for tokenizer in (train_tokenizer(["the red fish"], 272), Tokenizer.load(locate_model(str(trained)))):
        prompts = serve.Prompts(tokenizer, BenchServeCommand("x", prompt_tokens=40))
        lengths = [len(tokenizer.encode(prompts())) for _ in range(20)]
        assert min(lengths) >= 20
        assert max(lengths) <= 60


def test_a_real_server_under_load(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--clients", "6", "--seconds", "0.5", "--tokens", "8", "--prompt-tokens", "4", "--rounds", "1"]
    assert main(["bench", "serve", str(trained), *options]) == 0
    out = capsys.readouterr().out
    assert "of it" in out
    report = json.loads(out.splitlines()[-1])
    ours = report["shoal"]
    assert (ours["first_error"], ours["pages_held_after"], ours["exit_code"]) == (None, 0, 0)
    assert ours["finished"] > 0
    assert len(ours["memory"]) == 10
    assert min(ours["memory"]) > 10**7
    assert ours["first_token_p50"] <= ours["first_token_p99"]
    assert report["of_engine"] == pytest.approx(ours["tokens_per_second"] / report["engine_tokens_per_second"])
