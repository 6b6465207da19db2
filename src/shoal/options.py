"""Options of the command line: a dataclass of `config` filled from arguments, by tyro."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro
import tyro._strings

from .config import UserError

T = TypeVar("T")

KINDS = {"INT": "a whole number", "FLOAT": "a number", "{True,False}": "True or False"}


def _joined(helptext: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(helptext).split("\n\n"))


# tyro reads the texts of options with the source's indentation, and takes an indented line for one that shall begin anew.
tyro._strings.remove_single_line_breaks = _joined


def parse(cls: type[T], args: Sequence[str], verb: str, default: T | None = None) -> T:
    """The options of a verb; `UserError` where they are wrong."""
    for at, option in enumerate(args):
        if option == "--data" and (args[at + 1 :] or ["--"])[0].startswith("--"):  # an empty list would mean the text that is there without
            raise UserError("--data names nothing: give it a path")
    options: dict[str, Any] = {
        "args": list(args),
        "prog": f"shoal {verb}",
        "description": cls.__doc__,
        "config": (tyro.conf.HelptextFromCommentsOff,),
    }
    if default is not None:
        options["default"] = default
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(f"{_in_one_line(complaint.getvalue(), args)}; see shoal {verb} --help")


def _in_one_line(complaint: str, args: Sequence[str]) -> str:
    """What tyro says is wrong, which it draws as a box of several lines and, of values, in terms of types."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", complaint.split("For full helptext")[0])
    text = re.sub(r"([│╭╮╰╯─\s]|-{3,})+", " ", text).strip()
    if value := re.search(r"Error parsing (\S+): .* Argument helptext: \1 (?:\{None\}\|)?(\{True,False\}|[A-Z]+)", text):
        option, kind = value.groups()
        return f"{option} is {_given(option, args)!r}: it must be {KINDS.get(kind, kind)}"
    if unknown := re.match(r"Unrecognized options Unrecognized options: ([^\s,]+)", text):
        if not unknown[1].startswith("-"):
            return f"{unknown[1]!r} is one argument too many"
        near = re.findall(r"(--[\w.-]+) ", text.partition("Perhaps you meant: ")[2])
        return f"there is no option {unknown[1]}" + (f" (is it {' or '.join(near)}?)" if near else "")
    return re.sub(r"^(Value error|Missing argument|Invalid choice|Required options) ", "", text)


def _given(option: str, args: Sequence[str]) -> str:
    """What stands behind an option."""
    for at, arg in enumerate(args):
        name, joined, value = arg.partition("=")
        if name.replace("_", "-") == option:
            return value if joined else " ".join(itertools.takewhile(lambda word: not word.startswith("--"), args[at + 1 :]))
    return ""
