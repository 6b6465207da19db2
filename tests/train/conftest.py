from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.config import TrainConfig
from shoal.config.recipes import load_recipe
from shoal.train import trainer


@pytest.fixture
def config(workshop: Path, tmp_path: Path) -> TrainConfig:
    """The workshop's recipe on its text, without multi-token prediction."""
    recipe = load_recipe(str(workshop / "recipe.toml"))
    model = replace(recipe.model, num_nextn_predict_layers=0)
    corpus = replace(recipe.corpus, cache=str(workshop / "cache"))
    return replace(recipe, data=(str(workshop / "text.txt"),), out=str(tmp_path / "run"), corpus=corpus, model=model)


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
