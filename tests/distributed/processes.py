"""Real processes that train together over gloo."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

PATIENCE_SECONDS = 300


def in_processes(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of `work(*args)` in `count` processes, in order, started as `shoal train --nproc` would; an error in one is one here.

    Every call has processes of its own: gloo's threads outlive their group and look for messages 100 times a second, so that processes
    kept for many runs would soon do nothing else. They are forked from one that has imported what they need, which takes no time.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["layouts", "torch.distributed.fsdp", "torch.distributed.pipelining"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, members = [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        member = context.Process(target=_work, args=(theirs, rank, count, store.port, work, args), daemon=True)
        member.start()
        theirs.close()
        pipes.append(ours)
        members.append(member)
    try:
        return _results(pipes)
    finally:
        for member in members:
            member.kill()
            member.join()


def _results(pipes: list[Connection]) -> list[Any]:
    """What every process sends; raises `AssertionError` for the first that failed, ended without a word or does not answer."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait([pipes[rank] for rank in waiting.values()], timeout=PATIENCE_SECONDS)
        assert ready, f"processes {sorted(waiting.values())} do not answer"
        for pipe in ready:
            rank = waiting[id(pipe)]
            try:
                fine, results[rank] = cast(Connection, pipe).recv()
            except EOFError:
                raise AssertionError(f"process {rank} ended without a word") from None
            assert fine, results[rank]
    return [results[rank] for rank in range(len(pipes))]


def _work(pipe: Connection, rank: int, count: int, port: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        pipe.send((True, work(*args)))
    except Exception:
        pipe.send((False, f"process {rank}: {traceback.format_exc()}"))
    pipe.poll(None)  # tensors are taken over from this process, which is killed once they are
