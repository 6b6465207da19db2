from __future__ import annotations

import threading
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
    halves, computes, carried = Halves(), threading.Event(), threading.Event()

    def exchange() -> bool:
        hidden = computes.wait(5)
        time.sleep(0.2)
        carried.set()
        return hidden

    def other() -> bool:
        computes.set()
        return carried.wait(5)

    assert halves.run(lambda: halves(exchange), other) == (True, True)
    assert halves.exposed_seconds < 0.2
    assert halves(exchange)
    assert halves.exposed_seconds >= 0.2  # with nothing to hide behind


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
