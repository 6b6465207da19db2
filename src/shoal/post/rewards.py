"""Rewards: how much a reply is worth, as plain functions `(prompt, reply, answer) -> float`.

`prompt` is the question, `reply` all that the model wrote, its thought included (from `<think>` on, also where the template begins it),
`answer` the reference that came with the question. A user's own function has the same three arguments and is named as `FILE.py:NAME` or
`MODULE:NAME`; see `Judge`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import TracebackType

from ..config import UserError
from .problems import answer_of
from .sandbox import Function, Limits, runs_to_end

Reward = Callable[[str, str, str], float]

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")
"""A minus that follows a digit or a bracket subtracts."""
SUM = re.compile(r"(?:[\d\s,+\-*/×·÷=)%]|\((?!\s*=)|\.\d)+")
FRACTION = re.compile(r"\\[dt]?frac" + 2 * r"\s*(?:\{([^{}]*)\}|(\d))")
"""TeX takes one digit without braces, too."""
DECORATION = re.compile(r"\\?\$|\\[,!;]")
BOXED = "\\boxed{"
FENCED = re.compile(r"^([ \t]*)(`{3,})[ \t]*([^\s`]*)[^`\n]*\n(.*?)^(?:\1| {0,3})\2`*[ \t]*$", re.DOTALL | re.MULTILINE)
"""Any block, so that fences are taken in pairs; its groups 3 and 4 are language and content."""
PYTHON = re.compile(r"(?:python|py)[\d.]*", re.IGNORECASE)
SHAPE = re.compile(r"\s*<think>.+</think>\s*\S.*", re.DOTALL)
SAID = re.compile(r"####\s*(.+)|answer is:?\s*(.+)", re.IGNORECASE)
CODE_LIMITS = Limits(seconds=5.0, memory=1 << 30)
FUNCTION_LIMITS = Limits(seconds=10.0, memory=4 << 30)
USUAL_LENGTH = 2000
"""Characters of a reply for which `brevity` gives one half."""


def exact(prompt: str, reply: str, answer: str) -> float:
    """1 where the answer after the thought is the reference, but for space and letter case."""
    said = answer_of(reply)
    return float(said is not None and _plain(said) == _plain(answer))


def numeric(prompt: str, reply: str, answer: str) -> float:
    """1 where the reply's number (boxed, after ####, after "answer is", or else the last one) equals the reference's."""
    said, wanted = number_in(answer_of(reply) or ""), number_in(answer)
    return float(said is not None and said == wanted)


def form(prompt: str, reply: str, answer: str) -> float:
    """1 for a thought in `<think>` tags, each once, and an answer after it."""
    return float(SHAPE.fullmatch(reply) is not None and reply.count("<think>") == reply.count("</think>") == 1)


def pattern(prompt: str, reply: str, answer: str) -> float:
    """1 where the regular expression `answer` matches the whole answer after the thought.

    It is tried in the sandbox: some expressions take for ever.
    """
    said = answer_of(reply)
    return 0.0 if said is None else float(runs_to_end(f"import re\nassert re.fullmatch({answer!r}, {said!r}, re.DOTALL)", CODE_LIMITS))


def brevity(prompt: str, reply: str, answer: str) -> float:
    """1 for an empty reply, falling towards 0 as it grows; to be added with a small weight."""
    return USUAL_LENGTH / (USUAL_LENGTH + len(reply))


def code(prompt: str, reply: str, answer: str) -> float:
    """1 where the reply's Python passes the tests in `answer` (statements that raise where it is wrong), in the sandbox."""
    said = answer_of(reply)
    return 0.0 if said is None else float(runs_to_end(f"{code_in(said)}\n\n{answer}\n", CODE_LIMITS))


REWARDS: dict[str, Reward] = {
    "exact": exact, "numeric": numeric, "form": form, "pattern": pattern, "brevity": brevity, "code": code,
}  # fmt: skip


def number_in(text: str) -> Fraction | None:
    """The number that a text gives as its answer; None if there is none."""
    text = DECORATION.sub("", text.replace("\N{MINUS SIGN}", "-").replace("{,}", ","))
    text = FRACTION.sub(r"\1\2/\3\4", text)
    said = SAID.findall(text)
    for place in (_boxed(text), "".join(said[-1]) if said else ""):
        if found := NUMBER.search(place):
            # What a place names, comes first in it; of a sum that is worked out there, the result.
            worked_out = SUM.match(place, found.start())
            results = NUMBER.findall(worked_out[0].rpartition("=")[2]) if worked_out else []
            return _fraction(results[0] if len(results) == 1 else found[0])
    numbers = NUMBER.findall(text)
    return _fraction(numbers[-1]) if numbers else None


def _boxed(text: str) -> str:
    """What stands in the last `\\boxed{...}`, braces in it paired; nothing where there is none."""
    rest, depth = text.rpartition(BOXED)[2] if BOXED in text else "", 1
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i]
    return ""


def _fraction(number: str) -> Fraction | None:
    try:
        return Fraction(number.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def code_in(text: str) -> str:
    """The last fenced block of Python; or else the last one without a language, or all of the text."""
    blocks = [(language, content) for _, _, language, content in FENCED.findall(text)]
    python = [content for language, content in blocks if PYTHON.fullmatch(language)]
    unnamed = [content for language, content in blocks if not language]
    return (python or unnamed or [text])[-1]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


class Judge:
    """The weighted sum of several rewards: `NAME`, `FILE.py:NAME` or `MODULE:NAME`, each with `*WEIGHT` if it is not 1.

    Users' functions run in the sandbox: one that raises, hangs, forks or takes all memory costs its sample the reward, nothing else.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        if not specs:
            raise UserError(f"there is no reward: name one of {', '.join(REWARDS)}, or FILE.py:FUNCTION")
        self._parts: list[tuple[float, Reward | Function]] = []
        self.failures: dict[str, int] = {}
        """What went wrong in users' functions, and how often."""
        for spec in specs:
            name, _, factor = spec.partition("*")
            try:
                weight = float(factor or 1)
            except ValueError:
                weight = math.nan
            if not math.isfinite(weight):
                raise UserError(f"reward {spec!r}: what follows * must be a finite number")
            if name not in REWARDS and ":" not in name:
                raise UserError(f"there is no reward {name!r}: use {', '.join(REWARDS)}, or FILE.py:FUNCTION")
            self._parts.append((weight, REWARDS[name] if name in REWARDS else Function(name, FUNCTION_LIMITS)))

    def __enter__(self) -> Judge:
        """Users' functions are loaded. Raises `UserError` on the first that cannot be."""
        for _, part in self._parts:
            if isinstance(part, Function):
                part.load()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _, part in self._parts:
            if isinstance(part, Function):
                part.close()

    def __call__(self, prompt: str, reply: str, answer: str) -> float:
        """What a reply is worth; a part that fails gives 0."""
        return sum(weight * self._value(part, prompt, reply, answer) for weight, part in self._parts)

    def _value(self, part: Reward | Function, prompt: str, reply: str, answer: str) -> float:
        if not isinstance(part, Function):
            return part(prompt, reply, answer)
        result = part.call(prompt=prompt, reply=reply, answer=answer)
        if isinstance(result, str):
            self.failures[result] = self.failures.get(result, 0) + 1
            return 0.0
        return result if math.isfinite(result) else 0.0
