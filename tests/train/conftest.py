from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.config import TrainConfig
from shoal.config.recipes import load_recipe
from shoal.formats.checkpoints import complete_checkpoints
from shoal.formats.huggingface import load_model
from shoal.train import Trained, train, trainer


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
            def asked(self) -> bool:
                Stop.looked += 1
                return Stop.looked > steps

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "StopRequest", Stop)
            yield

    return stop


@pytest.fixture
def resumed(stopped_after: Callable[[int], AbstractContextManager[None]]) -> Callable[[TrainConfig], tuple[Trained, Trained]]:
    """`resumed(config)`: a run that was never stopped, and one that was after five steps and went on; their weights are the same bits."""

    def both(config: TrainConfig) -> tuple[Trained, Trained]:
        whole = train(replace(config, out=f"{config.out}-whole"))
        with stopped_after(5):
            assert not train(config).finished
        again = train(replace(config, resume=True))
        assert again.finished
        one, other = (load_model(complete_checkpoints(run.folder)[-1]).state_dict() for run in (whole, again))
        for name, tensor in one.items():
            assert other[name].equal(tensor), name
        return whole, again

    return both
