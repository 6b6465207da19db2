"""`metrics.jsonl`: one JSON object a line, written as it happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..finite import finite
from .tensorboard import TensorBoardLog


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, one after the other, as a run of a million steps has half a gigabyte of them.

    A run that was killed may leave half a line, also in the middle once it was resumed: such lines are left out.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                yield row


class MetricsLog:
    """Appends rows; every line reaches the operating system at once, so that a killed run keeps what it did."""

    def __init__(self, run: Path, tensorboard: bool, active: bool = True) -> None:
        """Writes nothing unless `active`: one of many processes does."""
        self._path, self._active = run / "metrics.jsonl", active
        self._tensorboard = TensorBoardLog(run / "tensorboard") if tensorboard and active else None
        self._file: IO[str] | None = None

    def __enter__(self) -> MetricsLog:
        if self._active:
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, row: dict[str, Any]) -> None:
        if not self._active:
            return
        assert self._file is not None
        safe = finite(row)
        try:
            self._file.write(json.dumps(safe, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._tensorboard is not None:
            self._tensorboard.write(safe)
