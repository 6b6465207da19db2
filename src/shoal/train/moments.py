"""Where and how optimizers keep their moments: in fp32 or BF16, in memory or, for some parameters, in a file."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError
from .uncompiled import Uncompiled

RELEASED_EVERY = 0.02
"""Seconds, in which a disk reads or writes some tens of megabytes."""


class Moments:
    """Makes moments, and lets go of the memory of those that lie in a file."""

    def __init__(self, dtype: torch.dtype = torch.float32, offloaded: Iterable[Tensor] = (), folder: Path | None = None) -> None:
        """Of the parameters `offloaded`, moments lie in a nameless file in `folder`, which vanishes with this process."""
        self.dtype = dtype
        self._offloaded = {id(p) for p in offloaded}
        self._file: Any = tempfile.TemporaryFile(dir=folder) if self._offloaded else None  # noqa: SIM115 - open as long as this
        self._maps: dict[int, mmap.mmap] = {}

    def zeros(self, p: Tensor) -> Tensor:
        """A moment of `p`."""
        if id(p) not in self._offloaded or not p.numel():
            return torch.zeros_like(p, dtype=self.dtype, memory_format=torch.contiguous_format)
        start = self._file.seek(0, 2)
        length = -(-p.numel() * self.dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(os, "posix_fallocate"):  # without room on the disk, the first write to the mapping would kill the process
            try:
                os.posix_fallocate(self._file.fileno(), start, length)
            except OSError as error:
                raise UserError(f"--offload finds no room for the optimizer state of experts ({error}): free some where --out is") from None
        else:
            self._file.truncate(start + length)
        memory = mmap.mmap(self._file.fileno(), length, offset=start)
        moment = torch.frombuffer(memory, dtype=self.dtype, count=p.numel()).view(p.shape)
        self._maps[moment.data_ptr()] = memory
        return moment

    @contextmanager
    def being_read(self) -> Iterator[None]:
        """While somebody else reads all of them, those in a file are let go of again and again, as nobody says which he has read."""
        if not self._maps:
            yield
            return
        done = threading.Event()

        def let_go_of_all() -> None:
            while not done.wait(RELEASED_EVERY):
                for memory in self._maps.values():
                    self._release(memory)

        thread = threading.Thread(target=let_go_of_all, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            for memory in self._maps.values():
                self._release(memory)

    def let_go(self, moment: Tensor) -> None:
        """Until it is needed again; costs nothing where it does not lie in a file."""
        memory = self._maps.get(moment.data_ptr())
        if memory is not None:
            self._release(memory)

    @staticmethod
    def _release(memory: mmap.mmap) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            memory.madvise(mmap.MADV_DONTNEED)

    def load(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """`saved` is a `state_dict` of such an optimizer. Moments are taken over one by one, in this run's dtype and place."""
        Uncompiled.load_state_dict(optimizer, {**saved, "state": {}})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, values in saved["state"].items():
            p = parameters[index]
            state = optimizer.state[p]
            for name, value in values.items():
                if value.numel() == 1 and value.ndim == 0:
                    state[name] = value.clone()
                else:
                    state[name] = self.zeros(p).copy_(value)
                    self.let_go(state[name])
