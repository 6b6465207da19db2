"""What this machine sustains, measured in some seconds. The only file of `plan` that needs torch.

Nothing here knows a model: every kernel is timed at a few round sizes, and a plan reads the rates off at the sizes it needs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from ..kernels import cpu, reference
from ..kernels.packed import pack_integers
from ..kernels.serving import packed_linear
from ..memory import large_pages
from ..runtime import start, synchronize, total_memory
from .hardware import GIB, Machine
from .sustained import Curve, Sustained, product_size

READ_BYTES = 2**28
"""Far beyond any cache of a CPU; a GPU gets four times as much."""
RING_BYTES = 96 * 2**20
"""A training step comes back to a tensor when the caches have long forgotten it: kernels take turns on so many bytes of them."""
PACKED: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
EXPERTS = 8
"""Experts that rows are spread over."""
ROUNDS = 3
"""Everything is measured so often, in turns, and the best counts: a busy moment of the machine makes figures worse, never better."""
BUSY, PATIENCE = 0.1, 15
"""Share of the cores that other programs may take while this machine is measured, and seconds to wait for that."""


def measure_machine(budget: float = 0.04) -> Machine:
    """Measure memory bandwidth, matrix products and the kernels of a training step.

    Uses the GPU if there is one, else as many CPU threads as `shoal train` does. Every figure is the best of three rounds, each
    the median over repetitions of about `budget` seconds after one to warm up; some seconds in all, more where other programs
    are busy: threads that wait for each other make a machine with one busy core ten times slower. Rates that the machine cannot
    do are 0.
    """
    taken = wait_for_quiet()
    here = start()
    probe = Probe(here.device, budget)
    name = torch.cuda.get_device_properties(0).name if probe.is_gpu else "this machine"
    rounds = [probe.rates() for _ in range(ROUNDS)]
    rates = {rate: max(each[rate] for each in rounds) for rate in rounds[0]}
    busy = f"; other programs took {taken:.0%} of its cores meanwhile: measure again when it is quiet" if taken > BUSY else ""
    return Machine(
        name=name,
        memory_gib=total_memory(here.device) / GIB,
        devices_per_node=1,
        is_cpu=not probe.is_gpu,
        measured=True,
        sustained=best_of([probe.sustained(here.precision) for _ in range(ROUNDS)]),
        source=f"measured: products of {probe.large} x {probe.large} matrices, reads and copies of {probe.memory // 2**20} MiB{busy}",
        **rates,
    )


def product_tflops() -> float:
    """The large FP32 product once more: whether the machine is still as fast as it was."""
    probe = Probe(start().device, 0.3)
    return probe.products(torch.float32, probe.large, probe.large) / 1e12


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

    def ring(self, *shape: int, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Random tensors that take turns, so many that none is still in a cache when its turn comes again."""
        first = self.random(*shape, dtype=dtype)
        tensors = [first, *(torch.empty_like(first).copy_(first) for _ in range(RING_BYTES // first.nbytes))]
        return cycle(tensors).__next__

    def rates(self) -> dict[str, float]:
        """Large and simple work, by the fields of `Machine`."""
        return {
            "bandwidth_gb_s": self.copies() / 1e9,
            "read_gb_s": self.reads() / 1e9,
            "fp32_tflops": self.products(torch.float32, self.large, self.large) / 1e12,
            "bf16_tflops": self.products(torch.bfloat16, self.large, self.large) / 1e12,
            "int8_tops": self.int8() / 1e12,
        }

    def copies(self) -> float:
        """Bytes per second read and written."""
        source = torch.ones(self.memory // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.memory / self.seconds(lambda: target.copy_(source))

    def reads(self) -> float:
        """Bytes per second read."""
        source = torch.ones(1, dtype=torch.int64, device=self.device).expand(self.memory // 8)
        source = source.contiguous() if self.is_gpu else large_pages(self.memory).view(torch.int64).copy_(source)
        return self.memory / self.seconds(source.sum)

    def products(self, dtype: torch.dtype, rows: int, side: int) -> float:
        """FLOP/s of [rows, side] x [side, side]: the input has just been made, the output goes to memory."""
        x, weight = self.random(rows, side, dtype=dtype), self.random(side, side, dtype=dtype)
        # A new output takes the place of the oldest, which is in no cache any more.
        count = 1 + RING_BYTES // x.nbytes
        outputs = deque((torch.ones_like(x) for _ in range(count)), maxlen=count)
        return 2 * rows * side * side / self.seconds(lambda: outputs.append(kernels.linear(x, weight)))

    def weight_gradients(self, dtype: torch.dtype, rows: int, side: int) -> float:
        """FLOP/s of [side, rows] x [rows, side]: the gradient has just been made, the activation comes from memory."""
        x, y = self.ring(rows, side, dtype=dtype), self.random(rows, side, dtype=dtype)
        return 2 * rows * side * side / self.seconds(lambda: kernels.weight_gradient(y, x()))

    def experts(self, dtype: torch.dtype, rows: int, side: int) -> float:
        """FLOP/s of [rows, side] x [side, side] through one of `EXPERTS` experts each, forward and both gradients."""
        x = self.ring(rows, side, dtype=dtype)
        weight = self.random(EXPERTS, side, side, dtype=dtype).requires_grad_()
        offsets = torch.arange(1, EXPERTS + 1, device=self.device, dtype=torch.int32) * (rows // EXPERTS)
        return 3 * 2 * rows * side * side / self.both_passes(lambda tokens: kernels.grouped_linear(tokens, weight, offsets), x, weight)

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
        q = self.ring(batch, time, heads, channels, dtype=dtype)
        k, v = (self.random(batch, time, heads, channels, dtype=dtype).requires_grad_() for _ in range(2))
        pairs = batch * heads * time * (time + 1) / 2
        seconds = self.both_passes(lambda queries: kernels.causal_attention(queries, k, v, channels**-0.5), q, k, v)
        return 3 * 4 * channels * pairs / seconds

    def newton_schulz(self, side: int, steps: int = 5) -> float:
        """FLOP/s of Muon's orthogonalisation of a stack of [side, side] matrices of 4 MiB."""
        count = max(1, (4 << 20) // (4 * side * side))
        x = self.random(count, side, side, dtype=torch.bfloat16 if self.is_gpu else torch.float32)
        return count * steps * 6 * side**3 / self.seconds(lambda: kernels.newton_schulz(x, steps))

    def packed(self, number_format: Literal["int8", "int4"], tokens: int) -> tuple[float, float]:
        """(bytes of weights per second, operations per second) of a product of `tokens` with packed matrices of 2048 x 2048."""
        side, group, levels = 2048, 32, 16 if number_format == "int4" else 256
        quants = torch.randint(levels, (side, side), dtype=torch.uint8)
        first = pack_integers(number_format, quants, torch.full((side, side // group), 1e-3), group=group)
        count = 1 + READ_BYTES // 2 // first.nbytes
        places = large_pages(count * first.data.nbytes).view(count, *first.data.shape)  # where the engine keeps its weights
        matrices = cycle([replace(first, data=place.copy_(first.data)) for place in places])
        x = torch.randn(tokens, side)
        seconds = self.seconds(lambda: packed_linear(x, next(matrices)))
        return first.nbytes / seconds, 2 * tokens * side * side / seconds

    def both_passes(self, kernel: Callable[[Tensor], Tensor], next_input: Callable[[], Tensor], *others: Tensor) -> float:
        """Seconds of a forward and a backward pass of `kernel`, which takes turns on its inputs and has `others` as parameters."""
        gradient = torch.ones_like(kernel(next_input()))

        def run() -> None:
            tokens = next_input().detach().requires_grad_()
            torch.autograd.grad(kernel(tokens), (tokens, *others), gradient)

        return self.seconds(run)

    def sustained(self, precision: str) -> Sustained:
        """Everything that a training step is made of, in `precision`."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        rows = 16384 if self.is_gpu else 8192
        sides = (256, 1024, 4096) if self.is_gpu else (32, 64, 128, 256, 512, 1024)
        width = 1024 if self.is_gpu else 128
        x, other = self.ring(rows, width, dtype=dtype), self.random(rows, width, dtype=dtype).requires_grad_()
        weight = self.random(width).requires_grad_()
        cos, sin = (self.random(1, 256, 16) for _ in range(2))
        chosen, weights = torch.randint(8, (rows, 2), device=self.device), self.random(rows, 2, dtype=dtype).requires_grad_()

        def there_and_back(tokens: Tensor) -> Tensor:
            order, inverse, _ = kernels.sort_by_expert(chosen, 8)
            return kernels.combine_tokens(kernels.permute_tokens(tokens, order, inverse), weights, inverse)

        def turn(tokens: Tensor) -> Tensor:
            return kernels.apply_rope(tokens.view(rows // 256, 256, width // 32, 32), cos, sin, interleaved=True)

        def both(kernel: Callable[[Tensor], Tensor], *inputs: Tensor) -> float:
            """Values of `x` per second, forward and backward."""
            return rows * width / self.both_passes(kernel, x, *inputs)

        logits, targets = self.random(512, 8192), torch.randint(8192, (512,), device=self.device)
        loss = cpu if cpu.runs(logits) else reference
        return Sustained(
            precision="bf16" if precision == "bf16" else "fp32",
            products=Curve(tuple((product_size(rows, side, side), self.products(dtype, rows, side)) for side in sides)),
            weight_gradients=Curve(tuple((product_size(rows, side, side), self.weight_gradients(dtype, rows, side)) for side in sides)),
            experts=Curve(tuple((product_size(rows // EXPERTS, side, side), self.experts(dtype, rows, side)) for side in sides)),
            attention=Curve(tuple((side, self.attention(dtype, side)) for side in (32, 64, 128))),
            newton_schulz=Curve(tuple((side, self.newton_schulz(side)) for side in sides[:5])),
            norm=both(lambda tokens: kernels.rms_norm(tokens, weight, 1e-6), weight),
            swiglu=both(lambda tokens: kernels.swiglu(tokens, other), other),
            rope=both(turn),
            route=2 * both(there_and_back, weights),
            softmax=logits.numel() / self.seconds(lambda: loss.cross_entropy_rows(logits, targets, None, with_grad=True)),
            packed_reads={} if self.is_gpu else {name: self.packed(name, 1)[0] for name in PACKED},
            packed_products={} if self.is_gpu else {name: self.packed(name, 256)[1] for name in PACKED},
            add=rows * width / self.seconds(lambda: torch.add(x(), x(), out=x())),
        )


def best_of(rounds: list[Sustained]) -> Sustained:
    """The highest of every rate."""

    def best(name: str) -> float | Curve | dict[str, float]:
        each = [getattr(one, name) for one in rounds]
        if isinstance(each[0], dict):
            return {key: max(one[key] for one in each) for key in each[0]}
        if not isinstance(each[0], Curve):
            return max(each)
        return Curve(tuple((points[0][0], max(rate for _, rate in points)) for points in zip(*(c.points for c in each), strict=True)))

    names = [field.name for field in fields(Sustained) if field.name != "precision"]
    return replace(rounds[0], **{name: best(name) for name in names})  # type: ignore[arg-type]


def wait_for_quiet() -> float:
    """Wait while other programs are busy, but not for long; the share of the cores that they take at the end (0 where Linux is not)."""
    for _ in range(PATIENCE):
        before = _core_times()
        time.sleep(1.0)
        after = _core_times()
        if before is None or after is None or (taken := (after[0] - before[0]) / max(after[1] - before[1], 1)) <= BUSY:
            return 0.0
    return taken


def _core_times() -> tuple[int, int] | None:
    """(ticks that all cores have worked, ticks in all) since the system started."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
