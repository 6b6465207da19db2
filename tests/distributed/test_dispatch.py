"""Tokens reach their experts and come back as if all experts were in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor

from shoal.config import ParallelConfig
from shoal.model import LocalDispatcher
from shoal.parallel import Halves, Team, make_dispatcher
from shoal.parallel.layout import Layout
from shoal.parallel.team import team_of

EXPERTS, CHOSEN, WIDTH = 16, 5, 160
ROUNDING = {"exact": 1e-6, "bf16": 2**-7, "fp8": 2**-3.5}


def through(dispatcher: Any, x: Tensor, indices: Tensor, weights: Tensor, matrices: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Result and gradients (of tokens, weights and experts) where expert e multiplies channels with `matrices[e]`."""
    x, weights, matrices = (t.clone().requires_grad_() for t in (x, weights, matrices))
    rows, offsets, ticket = dispatcher.dispatch(x, indices, weights, EXPERTS)
    expert = torch.arange(len(matrices)).repeat_interleave(offsets.diff(prepend=offsets.new_zeros(1)).long())
    out = dispatcher.combine(rows * matrices[expert], ticket)
    out.backward(cotangent)
    return [out.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in (x, weights, matrices))]


def deviations(count: int, per_node: int, dispatch: str, format: str, overlap: bool) -> list[float]:
    """Over some random batches, uneven and empty ones too: the largest relative error of results and gradients."""
    torch.distributed.init_process_group("gloo")
    team = team_of(Layout(count, 1, count, per_node))
    dispatcher = make_dispatcher(ParallelConfig(expert=count, dispatch=dispatch, dispatch_format=format), team, EXPERTS)  # type: ignore[arg-type]
    assert dispatcher is not None
    if overlap:
        dispatcher.courier = Halves()
    worst = [0.0] * 4
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(0, 40, (count,), generator=generator).tolist()
        x, cotangent = (torch.randn(sum(sizes), WIDTH, generator=generator) for _ in range(2))
        indices = torch.rand(sum(sizes), EXPERTS, generator=generator).topk(CHOSEN).indices
        weights, matrices = torch.rand(sum(sizes), CHOSEN, generator=generator), torch.randn(EXPERTS, WIDTH, generator=generator)
        expected = through(LocalDispatcher(), x, indices, weights, matrices, cotangent)
        mine = slice(sum(sizes[: team.rank]), sum(sizes[: team.rank + 1]))
        held = slice(team.rank * EXPERTS // count, (team.rank + 1) * EXPERTS // count)
        got = through(dispatcher, x[mine], indices[mine], weights[mine], matrices[held], cotangent[mine])
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            other = other[held if i == 3 else mine]
            worst[i] = max(worst[i], float((one - other).norm() / other.norm().clamp_min(1e-9)))
        _check_rows(dispatcher, team, x[mine], indices[mine], weights[mine], dispatch)
    team.leave()
    return worst


def _check_rows(dispatcher: Any, team: Team, x: Tensor, indices: Tensor, weights: Tensor, dispatch: str) -> None:
    """A token crosses to each node once, and flat dispatch sends it once for every expert."""
    with torch.no_grad():
        _, _, ticket = dispatcher.dispatch(x, indices, weights, EXPERTS)
    first = sum(ticket.routes[0][0].sent)
    if dispatch == "flat":
        assert first == indices.numel()
    else:
        places = team.layout.nodes if team.layout.nodes > 1 else team.layout.expert
        reached = indices // (EXPERTS // places)
        assert first == sum(len(set(row)) for row in reached.tolist())


@pytest.mark.parametrize(("dispatch", "format"), [("flat", "exact"), ("two-hop", "exact"), ("two-hop", "bf16"), ("two-hop", "fp8")])
def test_two_processes_dispatch_as_one(dispatch: str, format: str) -> None:
    for worst in in_processes(2, deviations, 2, 2, dispatch, format, False):
        assert max(worst) < ROUNDING[format], worst


@pytest.mark.slow
@pytest.mark.parametrize(("count", "per_node"), [(4, 2), (8, 2), (8, 4)])
@pytest.mark.parametrize("format", ["exact", "bf16", "fp8"])
def test_nodes_dispatch_as_one_process(count: int, per_node: int, format: str) -> None:
    for worst in in_processes(count, deviations, count, per_node, "two-hop", format, False):
        assert max(worst) < ROUNDING[format], worst
