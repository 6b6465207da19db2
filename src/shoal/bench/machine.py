"""What this machine can do at most, measured beside the contestants, and what a process takes of it."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..memory import large_pages
from ..runtime import matmul_rates

READ_BYTES = 1 << 29
"""Far more than any cache holds."""
REPEATS = 9


class Reader:
    """Reads memory in large pages with all of torch's threads."""

    def __init__(self) -> None:
        self._source = large_pages(READ_BYTES).view(torch.int64)
        self._source.fill_(1)

    def rate(self) -> float:
        """Bytes per second, once."""
        began = time.perf_counter()
        self._source.sum()
        return READ_BYTES / (time.perf_counter() - began)


def read_bandwidth() -> float:
    """Bytes per second that can be read from memory: a median, as the sides' rates are."""
    reader = Reader()
    return statistics.median(reader.rate() for _ in range(REPEATS))


def product_peaks() -> dict[str, float]:
    """Multiply-adds (counted as two) per second in fp32 and int8; int8 is 0 where torch has no such product."""
    peaks = matmul_rates(torch.device("cpu"), ("fp32",)) | {"int8": 0.0}
    size = 1024
    a = torch.randint(-128, 127, (size, size), dtype=torch.int8)
    try:
        for _ in range(12):
            began = time.perf_counter()
            torch._int_mm(a, a)
            peaks["int8"] = max(peaks["int8"], 2 * size**3 / (time.perf_counter() - began))
    except RuntimeError:
        pass
    return peaks


@dataclass(frozen=True)
class Memory:
    """What the operating system says that a process holds, in bytes."""

    resident: int
    peak: int
    mapped_files: int
    """Of the resident part, pages of files: they could be read again."""


def memory_of(process: int) -> Memory:
    """From /proc; zeros where there is no such thing."""
    path = Path(f"/proc/{process}/status")
    if not path.is_file():
        return Memory(0, 0, 0)
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    resident, peak, files = (int(fields.get(name, "0").split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssFile"))
    return Memory(resident, peak, files)


def family(process: int) -> list[int]:
    """The process and all that descend from it; only itself where there is no /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have gone
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    members = [process]
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members
