"""How tokens travel to experts on other processes, and their results back.

Flat: one row for every (token, expert) goes straight to the expert's process. Two-hop (DeepSeek-V3, 2412.19437, section 3.2.2): one
row for every (token, node) goes to the process of the same place on that node, which passes one on to every process of its node that
holds one of the token's experts; on the way back each process, then each node, sums what its experts made of a token, so that again one
row crosses between two nodes. Results are those of `model.LocalDispatcher`, summed in another order.

Shapes: N tokens of this process, K experts per token, D model width; S rows that leave, R rows that arrive in one hop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import ParallelConfig
from .team import Team
from .wire import Format, pack, read, row_bytes, unpack

T = TypeVar("T")
NOBODY = -1
"""In place of an expert that another row is for."""


class Courier(Protocol):
    """Carries out exchanges: at once, or while something else is computed (`overlap.Halves`)."""

    def __call__(self, exchange: Callable[[], T]) -> T: ...


def at_once(exchange: Callable[[], T]) -> T:
    return exchange()


@dataclass
class Route:
    """Rows sorted by receiver, and how many go to and come from every process of a group."""

    group: dist.ProcessGroup
    rows: Tensor
    """`[S]`: which row of this process leaves at every place; one may leave several times."""
    sent: list[int]
    received: list[int]

    @classmethod
    def plan(cls, group: dist.ProcessGroup, rows: Tensor, receivers: Tensor) -> Route:
        """The route of local rows `rows [S]` to `receivers [S]` (ascending); tells every receiver how many to expect."""
        sent = torch.bincount(receivers, minlength=dist.get_world_size(group))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return cls(group, rows, sent.tolist(), received.tolist())

    def exchange(self, payload: Tensor, outward: bool) -> Tensor:
        """Bytes `[S, B]` to their receivers, `[R, B]`; or back, if not `outward`."""
        output, source = (self.received, self.sent) if outward else (self.sent, self.received)
        arrived = payload.new_empty(sum(output), payload.shape[1])
        dist.all_to_all_single(arrived, payload, output, source, group=self.group)
        return arrived


class _Travel(torch.autograd.Function):
    """Rows `x` and what belongs to them (`extra`, always exact) go out or back along a route; gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, extra: Tensor, route: Route, outward: bool, formats: tuple[Format, Format], courier: Courier
    ) -> tuple[Tensor, Tensor]:
        ctx.of = route, outward, formats, courier
        return _travel(x, extra, route, outward, formats, courier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_extra: Tensor) -> tuple[Tensor | None, ...]:
        route, outward, formats, courier = ctx.of
        return *_travel(grad, grad_extra, route, not outward, formats, courier), None, None, None, None


def _travel(
    x: Tensor, extra: Tensor, route: Route, outward: bool, formats: tuple[Format, Format], courier: Courier
) -> tuple[Tensor, Tensor]:
    format = formats[0] if outward else formats[1]

    def exchange() -> tuple[Tensor, Tensor]:
        payload = torch.cat([pack(x, format), _bytes(extra)], dim=1)
        arrived = route.exchange(payload, outward)
        size = row_bytes(x.shape[1], format, x.dtype)
        arrived_extra = read(arrived[:, size:], extra.dtype)
        return unpack(arrived[:, :size], format, x.shape[1], x.dtype), arrived_extra

    return courier(exchange)


def _bytes(x: Tensor) -> Tensor:
    """`x [R, C]` as it lies in memory, `[R, bytes]`; R may be 0."""
    return x.contiguous().view(torch.uint8).view(len(x), x.shape[1] * x.element_size())


@dataclass
class Ticket:
    """What `combine` needs to know of a `dispatch`."""

    routes: list[tuple[Route, int]]
    """The hops that were taken, each with the number of rows it started from."""
    rows: Tensor
    """`[P]`: the arrived row behind every expert's row."""
    weights: Tensor
    """`[P]`: its weight."""
    arrived: int


