"""A real server in this process, on a tiny random model, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.config import MachineOptions, ModelConfig, ServeCommand, serve_options
from shoal.data import Tokenizer
from shoal.engine import EngineThread, Loaded, Place, TorchRunner, load
from shoal.formats.huggingface import save_model
from shoal.model import Transformer, init_weights
from shoal.runtime import Machine
from shoal.serve.backend import make_engine
from shoal.serve.command import listen, make_server
from shoal.serve.host import Host, State

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2}
SHAPE |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}
SHAPE |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512, "num_nextn_predict_layers": 1}
SHAPE |= {"initializer_range": 0.3}


def tiny(tokenizer: Tokenizer) -> Loaded:
    """A random model that speaks nonsense, each time the same."""
    model = Transformer(ModelConfig(vocab_size=400, **SHAPE))
    init_weights(model, 0)
    machine = Machine(torch.device("cpu"), "fp32", 1, 1.0, "test")
    return Loaded(TorchRunner(model.eval(), machine), tokenizer, machine, Path("tiny"))


def write_model(folder: Path, tokenizer: Tokenizer, **shape: Any) -> Path:
    """The same model as files."""
    model = Transformer(ModelConfig(vocab_size=400, **SHAPE | shape))
    init_weights(model, 0)
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def from_files(folder: Path) -> Loaded:
    """The model in `folder` as `shoal serve` runs it: by the C++ kernels, where there are some."""
    return load(str(folder), MachineOptions(precision="fp32", threads=1))


@contextlib.contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`shoal serve` in a process of its own, and its address; it has to have ended at the end of the block."""
    command = [sys.executable, "-m", "shoal", "serve", str(folder), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            told = ""
            for line in server.stderr:
                told += line
                if found := re.search(r"API\s+(http://\S+)/v1", line):
                    break
            else:
                raise AssertionError(told)
            threading.Thread(target=server.stderr.read, daemon=True).start()  # so that it never waits for a reader
            yield found[1], server
            assert server.poll() is not None
        finally:
            server.kill()


@dataclass
class Served:
    """Where a server listens, and what is behind it."""

    url: str
    load: Callable[[], Loaded]
    host: Host
    server: Any
    loop: asyncio.AbstractEventLoop

    def drain(self) -> None:
        """As SIGTERM does."""
        asyncio.run_coroutine_threadsafe(self.host.drain(), self.loop)

    def pages_in_use(self) -> int:
        assert self.host._engine is not None
        return self.host._engine.stats().pages_in_use

    def is_idle(self, seconds: float = 5.0) -> bool:
        """Whether, soon, nothing runs and no page is held."""
        deadline = time.time() + seconds
        while time.time() < deadline:
            if not self.host.in_flight and not self.pages_in_use():
                return True
            time.sleep(0.01)
        return False


Serve = Callable[..., contextlib.AbstractContextManager[Served]]


@contextlib.contextmanager
def serving(loads: Callable[[], Loaded], wait: bool = True, **options: Any) -> Iterator[Served]:
    """A server on a free port, until the end of the block."""
    command: ServeCommand = serve_options("tiny", port=0, **options)

    def start(_: threading.Event) -> tuple[Place, Tokenizer]:
        loaded = loads()
        return EngineThread(make_engine(loaded, command.engine)), loaded.tokenizer

    host = Host(command, "tiny", start)
    sock = listen(command)
    server = make_server(host)
    ready, loops = threading.Event(), []

    def run() -> None:
        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            ready.set()
            await server._serve([sock])

        asyncio.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    deadline = time.time() + 30
    while (wait and host.state is State.LOADING) or not server.started:
        assert time.time() < deadline
        time.sleep(0.005)
    try:
        yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", loads, host, server, loops[0])
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
        assert not thread.is_alive()
