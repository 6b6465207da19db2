"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere.

Everything goes to stderr, so that stdout stays free for the one JSON object at the end.
"""

from __future__ import annotations

import math
import os
import sys
import time
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .units import duration, si

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

REFRESH_SECONDS = 0.5  # a panel takes some milliseconds, which training should not feel
LINE_SECONDS, LINE_PROGRESS = 15.0, 0.05  # a plain line when either has passed
CURVE_ROWS = 3
FIGURE_WIDTH = 17  # of a name, and of a value as long as 123,456
BLOCKS = " ▁▂▃▄▅▆▇█"

TIDE, DEEP, CORAL, SAND, MUTED = "#35a7c9", "#1b6f93", "#e2734f", "#d9a441", "grey58"


class Display:
    """Shows the rows of a run as they come. Use as a context manager around the training loop.

    `total` describes the budget ("5 minutes"), `model_line` the model. `plain` = None decides by whether stderr is a
    terminal that can draw. `quiet` shows nothing: one of many processes does.
    """

    def __init__(self, total: str, model_line: str, plain: bool | None = None, quiet: bool = False) -> None:
        self.total, self.model_line, self.quiet = total, model_line, quiet
        self.plain = quiet or (not _can_draw() if plain is None else plain)
        self.curve = Curve()
        self.row: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}
        self.progress = 0.0
        self.eta_seconds = math.nan
        self._shown_at = -math.inf
        self._shown_progress = 0.0
        self._shown = True  # whether the last step is
        self._console: Console | None = None
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.plain:
            self.message(f"training {self.model_line} for {self.total}")
            return self
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False)
        # No refresh thread: the panel changes when a step is done. A stdout that goes to a file is left alone.
        self._live = Live(
            console=console, auto_refresh=False, get_renderable=lambda: self.panel(console.width), redirect_stdout=sys.stdout.isatty()
        )
        self._console = console
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._catch_up()

    def step(self, row: dict[str, Any], progress: float, eta_seconds: float) -> None:
        """An optimizer step is done: its row of metrics, the share of the budget that is spent (0..1), and the seconds left."""
        self.row, self.progress, self.eta_seconds = row, progress, eta_seconds
        self.curve.add(row["loss"])
        self._shown = False
        waited = time.monotonic() - self._shown_at
        if self._live is not None:
            due = waited >= REFRESH_SECONDS
        else:
            due = waited >= LINE_SECONDS or progress - self._shown_progress >= LINE_PROGRESS
        if due:
            self._show()

    def evaluation(self, row: dict[str, Any]) -> None:
        """An evaluation is done."""
        self.evaluated = row
        if self._live is not None:
            self._show()
        else:
            self._catch_up()
            loss = f", loss {row['val_loss']:.3f}" if row.get("val_loss") is not None else ""
            self._print(f"evaluation at step {row['step']:,}: {row['val_bpb']:.4f} bits per byte{loss}")

    def message(self, text: str) -> None:
        """Something to tell apart from the figures; it stays on the screen."""
        self._catch_up()
        self._print(text)

    def _catch_up(self) -> None:
        """What is told of a step comes after its line."""
        if self._live is None and not self._shown:
            self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.refresh()
        else:
            self._print(self._line())
        self._shown_at, self._shown_progress, self._shown = time.monotonic(), self.progress, True

    def _print(self, text: str) -> None:
        if self._console is not None:
            from rich.text import Text

            self._console.print(Text(text), soft_wrap=True)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> str:
        row = self.row
        parts = [f"{self.progress:4.0%}", f"step {row['step']:,}", f"loss {row['loss']:.3f}", f"{_number(row, 'bpb'):.3f} bits/byte"]
        parts += [f"{_number(row, 'tokens_per_second'):,.0f} tokens/s", _speed(row), si(_number(row, "flops"), "FLOP")]
        if row.get("max_vio") is not None:
            parts.append(f"MaxVio {row['max_vio']:.2f}")
        if row.get("skipped"):
            parts.append(f"{row['skipped']} skipped")
        return "  ".join([*parts, f"ETA {duration(self.eta_seconds)}"])

    def panel(self, width: int) -> RenderableType:
        """The live panel for a terminal of `width` columns."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = min(width, 120)
        inside = width - 6  # two borders, and a padding of two on both sides
        row = self.row

        bar = Table.grid(expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            ProgressBar(total=1.0, completed=self.progress, style="grey27", complete_style=TIDE, finished_style=TIDE),
            Text.assemble(
                ("  ", ""), (f"{self.progress:.0%}", "bold"), (f"  of {self.total}   ETA ", MUTED), (duration(self.eta_seconds), "bold")
            ),
        )
        lines: list[RenderableType] = [Text(self.model_line, style=MUTED), Text(""), bar, Text("")]
        if not row:
            lines.append(Text("the first step is under way", style=MUTED))
        else:
            lines += [self._loss(inside), Text(""), self._figures(inside)]
            if row.get("max_vio_layers"):
                lines += [_balance(row, inside)]
        return Panel(
            Group(*lines),
            width=width,
            padding=(0, 2),
            border_style=DEEP,
            title=Text("shoal train", style=f"bold {TIDE}"),
            title_align="left",
        )

    def _loss(self, inside: int) -> RenderableType:
        """The loss in figures, and as a curve over the whole run."""
        from rich.table import Table
        from rich.text import Text

        row = self.row
        figures = Text.assemble(("loss\n", MUTED), (f"{row['loss']:.3f}", f"bold {TIDE}"), (" nats/token\n", MUTED))
        figures.append(f"{_number(row, 'bpb'):.3f}", "bold")
        figures.append(" bits/byte", MUTED)
        curve = self.curve.draw(inside - 22, CURVE_ROWS)
        grid = Table.grid()
        grid.add_column(width=22)
        grid.add_column(no_wrap=True)
        grid.add_row(figures, Text("\n").join(Text(line, style=color) for line, color in zip(curve, (TIDE, "#2789ac", DEEP), strict=True)))
        return grid

    def _figures(self, inside: int) -> RenderableType:
        """Up to three columns of a name and a value, as many as are legible."""
        from rich.table import Table

        row = self.row
        share = row.get("peak_share")
        cells = [
            ("tokens/s", f"{_number(row, 'tokens_per_second'):,.0f}", ""),
            ("TFLOP/s", f"{_number(row, 'tflops'):.3g}", ""),
            ("of peak", "–" if share is None else f"{share:.0%}", ""),
            ("step", f"{row['step']:,}", ""),
            ("tokens", si(_number(row, "tokens")), ""),
            ("FLOPs", si(_number(row, "flops")), ""),
            ("val bpb", f"{self.evaluated['val_bpb']:.3f}" if self.evaluated else "–", CORAL if self.evaluated else MUTED),
            ("rate", f"{100 * row['lr']:.0f}%" if row.get("lr") is not None else "–", ""),
            ("grad norm", f"{_number(row, 'grad_norm'):.3g}", ""),
        ]
        if row.get("max_vio") is not None:
            cells.append(("MaxVio", f"{row['max_vio']:.2f}", f"bold {_heat(row['max_vio'])}"))
        if row.get("skipped"):
            cells.append(("skipped", str(row["skipped"]), CORAL))
        columns = min(max(inside // FIGURE_WIDTH, 1), 3)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for start in range(0, len(cells), columns):
            grid.add_row(*(_named(*cell) for cell in cells[start : start + columns]))
        return grid


class Curve:
    """A value over a whole run in bounded memory: neighbours are averaged whenever `limit` points are reached."""

    def __init__(self, limit: int = 512) -> None:
        self.limit = limit
        self.points: list[float] = []
        self._stride = 1  # values per point
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Values that are not finite are left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._stride:
            return
        self.points.append(sum(self._open) / len(self._open))
        self._open.clear()
        if len(self.points) >= self.limit:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._stride *= 2

    def draw(self, width: int, height: int) -> list[str]:
        """`height` lines of `width` characters, highest first.

        A curve with fewer points than `width` is as wide as it has points. The top of the scale is the value after an
        eighth of the run, or the first steps would press all that follows to the ground.
        """
        count = len(self.points)
        columns = min(width, count)
        if columns < 1:
            return [" " * width] * height
        edges = [count * column // columns for column in range(columns + 1)]
        values = [sum(self.points[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, high = min(values), max(values[columns // 8 :])
        scale = (8 * height - 1) / (high - low) if high > low else 0.0
        levels = [min(1 + round((value - low) * scale), 8 * height) for value in values]
        return ["".join(BLOCKS[min(max(level - 8 * row, 0), 8)] for level in levels).ljust(width) for row in reversed(range(height))]


def _balance(row: dict[str, Any], inside: int) -> Text:
    """MaxVio of every layer as a small bar: full at 1, where the busiest expert has twice its share."""
    from rich.text import Text

    text = Text("by layer  ", style=MUTED, no_wrap=True)
    layers = row["max_vio_layers"]
    gap = " " if 2 * len(layers) + 10 <= inside else ""
    for value in layers:
        text.append(BLOCKS[min(1 + int(value * 7), 8)] + gap, _heat(value))
    return text


def _heat(max_vio: float) -> str:
    """Calm below 0.5, warm below 1, hot above."""
    return TIDE if max_vio < 0.5 else SAND if max_vio < 1 else CORAL


def _named(name: str, value: str, style: str) -> Text:
    from rich.text import Text

    return Text.assemble((f"{name:<10}", MUTED), (value, style or "bold"), no_wrap=True)


def _speed(row: dict[str, Any]) -> str:
    share = row.get("peak_share")
    return f"{_number(row, 'tflops'):.3g} TFLOP/s" + (f" ({share:.0%} of peak)" if share is not None else "")


def _number(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else value


def _can_draw() -> bool:
    """Whether stderr is a terminal that can move its cursor and show block characters."""
    encoding = (sys.stderr.encoding or "").lower().replace("-", "")
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and encoding == "utf8"
