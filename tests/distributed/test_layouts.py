"""Whatever the layout, the same losses and gradients as one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from layouts import MARGIN, SMALL, STYLES, Learned, learn

from shoal.config import ModelConfig

QUICK: list[tuple[str, str, dict[str, Any]]] = [
    ("v3", "muon", {}),  # FSDP2
    ("v3", "split", {}),
    ("v3", "muon", {"expert": 2}),
    ("v2", "muon", {"expert": 2, "overlap": True}),
    ("v3", "muon", {"pipeline": 2, "schedule": "zbv"}),
    ("v2", "adamw", {"pipeline": 2}),
]
SLOW: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"dense": "replicate"}),
    (2, {"expert": 2}),
    (2, {"expert": 2, "dense": "replicate", "dispatch": "flat"}),
    (2, {"expert": 2, "overlap": True}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "schedule": "zbv"}),
    (4, {}),
    (4, {"expert": 4}),
    (4, {"expert": 2}),  # FSDP2 x EP
    (4, {"expert": 4, "per_node": 2}),
    (4, {"expert": 4, "dispatch": "flat"}),
    (4, {"expert": 4, "per_node": 2, "overlap": True}),
    (2, {"pipeline": 2, "schedule": "interleaved"}),
    (2, {"pipeline": 2, "schedule": "dualpipev"}),
    (4, {"pipeline": 4}),
    (4, {"pipeline": 2, "schedule": "interleaved"}),
    (4, {"pipeline": 2, "schedule": "zbv"}),
    (4, {"pipeline": 2, "schedule": "dualpipev"}),
    (4, {"pipeline": 2, "expert": 2}),  # EP x PP
    (4, {"pipeline": 2, "expert": 2, "schedule": "zbv"}),
    (4, {"pipeline": 2, "expert": 2, "schedule": "dualpipev"}),
    (4, {"pipeline": 2, "dense": "shard"}),  # FSDP2 x PP
    (4, {"pipeline": 2, "dense": "shard", "schedule": "interleaved"}),
    (4, {"pipeline": 2, "dense": "shard", "schedule": "zbv"}),
    (4, {"pipeline": 2, "dense": "shard", "schedule": "dualpipev"}),
    (8, {"pipeline": 2, "dense": "shard", "expert": 2}),  # FSDP2 x EP x PP
    (8, {}),
    (8, {"expert": 8, "per_node": 2}),
    (8, {"expert": 4, "per_node": 2}),
    (8, {"expert": 2}),
    (8, {"pipeline": 4, "expert": 2}),
    (8, {"pipeline": 2, "expert": 4, "per_node": 2, "schedule": "interleaved"}),
]


def name(value: Any) -> str:
    return " ".join(f"{key}={item}" for key, item in value.items()) or "fsdp" if isinstance(value, dict) else str(value)


def compare(got: Learned, expected: Learned) -> None:
    assert expected.margin > MARGIN, f"a choice of experts hangs on {expected.margin:.1e}: compare runs of another seed"
    assert got.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        error = (got.gradients[key] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-5, f"gradient of {key} is off by {error:.1e}"
    for figure in ("loss", "mtp_loss", "balance_loss", "max_vio"):
        pairs = zip(got.column(figure), expected.column(figure), strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        assert difference < 1e-5, f"{figure} is off by {difference:.1e}"
    norms = zip(got.column("grad_norm"), expected.column("grad_norm"), strict=True)
    assert max(abs(a / b - 1) for a, b in norms) < 1e-3


@pytest.mark.parametrize(("style", "optimizer", "layout"), QUICK, ids=name)
def test_two_processes_learn_what_one_learns(
    single: Callable[..., Learned], make: Any, style: str, optimizer: str, layout: dict[str, Any]
) -> None:
    got = learn(make(style=style, optimizer=optimizer, **layout), 2)
    compare(got, single(style=style, optimizer=optimizer))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "layout"), SLOW, ids=name)
@pytest.mark.parametrize(("style", "optimizer"), [("v3", "muon"), ("v2", "muon"), ("v3", "adamw"), ("v2", "adamw")])
def test_many_processes_learn_what_one_learns(
    single: Callable[..., Learned], make: Any, count: int, layout: dict[str, Any], style: str, optimizer: str
) -> None:
    got = learn(make(style=style, optimizer=optimizer, **layout), count)
    compare(got, single(style=style, optimizer=optimizer))


def test_rows_that_do_not_divide_among_processes(single: Callable[..., Learned], make: Any) -> None:
    odd = ModelConfig(**SMALL, **STYLES["v3"] | {"q_lora_rank": 23})
    compare(learn(make(model=odd, steps=3), 2), single(model=odd, steps=3))
