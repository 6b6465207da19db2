"""Memory that the processor reads fastest, and letting go of mapped files."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20


def large_pages(nbytes: int) -> Tensor:
    """Zeros, uint8 `[nbytes]`, in pages of 2 MiB where the system has them.

    Reading weights once per token, a processor spends much of its time on finding 4 KiB pages: large ones were read up to 1.6 times as fast
    (docs/experiments.md). Memory is taken only as it is written.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory would have small pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % LARGE_PAGE
    return whole[first : first + nbytes]


def copy_bytes(source: Tensor, target: Tensor) -> None:
    """Copy a contiguous tensor into bytes `target` on this thread alone, without holding Python's lock."""
    assert source.is_contiguous()
    assert target.nbytes == source.nbytes
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


class MappedFiles:
    """Where this process has files mapped (nowhere, on systems without /proc)."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            place, access, _, _, inode = line.split(maxsplit=5)[:5]
            if inode != "0" and access.endswith("p"):
                begin, end = place.split("-")
                self._ranges.append((int(begin, 16), int(end, 16)))

    def forget(self, tensor: Tensor) -> None:
        """Give back the memory of a tensor that lies in a mapped file and was not written to; it would be read from the file again."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(first <= begin and end <= last for first, last in self._ranges):
            begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
