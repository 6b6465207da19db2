"""`shoal bench memory`: peak memory of a training step, what each measure saves, and what transformers takes for the same."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from ..apart import run_apart
from ..config import BenchMemoryCommand
from ..plan.measures import Measures
from .sides import require_peer

SLOWDOWN = 1.3
"""The lean setting may take so many times as long as the fastest."""
PEERS = [(precision, experts) for precision in ("bf16", "fp32") for experts in ("grouped_mm", "eager")]
"""The peer as it comes, and as it runs fastest."""


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
    few = _few(command)
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


def peers(command: BenchMemoryCommand) -> dict[str, dict[str, Any]]:
    """The peer's runs: the whole batch in one pass, as those who use AdamW run it, and then with what saves memory there."""
    few = _few(command)
    measures: dict[str, dict[str, Any]] = {
        "": {"micro_batch": command.batch_size, "checkpointing": False},
        f", micro-batches of {few}": {"micro_batch": few, "checkpointing": False},
        f", micro-batches of {few}, checkpointing": {"micro_batch": few, "checkpointing": True},
    }
    return {
        f"transformers, AdamW, {precision}, {experts}{name}": {"precision": precision, "experts": experts, **chosen}
        for name, chosen in measures.items()
        for precision, experts in PEERS
    }


def _few(command: BenchMemoryCommand) -> int:
    """Sequences of a micro-batch."""
    return max(1, command.batch_size // 8)


def run_bench(command: BenchMemoryCommand) -> dict[str, Any]:
    """Run every side, one after the other, print the table, return the JSON object."""
    command.validate()
    if command.vs:
        require_peer(command.vs, "shoal[peers]")
    ours = [_run(command, name, {"side": "shoal", **asdict(chosen)}) for name, chosen in settings(command).items()]
    theirs = [_run(command, name, {"side": "transformers", **chosen}) for name, chosen in (peers(command) if command.vs else {}).items()]
    result = summarize(ours, theirs)
    _print(ours, theirs, result)
    return result


def summarize(ours: list[Row], theirs: list[Row]) -> dict[str, Any]:
    """The JSON object; of `theirs`, the first take the whole batch in one pass."""
    fastest = min(ours, key=lambda row: row.seconds)
    lean = min((row for row in ours if row.seconds <= SLOWDOWN * fastest.seconds), key=lambda row: row.peak)
    result: dict[str, Any] = {
        "rows": [asdict(row) for row in (*ours, *theirs)],
        "lean": lean.name,
        "lean_peak": lean.peak,
        "lean_seconds": lean.seconds,
        "lean_slowdown": lean.seconds / fastest.seconds,
    }
    if theirs:
        whole = theirs[: len(PEERS)]
        leanest = min(theirs, key=lambda row: row.peak)
        result |= {
            "memory_ratio": min(row.peak for row in whole) / lean.peak,
            "ratio_to_fastest": min(whole, key=lambda row: row.seconds).peak / lean.peak,
            "leanest_peer": leanest.name,
            "leanest_peer_seconds": leanest.seconds,
            "ratio_to_leanest": leanest.peak / lean.peak,
            "ratios": {row.name: row.peak / lean.peak for row in theirs},
        }
    return result


def _run(command: BenchMemoryCommand, name: str, options: dict[str, Any]) -> Row:
    options |= {
        "batch": command.batch_size, "length": command.sequence_length, "steps": command.steps, "threads": command.threads,
    }  # fmt: skip
    said = run_apart("shoal.bench.memory_worker", json.dumps(options), failed=f"{name} did not run to its end")
    row = Row(name, **json.loads(said))
    print(f"{name}: {row.peak / 2**20:.0f} MiB, {row.seconds:.2f} s a step", file=sys.stderr, flush=True)
    return row


def _print(ours: list[Row], theirs: list[Row], result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="peak resident memory of training, each run in a process of its own")
    table.add_column("")
    fastest = min(row.seconds for row in ours)
    for column in ("MiB", "saved", "of the lean one", "s a step", "of the fastest"):
        table.add_column(column, justify="right", no_wrap=True)
    previous: Row | None = None
    for row in (*ours, *theirs):
        stacked = row in ours and row.name.startswith("+") and previous is not None
        saved = f"{(previous.peak - row.peak) / 2**20:,.0f}" if stacked and previous else ""
        share = f"{row.peak / result['lean_peak']:.2f}x"
        table.add_row(row.name, f"{row.peak / 2**20:,.0f}", saved, share, f"{row.seconds:.2f}", f"{row.seconds / fastest:.2f}x")
        previous = row
    console = Console(width=150, highlight=False)
    console.print(table)
    console.print(f"lean: {result['lean']}, {result['lean_peak'] / 2**20:.0f} MiB at {result['lean_slowdown']:.2f}x the time of a step")
    if theirs:
        console.print(
            f"transformers with AdamW takes {result['memory_ratio']:.2f} times that for the whole batch in one pass "
            f"({result['ratio_to_fastest']:.2f} times where it is fastest), {result['ratio_to_leanest']:.2f} times at its leanest "
            f"({result['leanest_peer'].removeprefix('transformers, AdamW, ')}: {result['leanest_peer_seconds']:.2f} s a step, "
            f"the lean one {result['lean_seconds']:.2f} s)"
        )
