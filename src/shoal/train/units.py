"""Numbers as people read them."""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def si(value: float, unit: str = "") -> str:
    """`value` with three significant digits and a prefix: si(6.61e13, "FLOP") is "66.1 TFLOP"."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or abs(value) < 1e-3:
        return f"{value:.3g} {unit}".rstrip()
    exponent = min(max(math.floor(math.log10(abs(value))) // 3, 0), len(_PREFIXES) - 1)
    scaled = float(f"{value / 1000**exponent:.3g}")
    if abs(scaled) >= 1000 and exponent < len(_PREFIXES) - 1:  # 999.9 k rounds up to 1 M
        exponent, scaled = exponent + 1, scaled / 1000
    number = f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"
    return f"{number} {_PREFIXES[exponent]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """`seconds` as 0:07, 12:34, 1:02:03 or 3 d 04:05 h."""
    if not math.isfinite(seconds):
        return "–"
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours < 1:
        return f"{minute}:{second:02d}"
    if hours < 48:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{minute:02d} h"


def spelled(seconds: float) -> str:
    """`seconds` in the unit that suits: 42 seconds, 5.0 minutes, 3.2 hours, 8.1 days."""
    for unit, length, limit in (("seconds", 1, 120), ("minutes", 60, 7200), ("hours", 3600, 172800)):
        if seconds < limit:
            return f"{seconds / length:.{0 if length == 1 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"
