from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from shoal.train import trainer


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """`with stopped_after(n):` asks runs to stop after n steps."""

    @contextmanager
    def stop(steps: int) -> Iterator[None]:
        class Stop(trainer.StopRequest):
            looked = 0

            @property
            def asked(self) -> bool:  # type: ignore[override]
                Stop.looked += 1
                return Stop.looked > steps

            @asked.setter
            def asked(self, value: bool) -> None:
                pass

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "StopRequest", Stop)
            yield

    return stop
