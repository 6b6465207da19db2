from __future__ import annotations

import time

import pytest

from shoal.parallel import Halves


def test_halves_take_turns_at_exchanges_in_one_order() -> None:
    halves, order = Halves(), []

    def half(name: str) -> str:
        for step in range(3):
            order.append(f"{name} computes {step}")
            got = halves(lambda step=step: order.append(f"{name} sends {step}") or step)  # type: ignore[misc]
            assert got == step
        return name

    for _ in range(20):
        order.clear()
        assert halves.run(lambda: half("a"), lambda: half("b")) == ("a", "b")
        assert [entry for entry in order if "computes" in entry] == [f"{name} computes {step}" for step in range(3) for name in "ab"]
        assert [entry for entry in order if "sends" in entry] == [f"{name} sends {step}" for step in range(3) for name in "ab"]


def test_an_exchange_hides_behind_the_other_half() -> None:
    halves = Halves()

    def half() -> None:
        for _ in range(3):
            time.sleep(0.02)
            halves(lambda: time.sleep(0.02))

    began = time.perf_counter()
    halves.run(half, half)
    assert time.perf_counter() - began < 0.2  # one after the other: 0.24
    assert halves.exposed_seconds < 0.06


def test_an_error_in_one_half_is_told() -> None:
    halves = Halves()

    def broken() -> None:
        halves(lambda: None)
        raise ValueError("broken")

    def whole() -> None:
        for _ in range(3):
            halves(lambda: None)

    with pytest.raises(ValueError, match="broken"):
        halves.run(whole, broken)
    assert halves.run(lambda: 1, lambda: 2) == (1, 2)
