"""The table of `shoal bench engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contestants import Contest
    from .engine import Figures, Measurement
    from .sides import Side


def print_report(contest: Contest, sides: list[Side], wanted: list[Measurement], figures: Figures, result: dict[str, Any]) -> None:
    """Rates of every side with their spread over the turns, ratios, memory, and how near Shoal comes to the machine's limits."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or pipe has no width that the table would have to fit
    for side in sides:
        console.print(f"{side.name}: {side.settings}; loaded in {side.loaded['load_seconds']:.1f} s")
    table = Table(title=f"{contest.name}: tokens per second (lowest - highest turn), ratios")
    table.add_column("", no_wrap=True)
    for side in sides:
        table.add_column(side.name, justify="right", no_wrap=True)
    for side in sides[1:]:
        table.add_column(f"to {side.name}", justify="right", no_wrap=True)
    for measurement in wanted:
        row = [measurement.label]
        for side in sides:
            rates = figures.rates[measurement.name][side.name]
            row.append(f"{number(figures.rate(measurement.name, side.name))} ({number(min(rates))} - {number(max(rates))})")
        ours = figures.rate(measurement.name, sides[0].name)
        row += [f"{ours / figures.rate(measurement.name, side.name):.2f}" for side in sides[1:]]
        table.add_row(*row)
    if figures.memory:
        held = [figures.memory[side.name] for side in sides]
        row = ["resident memory, GB", *(f"{memory.resident / 1e9:.2f} (files {memory.mapped_files / 1e9:.2f})" for memory in held)]
        table.add_row(*row, *(f"{held[0].resident / other.resident:.2f}" for other in held[1:] if other.resident))
    if table.rows:
        console.print(table)
    peaks = f"{result['peak_fp32'] / 1e9:.0f} GFLOP/s in fp32, {result['peak_int8'] / 1e9:.0f} in int8"
    lowest, highest = result["bandwidth_lowest"] / 1e9, result["bandwidth_highest"] / 1e9
    console.print(f"this machine reads {result['bandwidth'] / 1e9:.1f} GB/s ({lowest:.1f} - {highest:.1f}) and multiplies {peaks}")
    for key, what in (("bandwidth_share", "at 512 tokens"), ("bandwidth_share_long_context", "at 16384 tokens")):
        if key in result:
            console.print(f"decoding {what} uses {result[key]:.0%} of the bandwidth measured around it")
    if "prefill_fp32_peak_share" in result:
        console.print(f"prefill computes {result['prefill_fp32_peak_share']:.0%} of the fp32 peak")
    if "mtp_speedup" in result:
        acceptance = "none checked" if result["mtp_acceptance"] is None else f"{result['mtp_acceptance']:.0%} of the guesses were right"
        same = "the same text" if result["mtp_same_text"] else "ANOTHER TEXT"
        console.print(
            f"multi-token prediction: {result['mtp_speedup']:.2f}x, {acceptance}, {same}; automatic: {result['mtp_auto_speedup']:.2f}x"
        )
        answers = Table(title="answer by answer: times the speed without guesses")
        for column in ("guesses that were right", "guessing", "automatic"):
            answers.add_column(column, justify="right")
        for answer in result["mtp_answers"]:
            right = "none checked" if answer["acceptance"] is None else f"{answer['acceptance']:.0%}"
            answers.add_row(right, f"{answer['speedup']:.2f}", f"{answer['auto_speedup']:.2f}")
        console.print(answers)


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
