"""Real processes that train together over gloo, kept for many runs."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

PATIENCE_SECONDS = 300


class Processes:
    """`count` processes; `run` calls a function in all of them, as `shoal train --nproc` would start it."""

    def __init__(self, count: int) -> None:
        self.count, self.broken = count, ""
        context = mp.get_context("spawn")
        self._pipes, self._members = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            member = context.Process(target=_serve, args=(theirs, rank, count), daemon=True)
            member.start()
            self._pipes.append(ours)
            self._members.append(member)

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `work(*args)` of all processes, in order; an error in one of them is one here."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for pipe in self._pipes:
            pipe.send((store.port, work, args))
        results: dict[int, Any] = {}
        while len(results) < self.count:
            waiting = {id(pipe): rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait([self._pipes[rank] for rank in waiting.values()], timeout=PATIENCE_SECONDS)
            if not ready:
                self.broken = f"processes {sorted(waiting.values())} do not answer"
            for pipe in ready:
                fine, results[waiting[id(pipe)]] = cast(Connection, pipe).recv()
                if not fine:
                    self.broken = results[waiting[id(pipe)]]
            if self.broken:
                self.close()
                raise AssertionError(self.broken)
        return [results[rank] for rank in range(self.count)]

    def close(self) -> None:
        for member in self._members:
            member.kill()
            member.join()


def _serve(pipe: Connection, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    while True:
        with contextlib.suppress(EOFError):
            port, work, args = pipe.recv()
            os.environ["MASTER_PORT"] = str(port)
            try:
                pipe.send((True, work(*args)))
            except Exception:
                pipe.send((False, f"process {rank}: {traceback.format_exc()}"))
            continue
        return
