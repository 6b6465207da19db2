"""Machines to plan for: datasheet figures with their source, and machines described in a TOML file.

Peaks are for dense matrices with 32-bit accumulation. What a program sustains of them is an assumption (`assumptions.py`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import UserError
from ..config.recipes import from_table, read_toml
from .sustained import Sustained

GIB = 1024**3


@dataclass(frozen=True)
class Machine:
    """One device (GPU, or a whole CPU machine) and the links that it has to others. GB are 10^9 bytes, rates per device."""

    name: str = "custom"
    memory_gib: float = 0.0
    bandwidth_gb_s: float = 0.0
    """Memory bandwidth of work that reads and writes."""
    read_gb_s: float = 0.0
    """Memory bandwidth of work that only reads, as decoding does with weights; 0: the same."""
    fp32_tflops: float = 0.0
    bf16_tflops: float = 0.0
    fp8_tflops: float = 0.0
    """0: matrix products in FP8 run at the BF16 rate."""
    int8_tops: float = 0.0
    """0: matrix products in INT8 run at the BF16 rate."""
    devices_per_node: int = 8
    intra_node_gb_s: float = 0.0
    """Per device and direction, to the other devices of its node; 0: there are none."""
    inter_node_gb_s: float = 0.0
    """Per device and direction, to other nodes; 0: there are none."""
    price_per_hour: float = 0.0
    """US dollars for one device, as rented; an assumption, not a datasheet figure."""
    is_cpu: bool = False
    """Tensors lie on the C library's heap, which wastes some of its memory."""
    measured: bool = False
    """Rates are what a program sustained, not peaks."""
    sustained: Sustained | None = None
    """By kind and size of the work, where they were measured so closely."""
    source: str = ""

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bandwidth_gb_s * 1e9

    def peak(self, number_format: str) -> float:
        """Operations per second of matrix products in `number_format`; a format without units of its own runs as BF16."""
        rates = {"fp32": self.fp32_tflops, "bf16": self.bf16_tflops, "fp8": self.fp8_tflops, "int8": self.int8_tops}
        return 1e12 * (rates.get(number_format) or self.bf16_tflops or self.fp32_tflops)


_HOPPER: dict[str, Any] = {"fp32_tflops": 66.9, "bf16_tflops": 989.4, "fp8_tflops": 1978.9, "int8_tops": 1978.9}

MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "h100", memory_gib=80, bandwidth_gb_s=3350, intra_node_gb_s=450, inter_node_gb_s=50, price_per_hour=2.5, **_HOPPER,
            source="NVIDIA H100 SXM datasheet; NVLink 4 900 GB/s both ways; one 400 Gb/s NIC per GPU (DGX H100)",
        ),
        Machine(
            "h800", memory_gib=80, bandwidth_gb_s=3350, intra_node_gb_s=160, inter_node_gb_s=50, price_per_hour=2.0, **_HOPPER,
            source="H100 SXM compute; NVLink 160, InfiniBand 50 GB/s per GPU, $2/h: DeepSeek-V3 report (2412.19437), 3.2.2 and table 1",
        ),
        Machine(
            "h200", memory_gib=141e9 / GIB, bandwidth_gb_s=4800, intra_node_gb_s=450, inter_node_gb_s=50, price_per_hour=3.0, **_HOPPER,
            source="NVIDIA H200 SXM datasheet; links as DGX H200",
        ),
        Machine(
            "a100", memory_gib=80, bandwidth_gb_s=2039, fp32_tflops=19.5, bf16_tflops=312, int8_tops=624,
            intra_node_gb_s=300, inter_node_gb_s=25, price_per_hour=1.5,
            source="NVIDIA A100 80GB SXM datasheet; NVLink 3 600 GB/s both ways; one 200 Gb/s NIC per GPU (DGX A100)",
        ),
        Machine(
            "rtx4090", memory_gib=24, bandwidth_gb_s=1008, fp32_tflops=82.6, bf16_tflops=165.2, fp8_tflops=330.3, int8_tops=660.6,
            intra_node_gb_s=25, inter_node_gb_s=12.5, price_per_hour=0.4,
            source="NVIDIA Ada GPU architecture whitepaper, appendix A; PCIe 4.0 x16 (32 GB/s, about 25 usable), 100 Gb/s network",
        ),
        Machine(
            "rtx5090", memory_gib=32, bandwidth_gb_s=1792, fp32_tflops=104.8, bf16_tflops=209.5, fp8_tflops=419, int8_tops=838,
            intra_node_gb_s=50, inter_node_gb_s=12.5, price_per_hour=0.7,
            source="NVIDIA RTX Blackwell architecture whitepaper, appendix A; PCIe 5.0 x16 (64 GB/s, about 50 usable), 100 Gb/s network",
        ),
        Machine(
            "mi300x", memory_gib=192, bandwidth_gb_s=5300, fp32_tflops=163.4, bf16_tflops=1307.4, fp8_tflops=2614.9, int8_tops=2614.9,
            intra_node_gb_s=448, inter_node_gb_s=50, price_per_hour=2.5,
            source="AMD Instinct MI300X datasheet; 7 Infinity Fabric links of 128 GB/s both ways; one 400 Gb/s NIC per GPU",
        ),
        Machine(
            "cpu", memory_gib=64, bandwidth_gb_s=80, fp32_tflops=1.0, bf16_tflops=1.0, int8_tops=2.0, is_cpu=True, devices_per_node=1,
            inter_node_gb_s=1.25, price_per_hour=0.5,
            source="a 16-core AVX-512 machine with two channels of DDR5-5600, rounded; `--here` measures a real one",
        ),
    )
}  # fmt: skip


def load_machine(name: str) -> Machine:
    """A machine of the table, or one described by a TOML file with the fields of `Machine`.

    Raises `UserError` for an unknown name, an unknown field, or a machine without memory or speed.
    """
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no machine {name!r}: use one of {', '.join(MACHINES)} or a TOML file with its figures")
    try:
        table = read_toml(path.read_text(encoding="utf-8"), f"machine {name}")
    except UnicodeDecodeError as error:
        raise UserError(f"machine {name} is not valid TOML: {error}") from None
    machine = from_table(Machine, {"name": path.stem, "source": str(path), **table}, name)
    for field, value in asdict(machine).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"machine {name}: {field} is {value:g}, it must be 0 or more")
    if machine.devices_per_node < 1:
        raise UserError(f"machine {name}: devices_per_node is {machine.devices_per_node}, it must be at least 1")
    for field in ("memory_gib", "bandwidth_gb_s"):
        if getattr(machine, field) <= 0:
            raise UserError(f"machine {name} has no {field}: state it")
    if machine.peak("bf16") <= 0:
        raise UserError(f"machine {name} cannot compute: state bf16_tflops or fp32_tflops")
    return machine
