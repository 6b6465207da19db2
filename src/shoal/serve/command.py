"""`shoal serve`: from the command line to a running server, and down again in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import ServeCommand, UserError
from ..data.chat_template import read_template, refuse_template
from ..engine import PAGE, EngineFailed
from ..formats.locate import locate_model
from ..runtime import give_way
from .backend import engine_process
from .host import Host, State

if TYPE_CHECKING:
    import uvicorn

NICENESS = 10
"""By which the thread that answers over HTTP stands back: where it pushes one of the engine's threads off its core within a step, the
others wait for it."""
CLOSING_SECONDS = 5
"""For connections to close once all answers are sent."""
WATCH_SECONDS = 0.5
"""Between two looks at whether the engine still runs."""
SEND_SECONDS = 60
"""For a client to take what it is sent; beyond them, its connection is closed. Only Linux can be told so."""


def run_serve(command: ServeCommand) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises `UserError` if the model or the address cannot be used."""
    command.validate()
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"shoal serve needs {error.name}: install it with pip install 'shoal[serve]'") from None
    folder = locate_model(command.model)
    host = Host(command, command.name or model_name(command.model), partial(engine_process, folder, command.machine, command.engine))
    if command.chat_template is not None:
        read_template(command.chat_template)  # refused before anything is loaded
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr)
    with listen(command) as sock:
        _run(_serve(host, sock))
    if isinstance(host.failure, EngineFailed):
        _say("shoal: error: the engine broke down, as said above: start the server again")
        sys.exit(1)  # so that whoever watches over the server does
    if host.failure is not None:
        raise UserError(f"{command.model} cannot be loaded: {host.failure}")


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Like `asyncio.run`, with uvloop where there is one: events reach their clients with a third less work."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def model_name(path: str) -> str:
    """What clients call the model in a folder: the folder's name."""
    return path.rstrip("/").rpartition("/")[2] or path


def listen(command: ServeCommand) -> socket.socket:
    """A socket on the address asked for."""
    try:
        family = socket.getaddrinfo(command.host, command.port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((command.host, command.port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {command.host}:{command.port}: {error}; choose another --host or --port") from None
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SEND_SECONDS)  # connections have it from here
    return sock


def make_server(host: Host) -> uvicorn.Server:
    """uvicorn around the app, without its own handling of signals."""
    import uvicorn

    from .app import make_app

    config = uvicorn.Config(
        make_app(host), log_level="error", access_log=False, timeout_keep_alive=30, timeout_graceful_shutdown=CLOSING_SECONDS, ws="none",
        proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config)


async def _serve(host: Host, sock: socket.socket) -> None:
    server = make_server(host)
    stopper = _Stopper(host, server)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopper.stop)
    watch = asyncio.create_task(_announce(host, server, sock))
    await server._serve([sock])
    watch.cancel()


class _Stopper:
    """The first signal drains, the second stops at once."""

    def __init__(self, host: Host, server: Any) -> None:
        self._host, self._server = host, server
        self._task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        if self._task is not None:
            _say("stopping now")
            for name in ("uvicorn.error", "shoal.engine"):  # what breaks off now is no news
                logging.getLogger(name).disabled = True
            self._server.should_exit = self._server.force_exit = True
            self._task.cancel()
            return
        self._task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        running = self._host.in_flight
        if running:
            _say(f"shutting down: {running} requests have {self._host.command.grace:g} s to end; again to stop now")
        try:
            await self._host.drain()
        finally:
            self._server.should_exit = True


async def _announce(host: Host, server: Any, sock: socket.socket) -> None:
    """Tell the terminal where the server is, and when it is ready; end the server where the model cannot be loaded, or is no more."""
    command, port = host.command, sock.getsockname()[1]
    shown = f"[{command.host}]" if ":" in command.host else command.host
    _say(f"loading {command.model} ...")
    while host.state is State.LOADING:
        await asyncio.sleep(0.02)
    if host.state is not State.READY:
        server.should_exit = True
        return
    give_way(NICENESS)
    engine = host.engine
    config, stats = engine.config, engine.stats()
    _say(f"{host.name}: {config.num_hidden_layers} layers, context {engine.context}, cache {stats.pages * PAGE} tokens")
    _say(f"  API   http://{shown}:{port}/v1")
    if not command.api_only:
        _say(f"  page  http://{shown}:{port}/")
    if (template := host.tokenizer.chat_template) is not None and (why := refuse_template(template)) is not None:
        _say(f"  chats will be refused: the model's chat template {why}; --chat-template gives it another")
    if template is None:
        _say("  a base model without a chat template: it completes text; --chat-template gives it one")
    if not command.is_local and not command.keys():
        _say("  anyone who reaches this address can use the model: set --api-key-file")
    _say("Ctrl-C to stop")
    while host.state is State.READY:
        await asyncio.sleep(WATCH_SECONDS)
    if host.state is State.FAILED:
        host.failure = EngineFailed()
        server.should_exit = True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
