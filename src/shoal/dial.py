"""One dial for training: `--flops`, `--params` or `--minutes` in place of every other setting, by rules (see `plan.rules`)."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from .config import TrainConfig, UserError
from .config.recipes import RULES, load_recipe
from .options import parse
from .plan.cost import count_parameters
from .plan.report import count
from .plan.rules import Rules

NEAR = 0.05
"""By so much a model may miss the size that was asked for before that is said."""


def derive(args: list[str]) -> TrainConfig | None:
    """Settings that rules derive from `--flops`, `--params` or `--minutes`; None where a recipe or a model says what to train.

    The name of the rules, `--flops` and `--params` are taken out of `args`. `--params` with `--minutes` trains its model so long.
    A run that goes on has what rules found for the machine as it was then.
    """
    named = bool(args) and not args[0].startswith("-")
    flops, size = _take(args, "--flops"), _take(args, "--params")
    dialled = flops is not None or size is not None
    if _asked(args, "--help", "-h") or (not dialled and _asked(args, "--resume")):
        if named and args[0] in RULES:
            args.pop(0)
        return None
    if not dialled and not (args[0] in RULES if named else _asked(args, "--minutes") and not _asked(args, "--start")):
        return None
    if not named and _asked(args, "--resume"):
        raise UserError("--flops and --params are for new runs, a run that goes on has its shape: give --minutes, --tokens or --steps")
    if named and args[0] not in RULES:
        load_recipe(args[0])  # which says so where there is none
        raise UserError(f"{args[0]} has its shape, which --flops and --params would choose: leave them away, or name {', '.join(RULES)}")
    rules = Rules.load(args.pop(0) if named else "full")
    if flops is not None and size is not None:
        raise UserError("--flops and --params both say how large the model is: give one of them")
    if flops is not None:
        return rules.config(_number("--flops", flops, "1e13"))
    if size is not None:
        return _of_size(rules, size)
    if not _asked(args, "--minutes"):
        raise UserError(f"{rules.name} are rules, which need a budget: give --minutes, --flops or --params")
    if "RANK" in os.environ:
        raise UserError(
            "--minutes measures the machine, and here every process would find another model: give --flops or --params, or --nproc"
        )
    from .runtime import start

    asked = parse(TrainConfig, args, "train", replace(rules.config(1e12), steps=None, minutes=1.0))
    if asked.minutes is None:
        raise UserError("--minutes is None: it must be more than 0")
    asked.validate_budget()
    return rules.config_for_minutes(asked.minutes, start(asked.device, asked.precision, asked.threads).peak_flops)


def _of_size(rules: Rules, size: str) -> TrainConfig:
    """Settings of the model that comes nearest to what `--params` asks for; says so where it is not near. Widths and layers are whole."""
    asked = _number("--params", size, "5M")
    config = rules.config(rules.flops_for(asked))
    found = count_parameters(config.model).total
    if abs(found / asked - 1) > NEAR and os.environ.get("RANK", "0") == "0":
        print(f"asked for {count(asked)} parameters: the nearest model of the rules {rules.name} has {count(found)}", file=sys.stderr)
    return config


def _number(option: str, text: str, example: str) -> float:
    """A number that may end in K, M or B. Raises `UserError` for what is none."""
    digits, unit = (text[:-1], {"K": 1e3, "M": 1e6, "B": 1e9}[text[-1].upper()]) if text[-1:].upper() in ("K", "M", "B") else (text, 1.0)
    try:
        return float(digits) * unit
    except ValueError:
        raise UserError(f"{option} is {text!r}: it must be a number such as {example}") from None


def _asked(args: list[str], *options: str) -> bool:
    return any(arg.split("=")[0] in options for arg in args)


def _take(args: list[str], option: str) -> str | None:
    """The value of an option, which is taken out; None where it is not given."""
    at = next((i for i, arg in enumerate(args) if arg.split("=")[0] == option), None)
    if at is None:
        return None
    joined = "=" in args[at]
    value = args[at].partition("=")[2] if joined else "".join(args[at + 1 : at + 2])
    del args[at : at + 1 + (not joined)]
    return value
