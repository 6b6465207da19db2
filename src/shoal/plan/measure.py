"""What this machine sustains, measured in some seconds. The only file of `plan` that needs torch."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from .hardware import GIB, Machine


def measure_machine(seconds: float = 4.0, folder: str | None = None) -> Machine:
    """Measure memory bandwidth, matrix products in fp32, bf16 and int8, and disk reads (of a file in `folder`).

    Uses the GPU if there is one, else all CPU threads that torch uses. Each figure is the median over repetitions after a
    warm-up; about `seconds` seconds in all. Rates that the machine cannot do are 0.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize = torch.cuda.synchronize if device == "cuda" else _nothing
    share = seconds / 5
    size = 8192 if device == "cuda" else 1024

    def rate(dtype: torch.dtype) -> float:
        if dtype == torch.int8:
            a = torch.randint(-128, 127, (size, size), dtype=dtype, device=device)
            return 2 * size**3 / _seconds_of(lambda: torch._int_mm(a, a), share, synchronize)
        a = torch.randn(size, size, device=device).to(dtype)
        return 2 * size**3 / _seconds_of(lambda: a @ a, share, synchronize)

    source = torch.ones((1 if device == "cuda" else 4) * 2**26 // 4, device=device)
    target = torch.empty_like(source)
    copied = _seconds_of(lambda: target.copy_(source), share, synchronize)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        int8 = rate(torch.int8)
    except RuntimeError:
        int8 = 0.0
    return Machine(
        name=name,
        memory_gib=memory / GIB,
        bandwidth_gb_s=2 * source.numel() * 4 / copied / 1e9,
        fp32_tflops=rate(torch.float32) / 1e12,
        bf16_tflops=rate(torch.bfloat16) / 1e12,
        int8_tops=int8 / 1e12,
        devices_per_node=1,
        disk_gb_s=_disk_rate(folder) / 1e9,
        measured=True,
        source=f"measured: products of {size} x {size} matrices, copy of {source.numel() * 4 // 2**20} MiB",
    )


def _nothing() -> None:
    pass


def _seconds_of(run: Callable[[], object], budget: float, synchronize: Callable[[], None]) -> float:
    """Median time of `run` over at least 3 repetitions and about `budget` seconds, after one to warm up."""
    run()
    synchronize()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def _disk_rate(folder: str | None, size: int = 128 * 2**20) -> float:
    """Bytes per second of reading a file back after the system was asked to forget it."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "probe"
        with path.open("wb") as file:
            file.write(os.urandom(2**20) * (size // 2**20))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(2**22):
                pass
        return size / (time.perf_counter() - start)