class TravellingDispatcher:
    """Dispatcher (`model.Dispatcher`) of a process that holds `1 / W` of the experts, for the W processes of an expert group.

    `formats` are those outward (tokens to experts, gradients of results) and back (results, gradients of tokens).
    """

    def __init__(self, hops: list[Hop], first: int, held: int, formats: tuple[Format, Format]) -> None:
        """The process holds experts `first` to `first + held`."""
        self.hops, self.formats = hops, formats
        self.courier: Courier = at_once
        self.first, self.held = first, held

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, Ticket]:
        """See `model.Dispatcher`."""
        routes = []
        ids = indices
        for hop in self.hops:
            before = len(x)
            rows, receivers, ids, weights = hop.spread(ids, weights)
            route, ids = self.courier(partial(_announce, hop.group, rows, receivers, ids))
            x, weights = _Travel.apply(x.index_select(0, rows), weights, route, True, self.formats, self.courier)
            routes.append((route, before))
        mine = (ids >= 0).nonzero()
        expert = ids[mine[:, 0], mine[:, 1]].long() - self.first
        order = torch.sort(expert, stable=True).indices
        row, slot = mine[order].unbind(1)
        offsets = torch.bincount(expert, minlength=self.held).cumsum(0).to(torch.int32)
        return x.index_select(0, row), offsets, Ticket(routes, row, weights[row, slot], len(x))

    def combine(self, y: Tensor, ticket: Ticket) -> Tensor:
        """See `model.Dispatcher`; the weights have travelled with the tokens."""
        total = y.new_zeros(ticket.arrived, y.shape[1]).index_add(0, ticket.rows, (y * ticket.weights.unsqueeze(1)).to(y.dtype))
        for route, before in reversed(ticket.routes):
            nothing = total.new_empty(len(total), 0)
            back, _ = _Travel.apply(total, nothing, route, False, self.formats, self.courier)
            total = back.new_zeros(before, back.shape[1]).index_add(0, route.rows, back)
        return total


def _announce(group: dist.ProcessGroup, rows: Tensor, receivers: Tensor, ids: Tensor) -> tuple[Route, Tensor]:
    """Plan a route and send ahead which experts its rows are for."""
    route = Route.plan(group, rows, receivers)
    arrived = route.exchange(_bytes(ids.to(torch.int16)), outward=True)
    return route, read(arrived, torch.int16)


@dataclass(frozen=True)
class Hop:
    """One leg of a token's way: within `group`, whose place `p` leads to experts `e` with `(e // per_place) % places == p`."""

    group: dist.ProcessGroup
    places: int
    per_place: int
    once: bool
    """One row for every (token, place); otherwise for every (token, expert)."""

    def spread(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From experts and weights of every token, `[N, K]` each, what leaves, sorted by receiver.

        Returns rows `[S]`, receivers `[S]`, and of every row the experts it is for (others `NOBODY`) and their weights: `[S, K]`
        where each place gets one, `[S, 1]` otherwise.
        """
        places = torch.where(ids >= 0, ids.long() // self.per_place % self.places, self.places)  # one more: nowhere
        if self.once:
            reached = torch.zeros(len(ids), self.places + 1, dtype=torch.bool, device=ids.device).scatter_(1, places, True)
            receivers, rows = reached[:, : self.places].T.nonzero().unbind(1)
            here = places[rows] == receivers.unsqueeze(1)
            return rows, receivers, ids[rows].where(here, NOBODY), weights[rows] * here
        receivers, order = torch.sort(places.flatten(), stable=True)
        order, receivers = order[receivers < self.places], receivers[receivers < self.places]
        return order // ids.shape[1], receivers, ids.flatten()[order].unsqueeze(1), weights.flatten()[order].unsqueeze(1)


def make_dispatcher(config: ParallelConfig, team: Team, experts: int) -> TravellingDispatcher | None:
    """The dispatcher that `config` asks for; None where every process holds all experts."""
    if team.layout.expert == 1:
        return None
    layout = team.layout
    held = experts // layout.expert
    if config.dispatch == "flat" or layout.nodes == 1:
        hops = [Hop(team.expert_group, layout.expert, held, once=config.dispatch == "two-hop")]
    else:
        hops = [
            Hop(team.group("node"), layout.nodes, held * layout.local, once=True),
            Hop(team.group("local"), layout.local, held, once=True),
        ]
    formats: dict[str, tuple[Format, Format]] = {"exact": ("exact", "exact"), "bf16": ("bf16", "bf16"), "fp8": ("fp8", "bf16")}
    return TravellingDispatcher(hops, team.expert_rank * held, held, formats[config.dispatch_format])
