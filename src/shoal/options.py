"""Options of the command line: a dataclass of `config` filled from arguments, by tyro."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from .config import UserError

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], verb: str, default: T | None = None) -> T:
    """The options of a verb; `UserError` where they are wrong."""
    options: dict[str, Any] = {"args": list(args), "prog": f"shoal {verb}", "description": cls.__doc__}
    if default is not None:
        options["default"] = default
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro draws a box over several lines; what it says fits on one.
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", complaint.getvalue().split("For full helptext")[0])
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    raise UserError(f"{text}; see shoal {verb} --help")
