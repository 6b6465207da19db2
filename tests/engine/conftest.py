"""The models and runners that the engine's tests are put through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from packed_weights import packed
from small_models import KINDS, make_model

from shoal.engine import Runner, TorchRunner
from shoal.engine.native import NativeRunner
from shoal.kernels.selection import BACKEND
from shoal.model import Transformer
from shoal.runtime import Machine

MakeRunner = Callable[[Transformer], Runner]


def torch_runner(model: Transformer) -> Runner:
    return TorchRunner(model, Machine(torch.device("cpu"), "fp32", 1, 1.0, "test"))


def native_runner(model: Transformer) -> Runner:
    return NativeRunner(model.config, packed(model), threads=1)


RUNNERS: dict[str, MakeRunner] = {"torch": torch_runner} | ({"native": native_runner} if BACKEND.cpu else {})


@pytest.fixture(params=sorted(KINDS), scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    return make_model(request.param)


@pytest.fixture(scope="module")
def v3() -> Transformer:
    return make_model("v3")


@pytest.fixture(params=sorted(RUNNERS))
def make_runner(request: pytest.FixtureRequest) -> MakeRunner:
    return RUNNERS[request.param]
