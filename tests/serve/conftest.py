"""Servers of the tiny model that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Serve, Served, from_files, serving, tiny, write_model

from shoal.config import EngineOptions
from shoal.data import Tokenizer
from shoal.data.tokenizer import train_tokenizer

WORDS = "the red fish swims over a blue reef and looks for something to eat {}[]:,0123456789 get_weather city Paris été 😀"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS + f' {{"city": "Paris", "days": {i}}}\n' for i in range(20)], 400)


@pytest.fixture(scope="session")
def serve(tokenizer: Tokenizer) -> Serve:
    """Start servers of the tiny model with some options."""
    return lambda wait=True, **options: serving(lambda: tiny(tokenizer), wait, **options)


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as files, with a longer context."""
    return write_model(tmp_path_factory.mktemp("served") / "tiny", tokenizer, max_position_embeddings=8192)


@pytest.fixture(scope="module", params=["torch", "native"])
def base(tokenizer: Tokenizer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Of a base model, run by plain torch and by the C++ kernels."""
    loads = lambda: tiny(tokenizer)  # noqa: E731
    if request.param == "native":
        pytest.importorskip("shoal.kernels._cpu")
        place = write_model(tmp_path_factory.mktemp("base") / "tiny", tokenizer)
        loads = lambda: from_files(place)  # noqa: E731
    with serving(loads, engine=EngineOptions(max_running=8)) as served:
        yield served
        assert served.is_idle()


@pytest.fixture(scope="module", params=["v3.1"])
def chat(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Served]:
    """Of a model that speaks DeepSeek-V3.1's dialect."""
    with serve(chat_template=request.param) as served:
        yield served
        assert served.is_idle()
