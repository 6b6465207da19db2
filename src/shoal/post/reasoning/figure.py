"""The picture of a GRPO run: held-out accuracy, reward, length of replies and entropy against steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...train.metrics import read_rows
from ...train.plots import CORAL, MUTED, STYLE, TIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (TIDE, CORAL, "#c08a1e", "#5cb8a9")
PANELS = (("reward", "Reward"), ("length", "Tokens of a reply"), ("entropy", "Entropy, nats per token"))
WINDOW = 5
"""Steps whose mean is drawn as a line; the steps themselves are dots."""


def draw(metrics: Path, path: Path) -> str | None:
    """Write the picture to `path`; None, with a line on stderr, where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: matplotlib is missing (pip install 'shoal[report]')", file=sys.stderr)
        return None
    rows = list(read_rows(metrics))
    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.4, 6.4), layout="constrained")
        panels = figure.subplots(2, 2).flatten()
        _accuracy(panels[0], rows)
        for panel, (name, title) in zip(panels[1:], PANELS, strict=True):
            _curve(panel, rows, name, title)
        for panel in panels[2:]:
            panel.set_xlabel("step")
        figure.savefig(path)
    return str(path)


def _accuracy(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """pass@1 of every task with its 95% interval."""
    panel.set_title("pass@1 on held-out problems", loc="left")
    scored = [row for row in rows if row.get("scores")]
    for index, first in enumerate(scored[0]["scores"]):
        of_task = [row["scores"][index] for row in scored]
        steps, accuracy = [row["step"] for row in scored], [score["accuracy"] for score in of_task]
        error, colour = [score["error"] for score in of_task], COLOURS[index % len(COLOURS)]
        panel.fill_between(
            steps,
            [a - e for a, e in zip(accuracy, error, strict=True)],
            [a + e for a, e in zip(accuracy, error, strict=True)],
            color=colour,
            alpha=0.15,
            lw=0,
        )
        panel.plot(steps, accuracy, color=colour, marker="o", ms=3, label=first["task"])
    panel.set_ylim(0, 1)
    panel.yaxis.set_major_formatter("{x:.0%}")
    panel.legend(frameon=False, loc="lower right")


def _curve(panel: Axes, rows: list[dict[str, Any]], name: str, title: str) -> None:
    panel.set_title(title, loc="left")
    steps, values = zip(*[(row["step"], row[name]) for row in rows if row.get(name) is not None], strict=True)
    smooth = [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - WINDOW + 1) : i + 1])]
    panel.plot(steps, values, ".", color=MUTED, ms=3, alpha=0.5)
    panel.plot(steps, smooth, color=TIDE)
    panel.set_ylim(bottom=0)
