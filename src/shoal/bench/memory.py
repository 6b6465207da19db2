"""`shoal bench memory`: peak memory of a training step, what each measure saves, and what transformers takes for the same."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from ..apart import run_apart
from ..config import BenchMemoryCommand
from ..plan.measures import Measures

SLOWDOWN = 1.3
"""The lean setting may take so many times as long as the fastest."""
PEERS = [(precision, experts) for precision in ("bf16", "fp32") for experts in ("grouped_mm", "eager")]


@dataclass(frozen=True)
class Row:
    """One run in a process of its own."""

    name: str
    peak: int
    """Most bytes that were resident, as the operating system counts them."""
    seconds: float
    """Of a step; the median."""


def settings(command: BenchMemoryCommand) -> dict[str, Measures]:
    """Shoal's runs: everything kept, then one measure after the other on top."""
    few = max(1, command.batch_size // 8)
    both: Any = ("feed_forward", "attention")
    return {
        "everything kept": Measures(command.batch_size),
        f"+ micro-batches of {few}": Measures(few),
        "+ SwiGLU computed again": Measures(few, ("swiglu",)),
        "+ BF16 moments": Measures(few, ("swiglu",), bf16_moments=True),
        "+ memory returned at once": Measures(few, ("swiglu",), bf16_moments=True, return_memory=True),
        "+ layers computed again": Measures(few, both, bf16_moments=True, return_memory=True),
        "+ experts' momentum in a file": Measures(few, both, bf16_moments=True, return_memory=True, offload=True),
        "whole batch, layers computed again, gradients used as they come": Measures(
            command.batch_size, both, bf16_moments=True, return_memory=True, update_early=True
        ),
    }


def run_bench(command: BenchMemoryCommand) -> dict[str, Any]:
    """Run every side, one after the other, print the table, return the JSON object."""
    command.validate()
    ours = [_run(command, name, {"side": "shoal", **asdict(chosen)}) for name, chosen in settings(command).items()]
    theirs = []
    if command.vs:
        theirs = [
            _run(
                command,
                f"transformers, AdamW, {precision}, {experts}",
                {"side": "transformers", "precision": precision, "experts": experts},
            )
            for precision, experts in PEERS
        ]
    fastest = min(ours, key=lambda row: row.seconds)
    lean = min((row for row in ours if row.seconds <= SLOWDOWN * fastest.seconds), key=lambda row: row.peak)
    result: dict[str, Any] = {
        "rows": [asdict(row) for row in (*ours, *theirs)],
        "lean": lean.name,
        "lean_peak": lean.peak,
        "lean_slowdown": lean.seconds / fastest.seconds,
    }
    if theirs:
        least = min(theirs, key=lambda row: row.peak)
        quickest = min(theirs, key=lambda row: row.seconds)
        result |= {
            "transformers_least_peak": least.peak,
            "ratio_to_least": least.peak / lean.peak,
            "ratio_to_fastest": quickest.peak / lean.peak,
        }
    _print(ours, theirs, fastest, result)
    return result


def _run(command: BenchMemoryCommand, name: str, options: dict[str, Any]) -> Row:
    options |= {
        "batch": command.batch_size, "length": command.sequence_length, "steps": command.steps, "threads": command.threads,
    }  # fmt: skip
    said = run_apart("shoal.bench.memory_worker", json.dumps(options), failed=f"{name} did not run to its end")
    row = Row(name, **json.loads(said))
    print(f"{name}: {row.peak / 2**20:.0f} MiB, {row.seconds:.2f} s a step", file=sys.stderr, flush=True)
    return row


def _print(ours: list[Row], theirs: list[Row], fastest: Row, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="peak resident memory of training, each run in a process of its own")
    table.add_column("")
    for column in ("MiB", "saved", "s a step", "of the fastest"):
        table.add_column(column, justify="right", no_wrap=True)
    previous: Row | None = None
    for row in (*ours, *theirs):
        stacked = row in ours and row.name.startswith("+") and previous is not None
        saved = f"{(previous.peak - row.peak) / 2**20:,.0f}" if stacked and previous else ""
        table.add_row(row.name, f"{row.peak / 2**20:,.0f}", saved, f"{row.seconds:.2f}", f"{row.seconds / fastest.seconds:.2f}x")
        previous = row
    console = Console(width=120, highlight=False)
    console.print(table)
    console.print(f"lean: {result['lean']}, {result['lean_peak'] / 2**20:.0f} MiB at {result['lean_slowdown']:.2f}x the time of a step")
    if theirs:
        least, quickest = result["ratio_to_least"], result["ratio_to_fastest"]
        console.print(f"transformers with AdamW takes {least:.2f} times that where it is leanest, {quickest:.2f} times where it is fastest")
