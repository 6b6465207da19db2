"""Who is compared, and with which budgets."""

from __future__ import annotations

from dataclasses import replace

from ...plan.rules import Rules, merged

SAMPLED = {"sampled_softmax": {"drawn": 512}, "optimizer": {"head_lr": 0.025}}
"""What the baseline gets as `sampled`, against which a ratio is not that of a cheaper head. It has no counts to know what is likely."""

BUDGETS: dict[str, dict[str, tuple[float, ...]]] = {
    "small": {
        "baseline": (1e12, 3e12, 1e13), "sampled": (1e12, 3e12, 1e13), "exportable": (1e11, 3e11, 1e12),
        "full": (3e9, 3e10, 3e11, 1e12),
    },
    "medium": {
        "baseline": (1e14, 3e14, 1e15), "sampled": (3e13, 1e14, 3e14), "exportable": (3e13, 1e14, 3e14), "full": (1e13, 3e13, 1e14, 3e14),
    },
    "gpu": {"baseline": (1e17, 3e17, 1e18), "exportable": (3e16, 1e17, 3e17), "full": (1e16, 3e16, 1e17, 3e17)},
}  # fmt: skip
"""FLOPs of the runs of every side. The cheaper a side is expected to be, the smaller: what counts is that their losses overlap."""


def load_side(name: str) -> Rules:
    """Rules of one of `BUDGETS`."""
    if name != "sampled":
        return Rules.load(name)
    baseline = Rules.load("baseline")
    return replace(baseline, name=name, settings=merged(baseline.settings, SAMPLED))
