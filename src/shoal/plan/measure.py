"""What this machine sustains, measured in some seconds. The only file of `plan` that needs torch.

Nothing here knows a model: every kernel is timed at a few round sizes, and a plan reads the rates off at the sizes it needs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from shoal import kernels
from shoal.kernels import cpu, reference
from shoal.runtime import start, synchronize

from .hardware import GIB, Machine
from .sustained import Curve, Sustained, product_size

READ_BYTES = 2**28
"""Far beyond any cache of a CPU; a GPU gets four times as much."""


def measure_machine(folder: str | None = None, budget: float = 0.1) -> Machine:
    """Measure memory bandwidth, matrix products, the kernels of a training step, and disk reads (of a file in `folder`).

    Uses the GPU if there is one, else as many CPU threads as `shoal train` does. Every figure is the median over repetitions
    of about `budget` seconds after one to warm up; some seconds in all. Rates that the machine cannot do are 0.
    """
    here = start()
    probe = Probe(here.device, budget)
    if probe.is_gpu:
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        name=name,
        memory_gib=memory / GIB,
        bandwidth_gb_s=probe.copies() / 1e9,
        read_gb_s=probe.reads() / 1e9,
        fp32_tflops=probe.products(torch.float32, probe.large, probe.large) / 1e12,
        bf16_tflops=probe.products(torch.bfloat16, probe.large, probe.large) / 1e12,
        int8_tops=probe.int8() / 1e12,
        devices_per_node=1,
        is_cpu=not probe.is_gpu,
        disk_gb_s=_disk_rate(folder) / 1e9,
        measured=True,
        sustained=probe.sustained(here.precision),
        source=f"measured: products of {probe.large} x {probe.large} matrices, reads and copies of {probe.memory // 2**20} MiB",
    )


class Probe:
    """Times kernels on one device."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.is_gpu = device.type == "cuda"
        self.large = 8192 if self.is_gpu else 1024
        self.memory = (4 if self.is_gpu else 1) * READ_BYTES

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of `run` over at least 3 repetitions and about `budget` seconds, after one to warm up."""
        run()
        synchronize(self.device)
        times: list[float] = []
        while len(times) < 3 or sum(times) < self.budget:
            start = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return median(times)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def copies(self) -> float:
        """Bytes per second read and written."""
        source = torch.ones(self.memory // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.memory / self.seconds(lambda: target.copy_(source))

    def reads(self) -> float:
        """Bytes per second read."""
        source = torch.ones(self.memory // 8, device=self.device, dtype=torch.int64)
        return self.memory / self.seconds(source.sum)

    def products(self, dtype: torch.dtype, rows: int, side: int) -> float:
        """FLOP/s of [rows, side] x [side, side]."""
        x, weight = self.random(rows, side, dtype=dtype), self.random(side, side, dtype=dtype)
        return 2 * rows * side * side / self.seconds(lambda: x @ weight.T)

    def weight_gradients(self, dtype: torch.dtype, rows: int, side: int) -> float:
        """FLOP/s of [side, rows] x [rows, side]."""
        x, y = self.random(rows, side, dtype=dtype), self.random(rows, side, dtype=dtype)
        return 2 * rows * side * side / self.seconds(lambda: y.T @ x)

    def int8(self) -> float:
        """Operations per second of torch's int8 product; 0 where it has none."""
        a = torch.randint(-128, 127, (self.large, self.large), dtype=torch.int8, device=self.device)
        try:
            return 2 * self.large**3 / self.seconds(lambda: torch._int_mm(a, a))
        except RuntimeError:
            return 0.0

    def attention(self, dtype: torch.dtype, channels: int, time: int = 512) -> float:
        """FLOP/s of causal attention with heads of so many channels, forward and backward."""
        heads, batch = 4, 64 if self.is_gpu else 8
        q, k, v = (self.random(batch, time, heads, channels, dtype=dtype).requires_grad_() for _ in range(3))
        pairs = batch * heads * time * (time + 1) / 2
        return 3 * 4 * channels * pairs / self.both_passes(lambda: kernels.causal_attention(q, k, v, channels**-0.5), (q, k, v))

    def newton_schulz(self, side: int, steps: int = 5) -> float:
        """FLOP/s of Muon's orthogonalisation of a stack of [side, side] matrices of 4 MiB."""
        count = max(1, (4 << 20) // (4 * side * side))
        x = self.random(count, side, side, dtype=torch.bfloat16 if self.is_gpu else torch.float32)
        return count * steps * 6 * side**3 / self.seconds(lambda: kernels.newton_schulz(x, steps))

    def both_passes(self, run: Callable[[], Tensor], inputs: Iterable[Tensor]) -> float:
        """Seconds of a forward and a backward pass."""
        wanted = tuple(inputs)
        gradient = torch.ones_like(run())
        return self.seconds(lambda: torch.autograd.grad(run(), wanted, gradient))

    def sustained(self, precision: str) -> Sustained:
        """Everything that a training step is made of, in `precision`."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        rows = 16384 if self.is_gpu else 8192
        sides = (256, 1024, 4096) if self.is_gpu else (32, 64, 128, 256, 512, 1024)
        width = 1024 if self.is_gpu else 128
        x, other = (self.random(rows, width, dtype=dtype).requires_grad_() for _ in range(2))
        weight = self.random(width).requires_grad_()
        heads = self.random(rows // 256, 256, width // 32, 32, dtype=dtype).requires_grad_()
        cos, sin = (self.random(1, 256, 16) for _ in range(2))
        tokens, chosen = self.random(rows, width, dtype=dtype).requires_grad_(), torch.randint(8, (rows, 2), device=self.device)
        weights = self.random(rows, 2, dtype=dtype).requires_grad_()

        def there_and_back() -> Tensor:
            order, inverse, _ = kernels.sort_by_expert(chosen, 8)
            return kernels.combine_tokens(kernels.permute_tokens(tokens, order, inverse), weights, inverse)

        values = rows * width
        logits, targets = self.random(512, 8192), torch.randint(8192, (512,), device=self.device)
        loss = cpu if cpu.runs(logits) else reference
        return Sustained(
            precision="bf16" if precision == "bf16" else "fp32",
            products=Curve(tuple((product_size(rows, side, side), self.products(dtype, rows, side)) for side in sides)),
            weight_gradients=Curve(tuple((product_size(rows, side, side), self.weight_gradients(dtype, rows, side)) for side in sides)),
            attention=Curve(tuple((side, self.attention(dtype, side)) for side in (32, 64, 128))),
            newton_schulz=Curve(tuple((side, self.newton_schulz(side)) for side in sides[:5])),
            norm=values / self.both_passes(lambda: kernels.rms_norm(x, weight, 1e-6), (x, weight)),
            swiglu=values / self.both_passes(lambda: kernels.swiglu(x, other), (x, other)),
            rope=values / self.both_passes(lambda: kernels.apply_rope(heads, cos, sin, interleaved=True), (heads,)),
            route=2 * values / self.both_passes(there_and_back, (tokens, weights)),
            softmax=logits.numel() / self.seconds(lambda: loss.cross_entropy_rows(logits, targets, None, with_grad=True)),
            add=values / self.seconds(lambda: x.detach() + other.detach()),
        )


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
