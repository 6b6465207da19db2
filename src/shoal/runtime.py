"""The machine: device, precision and threads, chosen in one place with the reason printed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import UserError
from .kernels import linear
from .kernels.selection import multiplies_fp8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limits (Linux, version 2)."""
BF16_MARGIN = {"cuda": 1.3, "cpu": 4.0}
"""bf16 autocast pays only where bf16 matmul is faster than fp32, as linear layers compute it, by this factor. It costs casts; on a CPU
also Shoal's own kernels, which are fp32, and up to a GiB of compiled products, one for every number of rows that an expert gets."""


@dataclass(frozen=True)
class Machine:
    """What a command runs on."""

    device: torch.device
    precision: str
    """`fp32`, `bf16` or `fp8`: what matmuls of activations run in; weights and optimizer are fp32 either way. With `fp8`, products that are
    not in FP8 run in fp32 on a CPU, in bf16 on a GPU."""
    threads: int
    peak_flops: float
    """Measured matmul rate in `precision`, FLOP/s."""
    reason: str

    def autocast(self) -> torch.autocast:
        """Context in which matmuls run in `precision`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.plain_precision == "bf16")

    @property
    def plain_precision(self) -> str:
        """Of products that are not in FP8."""
        return plain_precision(self.precision, self.device)

    def describe(self) -> str:
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{self.threads} CPU threads"
        return f"{where}, {self.precision} ({self.reason}), matmul peak {self.peak_flops / 1e9:.0f} GFLOP/s"


def choose_device(device: str) -> torch.device:
    """`auto` takes a GPU where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or install a CUDA build of torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def plain_precision(precision: str, device: torch.device) -> str:
    """Of products that are not in FP8."""
    return precision if precision != "fp8" else "bf16" if device.type == "cuda" else "fp32"


def start(device: str = "auto", precision: str = "auto", threads: int = 0, return_memory: bool = False) -> Machine:
    """Set threads, choose device and precision, measure the matmul peak (about half a second).

    `return_memory`: freed memory goes back to the system at once, instead of being kept for the next step.
    """
    if threads < 0:
        raise UserError(f"--threads is {threads}: it must be 0 (one per core) or more")
    count = threads or available_cores()
    torch.set_num_threads(count)
    return_freed_memory() if return_memory else keep_freed_memory()
    target = choose_device(device)
    torch.set_float32_matmul_precision("high")
    rates = matmul_rates(target, ("fp32",) if precision == "fp32" else ("fp32", "bf16"))
    if precision == "auto":
        precision = "bf16" if rates["bf16"] > BF16_MARGIN[target.type] * rates["fp32"] else "fp32"
        reason = f"matmul {rates['fp32'] / 1e9:.0f} GFLOP/s in fp32, {rates['bf16'] / 1e9:.0f} in bf16"
    else:
        reason = "as asked"
    if precision == "fp8" and not multiplies_fp8(target):
        reason = "simulated"
    return Machine(target, precision, count, rates[plain_precision(precision, target)], reason)


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks instead of returning them to the system at every free.

    A training step frees and allocates the same activations again; fresh pages cost a fault each, which took about a
    seventh of the time of a small model's step. Other C libraries are left as they are.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # parameters of mallopt(3)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)
    except (OSError, AttributeError):
        return


def return_freed_memory() -> None:
    """Ask glibc to give every block of some size back at once, and to have all threads take small ones from the same place."""
    mmap_threshold, trim_threshold, top_pad, arena_max = -3, -1, -2, -8
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 128 << 10)
        libc.mallopt(trim_threshold, 1 << 20)
        libc.mallopt(top_pad, 1 << 20)
        libc.mallopt(arena_max, 1)
    except (OSError, AttributeError):
        return


def available_cores() -> int:
    """Cores this process may use (a container or taskset may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def give_way(niceness: int) -> None:
    """Lower the priority of the calling thread by `niceness`. Only Linux knows priorities of single threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + niceness, 19))


def matmul_rates(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """Best FLOP/s of a square matmul in every precision, as linear layers compute it, over a few rounds in which they take turns: what
    else the machine does disturbs all of them alike."""
    size = 8192 if device.type == "cuda" else 1024
    matrices = {name: torch.ones(2, size, size, device=device, dtype=DTYPES[name]) for name in precisions}
    best = dict.fromkeys(precisions, 0.0)
    for _ in range(12):
        for name, (a, b) in matrices.items():
            synchronize(device)
            began = time.perf_counter()
            linear(a, b)
            synchronize(device)
            best[name] = max(best[name], 2 * size**3 / (time.perf_counter() - began))
    if device.type == "cuda":  # neither room nor peak are the run's
        del matrices, a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        # Linux: what getrusage says is at least what the process that started this one held at that moment.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine, at most what the control group this process runs in may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, _control_group_limit())
    return total


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the machine and the control group this process runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):  # counts memory that Linux would give back, where there is Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        room = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError, KeyError):
        used = int((CONTROL_GROUP / "memory.current").read_text())
        kept = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        dropped = int(kept["inactive_file"]) + int(kept["active_file"])  # files it would let go of
        room = min(room, max(_control_group_limit() - used + dropped, 0))
    return room


def _control_group_limit() -> int:
    """Bytes. Raises `OSError` or `ValueError` where there is no limit."""
    return int((CONTROL_GROUP / "memory.max").read_text())


def require_memory(needed: int, what: str, remedy: str = "use a smaller format") -> None:
    """Raise `UserError`, which says `remedy`, unless `needed` bytes are available for `what`."""
    available = available_memory(torch.device("cpu"))
    if needed > available:
        raise UserError(f"{what} needs {needed / 1e9:.1f} GB of memory, but only {available / 1e9:.1f} GB are available: {remedy}")


@contextlib.contextmanager
def inference(machine: Machine) -> Iterator[None]:
    """No gradients, the machine's precision."""
    with torch.inference_mode(), machine.autocast():
        yield


@contextlib.contextmanager
def divided_inference(machine: Machine) -> Iterator[None]:
    """The same where parameters are gathered for it that training goes on to use, which must not become inference tensors."""
    with torch.no_grad(), machine.autocast():
        yield
