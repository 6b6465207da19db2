"""Tables of a plan: built once, shown on a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..config import ModelConfig, OptimizerConfig
from .assumptions import Assumptions
from .check import TOLERANCE, Comparison
from .communication import exchange, groups, reach
from .cost import (
    NEWTON_SCHULZ_STEPS,
    NUMBER_FORMATS,
    Flops,
    Parameters,
    checkpoint_bytes,
    count_parameters,
    flops_per_token,
    kv_bytes_per_token,
    mtp_parameters,
    optimizer_flops,
)
from .expert_load import Balance
from .hardware import GIB, Machine
from .models import Published
from .serving import Serving
from .sustained import Sustained
from .training import Step

DRIFT = 0.1
"""A machine whose speed changes by more than this share while it is measured is said to be busy."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def count(value: float) -> str:
    """1234567 -> 1.23M; parameters, FLOPs, tokens."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.4g}"


def size(value: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{value / GIB:.2f} GiB" if abs(value) >= GIB else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def parameter_table(parameters: Parameters, model: ModelConfig) -> Table:
    parts = {name: number for name, number in asdict(parameters).items() if number and name not in ("mtp", "active")}
    counted = [(name.replace("_", " "), number) for name, number in parts.items()]
    counted += [("total (main model)", parameters.total), ("active per token", parameters.active)]
    counted.append(("  with the embedding", parameters.active + parameters.embedding))
    if parameters.mtp:
        counted.append(("multi-token prediction, its own", parameters.mtp))
        counted += [(f"  {name}", number) for name, number in mtp_parameters(model).items()]
    rows = [(name, count(number), f"{number:,}") for name, number in counted]
    note = (
        "active: all that a token multiplies with, so the output head counts and the embedding (one row is looked up) does not. "
        "Prediction modules share embedding and head with the main model"
    )
    return Table("Parameters", ("part", "", "exact"), rows, note if parameters.mtp else note.partition(" Prediction")[0])


def flops_table(training: Flops, inference: Flops, model: ModelConfig, sequence_length: int) -> Table:
    rows = [(name.replace("_", " "), count(number), count(getattr(inference, name))) for name, number in asdict(training).items() if number]
    rows.append(("main model", count(training.main), count(inference.main)))
    if training.mtp:
        rows.append(("with multi-token prediction", count(training.total), ""))
    orthogonalisation = optimizer_flops(model, OptimizerConfig())
    note = (
        "attention is causal: a mean context of (T + 1) / 2; training is 3 x forward. Muon's Newton-Schulz "
        f"({NEWTON_SCHULZ_STEPS} iterations) adds {count(orthogonalisation)}FLOP per optimizer step"
    )
    return Table(f"FLOPs per token at sequence length {sequence_length}", ("part", "training", "inference"), rows, note)


def bytes_table(model: ModelConfig) -> Table:
    rows = [(f"KV cache per token, {name}", f"{kv_bytes_per_token(model, name):,} bytes") for name in ("bf16", "fp8")]
    rows += [(f"checkpoint, {name}", size(checkpoint_bytes(model, numbers))) for name, numbers in NUMBER_FORMATS.items()]
    note = (
        "fp8: hidden matrices, the rest bf16, as official files. int8 and int4: as shoal quantize writes them, groups of 32 with a 16-bit "
        "scale; head and prediction modules in int8, embedding in bf16, router and norms in fp32. Prediction modules included"
    )
    return Table("Bytes", ("what", "size"), rows, note)


def published_table(model: ModelConfig, published: Published) -> Table:
    """What papers say against what the shapes give."""
    parameters, flops = count_parameters(model), flops_per_token(model, 4096, training=True).main
    pairs = [
        ("parameters", published.total, parameters.total),
        ("active parameters", published.active, parameters.active),
        ("multi-token prediction", published.mtp, parameters.mtp),
        ("KV cache bytes per token, bf16", published.kv_bytes, kv_bytes_per_token(model)),
        ("training FLOPs per token at 4096, main model", published.training_gflops * 1e9, flops),
    ]
    rows = [(name, count(said), count(ours), f"{ours / said - 1:+.1%}") for name, said, ours in pairs if said]
    return Table("Against published figures", ("figure", "published", "from shapes", "difference"), rows, published.note)


def machine_table(machine: Machine) -> Table:
    figures = {name: value for name, value in asdict(machine).items() if name not in ("name", "source", "measured", "is_cpu", "sustained")}
    rows = [(name, f"{value:g}") for name, value in figures.items() if value]
    return Table(f"Machine: {machine.name}", ("figure", "per device"), rows, machine.source)


def sustained_table(known: Sustained) -> Table:
    """Measured rates of the kernels of a training step, and of packed products."""
    curves = {
        "products": known.products,
        "weight gradients": known.weight_gradients,
        "experts' products": known.experts,
        "attention (head channels)": known.attention,
        "Newton-Schulz (shorter side)": known.newton_schulz,
    }
    rows = []
    for name, curve in curves.items():
        rates = ", ".join(f"{at:.0f}: {rate / 1e9:,.0f}" for at, rate in curve.points)
        rows.append((f"{name}, GFLOP/s by size", rates))
    kernels = {name: getattr(known, name) for name in ("norm", "swiglu", "rope", "route", "softmax", "add")}
    rows.append(("kernels, 10^9 values/s", ", ".join(f"{name} {rate / 1e9:.2g}" for name, rate in kernels.items())))
    if known.packed_reads:
        rows.append(("packed weights, one token, GB/s", ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in known.packed_reads.items())))
        many = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in known.packed_products.items())
        rows.append(("packed weights, many tokens, GOP/s", many))
    note = "size of a product [n, i] x [i, o]: 2 / (1/n + 1/i + 1/o), with many rows about the side of a square weight"
    return Table(f"What it sustains by size, training in {known.precision}", ("", ""), rows, note)


def assumption_table(assumptions: Assumptions) -> Table:
    return Table("Assumptions (override with --assume.NAME VALUE)", ("assumption", "value", "because"), assumptions.rows())


def training_table(step: Step, machine: Machine, tokens: float) -> Table:
    peak = machine.peak(step.layout.precision)
    rows = [
        ("layout", step.layout.describe()),
        ("batch", f"{step.batch} sequences of {step.sequence_length}: {count(step.tokens)} tokens"),
        ("step", duration(step.seconds)),
        ("  computing", duration(step.computing)),
        ("  exposed communication", duration(step.exposed)),
        ("  pipeline bubble", f"{duration(step.bubble)} ({step.bubble / step.seconds:.1%})"),
        ("  gradient exchange", duration(step.gradient_exchange)),
        ("  optimizer", duration(step.optimizer)),
        ("tokens per second", f"{step.tokens_per_second:,.0f}"),
        (
            "per device",
            f"{step.flops_per_device / 1e12:.3g} TFLOP/s, {step.flops_per_device / peak:.1%} of the {step.layout.precision} peak",
        ),
        (f"device hours for {count(tokens)} tokens", f"{step.device_hours(tokens):,.0f}"),
        ("days", f"{tokens / step.tokens_per_second / 86400:,.1f}"),
    ]
    if machine.price_per_hour:
        rows.append(("cost", f"${step.device_hours(tokens) * machine.price_per_hour:,.0f} at ${machine.price_per_hour:g} per device hour"))
    return Table("Training", ("", ""), rows)


def memory_table(step: Step, usable: float) -> Table:
    rows = [(name.replace("_", " "), size(value)) for name, value in asdict(step.memory).items() if value]
    rows += [("total", size(step.memory.total)), ("usable", size(usable))]
    return Table("Memory of the fullest device", ("part", "size"), rows)


def communication_table(model: ModelConfig, expert: int, machine: Machine, link_efficiency: float) -> Table:
    trip = reach(model, expert, machine.devices_per_node)
    rows = []
    for kind, two_hop in (("flat", False), ("two-hop", True)):
        for number_format in ("fp8", "bf16"):
            sent = exchange(model, expert, machine, number_format, two_hop, link_efficiency)
            rows.append((kind, number_format, f"{sent.inter_bytes:,.0f}", f"{sent.intra_bytes:,.0f}", f"{sent.seconds * 1e6:.3f}"))
    limit, reachable = groups(model)
    note = (
        f"a token reaches {trip.ranks:.2f} ranks on {trip.nodes:.2f} nodes on average; its {reachable} of {limit} groups are equally likely"
    )
    columns = ("dispatch", "numbers", "bytes between nodes", "bytes inside nodes", "microseconds")
    return Table(f"Expert exchange, per token, layer and direction (EP {expert})", columns, rows, note)


def serving_table(plans: Sequence[Serving], machine: Machine, cache: str) -> Table:
    rows = []
    for plan in plans:
        mtp = f"{plan.decode_with_mtp:,.1f}" if plan.decode_with_mtp else "-"
        speeds = (
            f"{plan.prefill_tokens_per_second:,.0f}",
            f"{plan.batch_1_tokens_per_second:,.1f}",
            f"{plan.decode_tokens_per_second:,.1f} ({plan.batch})",
            mtp,
        )
        fit = f"{plan.sequences:,}" if plan.fits else f"no, {size(-plan.free_bytes)} over" if plan.free_bytes < 0 else "no room for a cache"
        rows.append((plan.weights, size(plan.weight_bytes), fit, *(speeds if plan.fits else ("-",) * 4)))
    context, devices = plans[0].context, plans[0].devices
    columns = ("weights", "size", f"sequences of {context}", "prefill tok/s", "decode tok/s, 1", "decode tok/s (batch)", "with MTP")
    return Table(f"Serving on {devices} x {machine.name}, cache in {cache} (roofline)", columns, rows)


def placement_table(balance: Balance, model: ModelConfig) -> Table:
    """Busiest over mean device, in the mean of the layers and in the worst one, for each way to place the experts."""
    ways = {
        "by number": balance.in_order,
        "by load": balance.placed,
        f"by load, {balance.redundant} redundant": balance.with_copies if balance.redundant else None,
    }
    rows = [(way, f"{sum(ratios) / len(ratios):.3f}", f"{max(ratios):.3f}") for way, ratios in ways.items() if ratios]
    copies = 3 * model.hidden_size * model.moe_intermediate_size * balance.redundant * len(balance.placements) / balance.devices
    places = (model.n_routed_experts or 0) + balance.redundant
    note = f"{places} experts a layer, {places // balance.devices} on a device; copies take {count(copies)} parameters of every device"
    nodes = f" in {balance.nodes} nodes" if balance.nodes > 1 else ""
    columns = ("experts placed", "busiest / mean device", "worst layer")
    return Table(f"Expert load on {balance.devices} devices{nodes}, {len(balance.placements)} layers", columns, rows, note)


def check_table(comparisons: list[Comparison], before: float, after: float) -> Table:
    """`before` and `after` the measurements: TFLOP/s of the same product."""
    rows = []
    for row in comparisons:
        write = size if row.figure == "memory_bytes" else lambda speed: f"{speed:,.0f} tok/s" if speed >= 100 else f"{speed:,.2f} tok/s"
        name = "  peak memory" if row.figure == "memory_bytes" else row.name
        if row.measured is None or row.error is None:
            rows.append((name, write(row.predicted), "not measured", "", ""))
        else:
            rows.append((name, write(row.predicted), write(row.measured), f"{row.error:+.1%}", "ok" if row.ok else "off"))
    reasons = list(dict.fromkeys(f"{row.name} was not measured: {row.missing}" for row in comparisons if row.measured is None))
    notes = [*reasons, "peak memory is what a run takes beyond the interpreter, its libraries and the data"]
    if abs(after / before - 1) > DRIFT:
        notes.append(f"the machine was not quiet: the same product ran at {before:.3g} TFLOP/s before and {after:.3g} after the runs")
    note = "; ".join(notes)
    return Table(f"Predicted and measured (within {TOLERANCE:.0%})", ("", "predicted", "measured", "error", ""), rows, note)


def show(tables: list[Table]) -> None:
    """Print tables on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table as Drawn

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file or pipe has no width that the table would have to fit
    for table in tables:
        drawn = Drawn(
            title=escape(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(table.columns)
        )
        for i, column in enumerate(table.columns):
            is_text = i == 0 or column == "because" or not any(table.columns)
            drawn.add_column(escape(column), justify="left" if is_text else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(escape, row))
        console.print(drawn)
        if table.note:
            console.print(Padding(f"[dim]{escape(table.note)}[/dim]", (0, 2, 1, 2)))


def markdown(tables: list[Table]) -> str:
    """The tables as GitHub-flavoured Markdown."""
    parts = []
    for table in tables:
        lines = [f"### {table.title}", ""]
        lines.append("| " + " | ".join(table.columns) + " |")
        lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(table.columns))) + "|")
        lines += ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        if table.note:
            lines += ["", table.note]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
