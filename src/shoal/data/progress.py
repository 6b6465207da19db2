"""How far a long preparation is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0

Report = Callable[[float, str], None]
"""Called with the share that is done (0 where unknown) and a few words with figures."""


@contextmanager
def show_progress(title: str, enabled: bool = True) -> Iterator[Report]:
    """Gives a function to report progress with, as often as one likes. Writes to stderr, and nothing unless `enabled`."""
    if not enabled:
        yield lambda share, figures: None
    elif sys.stderr.isatty():
        with _bar(title) as report:
            yield _at_most_every(0.1, report)
    else:
        yield _at_most_every(SECONDS_BETWEEN_LINES, _line(title))


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, figures="")
        yield lambda share, figures: progress.update(task, total=1.0 if share else None, completed=share, figures=figures)


def _line(title: str) -> Report:
    def report(share: float, figures: str) -> None:
        print(f"{title}: {f'{share:.0%}, ' if share else ''}{figures}", file=sys.stderr, flush=True)

    return report


def _at_most_every(seconds: float, report: Report) -> Report:
    """`report`, but calls that come sooner after the last one than that, or after the start, are left out."""
    last = time.monotonic()

    def report_sometimes(share: float, figures: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            report(share, figures)

    return report_sometimes
