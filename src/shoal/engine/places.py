"""Where an engine works beside an event loop: on a thread of the same process, or in a process of its own."""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import queue
import select
import signal
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

from ..config import ModelConfig
from .engine import Engine, EngineStats
from .worker import Command, News, Stop, Worker, as_told

POLL_SECONDS = 0.05
"""How often it is asked whether an engine that is being made is still wanted."""
Hear = Callable[[News], None]
End = Callable[[BaseException | None], None]


class Place(Protocol):
    """`start` sets the engine to work; it tells `hear` what happens and, once, `end` that nothing will any more (and why, if it broke
    down), both on a thread of the place."""

    config: ModelConfig
    context: int
    """Tokens of prompt and answer together, at most."""
    stats: EngineStats
    """At the beginning."""

    def start(self, hear: Hear, end: End) -> None: ...

    def send(self, command: Command) -> None:
        """Never blocks. Commands after the end are lost. Raises what `pickle` does about a command that cannot go to another process."""
        ...

    def join(self) -> None:
        """Wait for the end."""
        ...


class EngineThread:
    """An engine of this process. Its Python and the event loop's take turns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config, self.context, self.stats = engine.runner.config, engine.context, engine.stats()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def start(self, hear: Hear, end: End) -> None:
        self._thread = threading.Thread(target=self._work, args=(hear, end), name="shoal-engine", daemon=True)
        # At exit the interpreter goes while daemons run on, and C++ that comes back from a step then aborts the process.
        atexit.register(self._stop)
        self._thread.start()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def join(self) -> None:
        self._thread.join()

    def _stop(self) -> None:
        """After the present step."""
        self.send(Stop())
        self.join()

    def _work(self, hear: Hear, end: End) -> None:
        try:
            Worker(self.engine, hear).run(self._take)
        except BaseException as error:
            end(error)
        else:
            end(None)
        finally:
            atexit.unregister(self._stop)

    def _take(self, wait: bool) -> Iterable[Command]:
        while wait or not self._commands.empty():
            wait = False
            yield self._commands.get()


class _Ready(NamedTuple):
    """The first message of an engine's process."""

    config: ModelConfig
    context: int
    stats: EngineStats


class EngineProcess:
    """The engine that `make` gives, in a process of its own: event loop and engine share no interpreter and no lock.

    `make` is called there, so it has to be a function of a module or a `functools.partial` of one. Raises what it raises. The process
    ends with this one, whatever becomes of it; and while the engine is made, by a signal, as soon as `unwanted` is set.
    """

    def __init__(self, make: Callable[[], Engine], unwanted: threading.Event | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of threads that it does not have
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), name="shoal-engine", daemon=True)
        self._process.start()
        # It ignores the signals that multiprocessing would send a daemon at exit, to wait for it then: whoever stops at once kills it.
        atexit.register(self._process.kill)
        theirs.close()
        while unwanted is not None and not self._pipe.poll(POLL_SECONDS):
            if unwanted.is_set():
                self._process.kill()
        first = self._receive()
        if not isinstance(first, _Ready):
            self._process.join()
            raise first if isinstance(first, Exception) else RuntimeError(self._how_it_ended())
        self.config, self.context, self.stats = first
        self._commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def start(self, hear: Hear, end: End) -> None:
        # Its own thread sends, so that a process that is busy with a step keeps no event loop waiting for room in the pipe.
        self._sender = threading.Thread(target=self._send_all, name="shoal-send", daemon=True)
        self._receiver = threading.Thread(target=self._hear_all, args=(hear, end), name="shoal-hear", daemon=True)
        self._sender.start()
        self._receiver.start()

    def send(self, command: Command) -> None:
        self._commands.put(pickle.dumps(command))  # here, where whoever sends what cannot be pickled is told

    def join(self) -> None:
        self._receiver.join()

    def _send_all(self) -> None:
        try:
            while (command := self._commands.get()) is not None:
                self._pipe.send_bytes(command)
        except OSError:
            pass  # the process has gone, which the other thread tells

    def _hear_all(self, hear: Hear, end: End) -> None:
        while isinstance(news := self._receive(), News):
            hear(news)
        self._commands.put(None)
        self._sender.join()
        self._process.join()
        atexit.unregister(self._process.kill)
        self._pipe.close()
        end(news if isinstance(news, Exception) else None if isinstance(news, Stop) else RuntimeError(self._how_it_ended()))

    def _receive(self) -> object:
        """None where the process has gone without a word."""
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            return None

    def _how_it_ended(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the engine's process {how}" + (": too little memory, perhaps" if code == -signal.SIGKILL else "")


def _serve(pipe: Connection, make: Callable[[], Engine]) -> None:
    """The process: make the engine and let it work until it is told to stop or nobody is left to tell it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the process that asks for answers decides what comes of it
    try:
        engine = make()
        pipe.send(_Ready(engine.runner.config, engine.context, engine.stats()))
        watch = select.poll()  # a tenth of the time that Connection.poll takes
        watch.register(pipe, select.POLLIN)

        def take(wait: bool) -> Iterable[Command]:
            while wait or watch.poll(0):
                wait = False
                yield pipe.recv()

        Worker(engine, pipe.send).run(take)
        pipe.send(Stop())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except BaseException as error:
        pipe.send(as_told(error))
