"""TOML recipes: whole, named settings of a run. A recipe names only what differs from the defaults."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError
from .train import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

RULES = ("baseline", "exportable", "full")
"""What `shoal train` can be told in place of a recipe: rules that make one from a budget (`plan.rules`)."""

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def recipe_names() -> list[str]:
    """Names of the recipes that come with Shoal."""
    folder = resources.files("shoal") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(name: str) -> TrainConfig:
    """A recipe by built-in name or path of a TOML file."""
    path = Path(name)
    if name in recipe_names():
        text = (resources.files("shoal") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {name} cannot be read: {error}") from None
    else:
        known = f"a TOML file, one of {', '.join(recipe_names())}, or with a budget one of {', '.join(RULES)}"
        raise UserError(f"there is no recipe {name!r}: give {known}")
    return from_table(TrainConfig, read_toml(text, f"recipe {name}"), name)


def read_toml(text: str, name: str) -> dict[str, Any]:
    """The tables of a TOML text, called `name` where it is wrong."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name} is not valid TOML: {error}") from None


def from_table(cls: type[T], table: dict[str, Any], where: str) -> T:
    """Build dataclass `cls` from nested tables; unknown or mistyped keys raise `UserError` with their place."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise UserError(f"{where}: there is no setting {key!r}; known here: {', '.join(hints)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} is a section, write [{key}]")
            values[key] = from_table(typing.cast(type, hint), value, f"{where}: {key}")
        else:
            values[key] = _checked(value, hint, f"{where}: {key}")
    return cls(**values)


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` if it fits `hint`; whole numbers are taken where a fraction is asked for."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    for option in options:
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif origin is tuple and isinstance(value, (list, tuple)):
            items = typing.get_args(option)
            if items[-1] is ...:
                items = items[:1] * len(value)
            if len(items) == len(value):
                return tuple(_checked(item, wanted, where) for item, wanted in zip(value, items, strict=True))
        elif option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif type(value) is (origin or option) or (value is None and option is type(None)):
            return value
    expected = KINDS.get(hint) or str(hint).replace("typing.", "")
    raise UserError(f"{where} cannot be {value!r}: expected {expected}")


def to_toml(config: Any) -> str:
    """Every setting of a dataclass as TOML that `load_recipe` reads back.

    TOML has no None: it is left out where it is the default, and elsewhere written as 0 (-1 for the id of a token), which such settings
    take for none. `extra` of a model is left out: it holds no settings, and as what a `config.json` says it may be more than TOML can.
    """
    lines: list[str] = []
    _write_table(dataclasses.asdict(config), dataclasses.asdict(type(config)()), "", lines)
    return "\n".join(lines).lstrip() + "\n"


def write_toml(config: Any, path: Path) -> str:
    """`to_toml` as a file; its name, which `shoal train` takes for a recipe."""
    path.write_text(to_toml(config), encoding="utf-8")
    return str(path)


def _write_table(table: dict[str, Any], defaults: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in table.items():
        if value is None and defaults.get(key) is not None:
            lines.append(f"{_toml_key(key)} = {-1 if key.endswith('_token_id') else 0}")
        elif value is not None and not isinstance(value, dict):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        if isinstance(value, dict) and value and key != "extra":
            lines.extend(["", f"[{prefix}{_toml_key(key)}]"])
            _write_table(value, defaults.get(key) or {}, f"{prefix}{_toml_key(key)}.", lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        return '"' + "".join(escapes.get(c, c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in value) + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def with_one_budget(config: TrainConfig, recipe: TrainConfig) -> TrainConfig:
    """A budget given on the command line takes the place of the recipe's, also where it is of another kind."""
    kinds = ("minutes", "tokens", "steps")
    given = [kind for kind in kinds if getattr(config, kind) != getattr(recipe, kind) and getattr(config, kind) is not None]
    if len(given) != 1:
        return config
    others: dict[str, Any] = {kind: None for kind in kinds if kind != given[0]}
    return dataclasses.replace(config, **others)
