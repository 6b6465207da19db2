"""The sides of the comparison: what is fixed about each, and the rules that turn a budget of FLOPs into a shape and rates.

`recipes/efficiency/NAME.toml` holds `[settings]` of `shoal train` and a `[rule]` for width, layers, batch and rate:
`at_1e12` times (FLOPs / 1e12) to the `power`. Width is rounded to heads, the others to whole numbers; `rate` multiplies the learning
rates that `[settings.optimizer]` names. All sides are tuned over the same steps around their rules (`search.py`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from ...config import TrainConfig
from ...config.recipes import from_table, read_toml
from ...plan.budget import steps_for

SIDES = ("baseline", "exportable", "full")
RULES = ("width", "layers", "batch", "rate")
HEAD = 16
"""Width of a head, and what widths are multiples of."""
RATES = ("adam_lr", "embed_lr", "head_lr", "muon_lr")


@dataclass(frozen=True)
class Point:
    """What is tuned: one value of every rule."""

    width: float
    layers: float
    batch: float
    rate: float

    def times(self, **factors: float) -> Point:
        """The point with some values multiplied."""
        return replace(self, **{name: getattr(self, name) * factor for name, factor in factors.items()})


@dataclass(frozen=True)
class Side:
    """One side, for every budget."""

    name: str
    settings: dict[str, Any]
    rules: dict[str, dict[str, float]]

    @classmethod
    def load(cls, name: str) -> Side:
        """One of `SIDES`."""
        common, own = _table("common"), _table(name)
        return cls(name, _merged(common, own["settings"]), own["rule"])

    def point(self, flops: float) -> Point:
        """Where the rules put a budget."""
        return Point(**{name: self.rules[name]["at_1e12"] * (flops / 1e12) ** self.rules[name]["power"] for name in RULES})

    def config(self, flops: float, point: Point | None = None) -> TrainConfig:
        """Settings of a run of `flops`, at a point of the search or else where the rules say; steps are what the budget buys.

        Raises `UserError` where the budget is less than a step.
        """
        point = point or self.point(flops)
        heads = max(1, round(point.width / HEAD))
        width = heads * HEAD
        table = _merged(
            self.settings,
            {
                "batch_size": max(1, round(point.batch)),
                "steps": 1,
                "model": {
                    "hidden_size": width,
                    "num_hidden_layers": max(1, round(point.layers)),
                    "num_attention_heads": heads,
                    "intermediate_size": round(width / 3) * 8,
                },
            },
        )
        optimizer = table["optimizer"]
        optimizer.update({name: optimizer[name] * point.rate for name in RATES if name in optimizer})
        config = from_table(TrainConfig, table, f"the rules of {self.name}")
        config = replace(config, steps=steps_for(config, flops))
        config.validate()
        return config


def _table(name: str) -> dict[str, Any]:
    return read_toml((resources.files("shoal") / "recipes" / "efficiency" / f"{name}.toml").read_text(encoding="utf-8"), name)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested tables, the second's values over the first's."""
    result = copy.deepcopy(first)
    for key, value in second.items():
        result[key] = _merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result
