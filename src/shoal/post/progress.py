"""What a person sees of post-training: lines on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..train.units import duration

LINE_SECONDS = 10.0
SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.3f}",
    "margin": "margin {:.3f}",
    "length": "length {:.0f}",
    "entropy": "entropy {:.3f}",
}
SHOWN |= {"mismatch": "mismatch {:.1e}", "grad_norm": "gradient {:.2f}"}


class Progress:
    """A line now and then, and one for every evaluation."""

    def __init__(self, steps: int) -> None:
        self._steps, self._began, self._shown = steps, time.monotonic(), -LINE_SECONDS

    def step(self, row: dict[str, Any]) -> None:
        """The figures of a step."""
        now, step = time.monotonic(), row["step"]
        scores = [f"{s['task']} {s['accuracy']:.1%} ± {s['error']:.1%} ({s['length']:.0f} tokens)" for s in row.get("scores", [])]
        if now - self._shown < LINE_SECONDS and not scores and step < self._steps:
            return
        self._shown = now
        figures = [text.format(row[name]) for name, text in SHOWN.items() if row.get(name) is not None]
        left = duration((now - self._began) / step * (self._steps - step))
        print("  ".join([f"{step}/{self._steps}", *figures, *scores, f"ETA {left}"]), file=sys.stderr, flush=True)
