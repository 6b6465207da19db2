"""What the planner cannot derive from shapes and datasheets: every number is printed with a plan and can be overridden."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..config import UserError
from .cost import Matrix
from .hardware import Machine
from .sustained import product_size

SMALLEST_SHARE = 0.001
_RANGES: dict[str, tuple[float, float]] = {
    "communication_sm_share": (0.0, 0.9),
    "expert_imbalance": (1.0, 1000.0),
    "loss_chunk": (1, 2**40),
    "heap_overhead": (1.0, 10.0),
    "memory_reserve": (0.0, 0.9),
    "mtp_acceptance": (0.0, 1.0),
}
"""Of assumptions that are no efficiencies."""


REASONS = {
    "bf16_efficiency": "cuBLAS on H100 sustains 600 to 700 of 989 TFLOP/s in large products",
    "fp8_efficiency": "DeepGEMM on H800, V3's shapes, forward and gradients: 880 to 1360 of 1979 TFLOP/s",
    "int8_efficiency": "taken as fp8",
    "attention_efficiency": "FlashAttention-3 (2407.08608) at 4K: 530 forward, 420 backward, which computes scores again, of 989",
    "bandwidth_efficiency": "usual of fused elementwise kernels; a judgement",
    "link_efficiency": "DeepEP on H800: 45 of 50 GB/s between nodes, 153 of 160 inside",
    "communication_sm_share": "20 of 132 SMs (V3 report, 3.2.2)",
    "expert_imbalance": "busiest rank over mean; a judgement: 1.04 over a whole batch (2408.15664), micro-batches are worse",
    "loss_chunk": "tokens whose logits exist at a time, as shoal train has it",
    "heap_overhead": "CPUs: resident over live bytes; gaps between aligned blocks of glibc's heap, 1.25 to 1.40 seen",
    "memory_reserve": "driver, communication buffers, fragmentation; a judgement",
    "mtp_acceptance": "drafted tokens that are right: 85% to 90% (V3 report, 5.4.3)",
}
"""Why each assumption has its value, for the table that is printed with a plan."""


@dataclass(frozen=True)
class Assumptions:
    """Shares of a datasheet peak that real kernels sustain, and what else a plan takes for granted.

    Rates come from published kernel measurements. `communication_sm_share` is DeepSeek-V3's own setting, and
    `expert_imbalance` is a judgement that no source states: both bear on how well V3's published hours are met.
    """

    bf16_efficiency: float = 0.65
    """Large BF16 and FP32 matrix products (cuBLAS on H100: 600 to 700 of 989 TFLOP/s)."""
    fp8_efficiency: float = 0.55
    """FP8 products with fine-grained scales, V3's shapes, forward and both gradients (DeepGEMM on H800: 990 to 1360 TFLOP/s
    forward, 880 to 1090 for weight gradients, of 1979)."""
    int8_efficiency: float = 0.55
    attention_efficiency: float = 0.40
    """Attention core, causal, of the BF16 peak over forward and backward (FlashAttention-3, 2407.08608, figures 5 and 6: about 530
    and 420 TFLOP/s at 4K, and the backward computes the scores again, which is not counted as useful work)."""
    bandwidth_efficiency: float = 0.80
    """Memory-bound work (norms, SwiGLU, casts, permutation; weights in decoding), of the datasheet bandwidth."""
    link_efficiency: float = 0.90
    """Of a link's rate (DeepEP on H800, 64 ranks: 45 and 46 of 50 GB/s; NVLink 153 and 158 of 160)."""
    communication_sm_share: float = 20 / 132
    """Share of a GPU's processors that runs communication while it overlaps with computation (V3 report, 3.2.2)."""
    expert_imbalance: float = 1.15
    """Tokens of the busiest expert-parallel rank over the mean. A judgement: 2408.15664 gives 1.04 for experts over a whole batch,
    and a micro-batch is worse."""
    loss_chunk: int = 512
    """Tokens whose logits exist at a time (what `shoal train` does; a trainer without chunks: as many as a micro-batch has)."""
    heap_overhead: float = 1.33
    """On CPUs: resident over live bytes of training tensors. glibc's aligned blocks leave gaps that new ones do not fit into:
    1.25 to 1.40 measured for models of 2 to 14 million parameters (docs/experiments.md, 2026-11-24). GPUs: `memory_reserve`."""
    memory_reserve: float = 0.08
    """Share of device memory left to the driver, communication buffers and fragmentation."""
    mtp_acceptance: float = 0.85
    """Share of drafted tokens that are accepted in decoding with MTP (V3 report, 5.4.3: 85% to 90%)."""

    def validate(self) -> None:
        """Raise `UserError` on the first value that makes no sense."""
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = _RANGES.get(field.name, (SMALLEST_SHARE, 1.0))
            if not low <= value <= high:
                raise UserError(f"--assume.{field.name.replace('_', '-')} is {value:g}: it must lie between {low:g} and {high:g}")

    def rows(self) -> list[tuple[str, str, str]]:
        return [(field.name, f"{getattr(self, field.name):.3g}", REASONS[field.name]) for field in fields(self)]

    def product_rate(self, machine: Machine, number_format: str, rows: float, matrix: Matrix, weight_gradient: bool = False) -> float:
        """Sustained FLOP/s of a product of `rows` with one matrix, or of its weight gradient; measured machines know it by size."""
        known = machine.sustained
        if known is None or known.precision != number_format:
            return self.rate(machine, number_format)
        curve = known.weight_gradients if weight_gradient else known.products
        if matrix.part == "routed_experts":
            curve = known.experts
        return curve.at(product_size(max(rows, 1), matrix.out_features, matrix.in_features))

    def newton_schulz_rate(self, machine: Machine, number_format: str, matrix: Matrix) -> float:
        known = machine.sustained
        if known is None or known.precision != number_format:
            return self.rate(machine, number_format)
        return known.newton_schulz.at(min(matrix.out_features, matrix.in_features))

    def rate(self, machine: Machine, number_format: str) -> float:
        """Sustained operations per second of matrix products; measured machines state what they sustain."""
        peak = machine.peak(number_format)
        if machine.measured:
            return peak
        return peak * {"fp8": self.fp8_efficiency, "int8": self.int8_efficiency}.get(number_format, self.bf16_efficiency)

    def attention_rate(self, machine: Machine, number_format: str = "bf16", channels: int = 128) -> float:
        """Sustained FLOP/s of the attention core, which runs in BF16 (FP32 where the model does), for heads of so many channels."""
        if machine.sustained and machine.sustained.precision == number_format:
            return machine.sustained.attention.at(channels)
        peak = machine.peak("fp32" if number_format == "fp32" else "bf16")
        return peak if machine.measured else peak * self.attention_efficiency

    def bandwidth(self, machine: Machine) -> float:
        """Sustained bytes per second of memory-bound work."""
        return machine.bandwidth if machine.measured else machine.bandwidth * self.bandwidth_efficiency

    def read_bandwidth(self, machine: Machine) -> float:
        """Sustained bytes per second of work that only reads, as decoding does."""
        return machine.read_gb_s * 1e9 if machine.measured and machine.read_gb_s else self.bandwidth(machine)
