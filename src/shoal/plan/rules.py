"""From a budget of FLOPs to the settings of a run.

`recipes/rules/NAME.toml` holds `[settings]` of `shoal train` and a `[rule]` for width, layers, batch and rate (and `experts`, where there
are some, and `count_order`, where a model counts n-grams): `at_1e12` times (FLOPs / 1e12) to the `power`. What `[several_layers]` says
goes before `[settings]` where there are more layers than one. Width is rounded to heads (with experts to blocks, two of which have two
heads, as values of two fill a block), layers, batch and order to whole numbers; an expert is about a third as wide as the model, and
those of a token together, shared ones included and two routed ones at least, are about as wide as it; `rate` multiplies the learning
rates that `[settings.optimizer]` names. The evidence behind the numbers is in docs/experiments.md: runs chosen by hand, for every side. To
tune width, layers, batch and rate of all sides by the same steps is what `shoal bench efficiency --search` is for.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from ..config import TrainConfig, UserError
from ..config.model import LONGEST_NGRAM
from ..config.recipes import RULES, from_table, read_toml
from .budget import steps_for
from .cost import count_parameters

VALUES = ("width", "layers", "batch", "rate")
HEAD = 16
"""Width of a head, and what widths are multiples of."""
BLOCK = 32
"""What widths of mixtures, and of their experts where they can, are multiples of: 4 bits are stored by blocks of so many weights."""
EXPERTS, LEAST_EXPERTS, MOST_EXPERTS = 16, 32, 256
"""What numbers of experts are multiples of, and between which they lie."""
SHARE_OF_PEAK = 0.2
"""Of a machine's products, what training with candidates reaches: a tenth with the smallest models, a quarter with larger ones."""
LEAST_FLOPS, MOST_FLOPS = 1e9, 1e21
RATES = ("adam_lr", "embed_lr", "head_lr", "muon_lr")


@dataclass(frozen=True)
class Point:
    """What is tuned: one value for every rule."""

    width: float
    layers: float
    batch: float
    rate: float

    def times(self, **factors: float) -> Point:
        """The point with some values multiplied."""
        return replace(self, **{name: getattr(self, name) * factor for name, factor in factors.items()})


@dataclass(frozen=True)
class Rules:
    """One set of rules, for every budget."""

    name: str
    settings: dict[str, Any]
    rules: dict[str, dict[str, float]]
    several_layers: dict[str, Any] = field(default_factory=dict)
    """What networks of more than one layer have in place of `settings`."""

    @classmethod
    def load(cls, name: str) -> Rules:
        """One of `RULES`. Raises `UserError` for another."""
        if name not in RULES:
            raise UserError(f"there are no rules {name!r}: use one of {', '.join(RULES)}")
        common, own = _table("common"), _table(name)
        return cls(name, merged(common, own["settings"]), own["rule"], own.get("several_layers", {}))

    def point(self, flops: float) -> Point:
        """Where the rules put a budget."""
        return Point(**{name: _at(self.rules[name], flops) for name in VALUES})

    def config(self, flops: float, point: Point | None = None) -> TrainConfig:
        """Settings of a run of `flops`, at a point of the search or else where the rules say; steps are what the budget buys.

        Raises `UserError` where the budget is less than a step.
        """
        import torch  # not before it is needed: help texts do without

        if not 0 < flops < 1e30:
            raise UserError(f"a budget of {flops:g} FLOPs: it must be more than 0 and less than 1e30")
        point = point or self.point(flops)
        mixes = "experts" in self.rules
        width, layers = _multiple(point.width, BLOCK if mixes else HEAD), max(1, round(point.layers))
        table = merged(
            merged(self.settings, self.several_layers if layers > 1 else {}),
            {
                "batch_size": max(1, round(point.batch)),
                "steps": 1,
                "model": {
                    "hidden_size": width,
                    "num_hidden_layers": layers,
                    "num_attention_heads": 2 * max(1, width // (2 * BLOCK)) if mixes else width // HEAD,
                    "intermediate_size": round(width / 3) * 8,
                },
            },
        )
        if mixes:
            inner = _multiple(width / 3, BLOCK)
            number = _multiple(_at(self.rules["experts"], flops), EXPERTS)
            table["model"].update(
                intermediate_size=inner,
                moe_intermediate_size=inner,
                n_routed_experts=min(max(number, LEAST_EXPERTS), MOST_EXPERTS),
                num_experts_per_tok=max(2, round(width / inner) - table["model"]["n_shared_experts"]),
            )
        if (order := self.rules.get("count_order")) is not None:
            table["model"]["count_order"] = min(max(1, round(_at(order, flops))), LONGEST_NGRAM)
        if torch.cuda.is_available():
            table["precision"] = "auto"  # fp32 is what the rules were fitted in on CPUs, and a fraction of a GPU's speed
        optimizer = table["optimizer"]
        optimizer.update({name: optimizer[name] * point.rate for name in RATES if name in optimizer})
        config = from_table(TrainConfig, table, f"the rules of {self.name}")
        config = replace(config, steps=steps_for(config, flops))
        config.validate()
        return config

    def flops_for(self, parameters: float) -> float:
        """The budget whose model comes nearest to so many parameters, embedding and all experts included.

        Raises `UserError` for fewer than the smallest model has, or more than the largest.
        """
        few, many = LEAST_FLOPS, MOST_FLOPS
        smallest, largest = self._parameters(few), self._parameters(many)
        if not smallest <= parameters <= largest:
            raise UserError(f"{parameters:g} parameters: models of the rules {self.name} have {smallest:,} to {largest:,}")
        while many / few > 1.001:
            middle = math.sqrt(few * many)
            if self._parameters(middle) < parameters:
                few = middle
            else:
                many = middle
        return min((few, many), key=lambda flops: abs(math.log(self._parameters(flops) / parameters)))

    def _parameters(self, flops: float) -> int:
        return count_parameters(self.config(flops).model).total

    def config_for_minutes(self, minutes: float, peak_flops: float) -> TrainConfig:
        """Settings of a run that ends by the clock, on a machine whose products reach `peak_flops` a second."""
        return replace(self.config(max(60 * minutes * SHARE_OF_PEAK * peak_flops, LEAST_FLOPS)), steps=None, minutes=minutes)


def _multiple(value: float, of: int) -> int:
    """The multiple of `of` nearest to a value, and not 0."""
    return of * max(1, round(value / of))


def _at(rule: dict[str, float], flops: float) -> float:
    return rule["at_1e12"] * (flops / 1e12) ** rule["power"]


def _table(name: str) -> dict[str, Any]:
    return read_toml((resources.files("shoal") / "recipes" / "rules" / f"{name}.toml").read_text(encoding="utf-8"), f"rules {name}")


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested tables, the second's values over the first's."""
    result = copy.deepcopy(first)
    for key, value in second.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result
