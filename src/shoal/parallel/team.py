"""One process among those of a run: its place, and what it says to and hears from the others."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import TrainConfig, UserError
from ..runtime import Machine, available_cores
from .launch import follow_parent
from .layout import Layout, layout_of

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)
"""A process that waits so long for the others gives up. One that dies is noticed at once: its connections close."""
POLL_SECONDS = 0.2
"""How often a process looks whether the first one has called it, or is done with what is its own to do."""
_RUN, _MEETING = "shoal run", "shoal meeting"


@dataclass(frozen=True)
class Team:
    """The processes of a run as one of them sees them; `Team()` is a process by itself, whose calls cost nothing."""

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    mesh: DeviceMesh | None = None
    """Dimensions pipeline, replica, node, local; None for a process by itself."""
    ends: dist.ProcessGroup | None = None
    """First and last process of a pipeline, in these two."""
    store: dist.Store | None = None
    """Of the launch that these processes belong to: it outlives those that torchrun starts again."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.mesh is None

    @property
    def stage(self) -> int:
        """Place in the pipeline."""
        return self.rank // self.layout.data

    @property
    def data_rank(self) -> int:
        """Which share of a batch this process reads."""
        return self.rank % self.layout.data

    @property
    def expert_rank(self) -> int:
        """Which share of the experts this process holds."""
        return self.rank % self.layout.expert

    def submesh(self, *names: str) -> DeviceMesh:
        """The mesh of neighbours along the named dimensions, flattened to one."""
        assert self.mesh is not None
        return self.mesh[names]._flatten("_".join(names)) if len(names) > 1 else self.mesh[names[0]]

    def group(self, *names: str) -> dist.ProcessGroup:
        """The processes that differ from this one along the named dimensions only."""
        return self.submesh(*names).get_group()

    @property
    def data_mesh(self) -> DeviceMesh:
        return self.submesh("replica", "node", "local")

    @property
    def expert_group(self) -> dist.ProcessGroup:
        return self.group("node", "local")

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over all processes; itself for a process by itself."""
        if self.is_alone:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def agree(self, value: T) -> T:
        """What the first process says."""
        if self.is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def decide(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, the only one to do it."""
        if self.is_alone:
            return work()
        box = [work() if self.is_first else None]
        dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def any(self, value: bool) -> bool:
        """Whether any process says yes."""
        return value if self.is_alone else bool(self.sum(torch.tensor(float(value))) > 0)

    def union(self, names: Iterable[str]) -> list[str]:
        """What any process names, sorted."""
        everyone: list[set[str]] = [set(names)] * self.layout.world
        if not self.is_alone:
            dist.all_gather_object(everyone, everyone[self.rank])
        return sorted(set().union(*everyone))

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Let the first process do `work`, however long that takes, before the others, who then find its results on disk."""
        if self.is_alone:
            return work()
        assert self.store is not None
        done = f"shoal done {self.agree(uuid.uuid4().hex)}"
        if self.is_first:
            result = work()
            self.store.set(done, "")
            return result
        while not self.store.check([done]):
            time.sleep(POLL_SECONDS)
        return work()

    def agree_on_time(self, seconds: float) -> float:
        """The first process's clock."""
        return self.sum(torch.tensor(seconds if self.is_first else 0.0, dtype=torch.float64)).item()

    def same_precision(self, machine: Machine) -> Machine:
        """`machine` in the precision that the first process chose."""
        return replace(machine, precision=self.agree(machine.precision))

    @property
    def cores(self) -> int:
        """Of this machine, for each of its processes; 0 (all) for a process by itself."""
        return 0 if self.is_alone else max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", self.layout.world)))

    def remember_run(self, folder: str) -> None:
        """Tell those that torchrun may start in place of these processes which run to go on with."""
        if self.store is not None:
            self.store.set(_RUN, folder)

    def remembered_run(self) -> str | None:
        """The folder of the run that earlier processes of this launch were at; None before they got to it."""
        if self.store is None or not self.store.check([_RUN]):
            return None
        return self.store.get(_RUN).decode()

    def leave(self) -> None:
        """Part from the others once all are here."""
        if not self.is_alone:
            dist.barrier()
            dist.destroy_process_group()


def is_member() -> bool:
    """Whether this process was started as one of several (by torchrun, or by `shoal train --nproc`)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(config: TrainConfig) -> Team:
    """Find the other processes of this run. Raises `UserError` for a layout that cannot work, before anyone waits for anyone."""
    if not is_member():
        layout_of(config, 1)
        return Team(store=_store_of_launch(0) if _agent_has_store() else None)
    follow_parent()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE makes this one of {os.environ['WORLD_SIZE']} processes, but {missing[0]} is not set: start them with torchrun or "
            "--nproc, or unset WORLD_SIZE"
        )
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    layout = layout_of(config, world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        store = _store_of_launch(rank)
        place = dist.PrefixStore(_meet(store, rank, world), store)
        dist.init_process_group(backend, store=place, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {rank} cannot reach the others ({error}): check MASTER_ADDR and MASTER_PORT") from None
    return team_of(layout, "cuda" if on_gpu else "cpu", store)


def _agent_has_store() -> bool:
    """Whether who started this process has a store for it, which outlives processes that are started again."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store_of_launch(rank: int) -> dist.Store:
    """The store of all processes of a launch; without an agent that has one it lies in the first of them."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*place, is_master=rank == 0 and not _agent_has_store(), wait_for_workers=False, timeout=TIMEOUT)


def _meet(store: dist.Store, rank: int, world: int) -> str:
    """A name that these `world` processes have in common, and no others that were here before them.

    `store` may be full of what dead processes of the same ranks wrote, and every node counts its restarts for itself. So the first process
    invites, and each of the others answers the latest invitation with a name of its own, until the first has called that name: there may be
    old invitations, but no old answers to a new one.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set(_MEETING, mine)
        names = [store.get(f"{_MEETING} {mine} {other}").decode() for other in range(1, world)]
        for name in names:
            store.set(f"{_MEETING} {name}", mine)
        return mine
    called = f"{_MEETING} {mine}"
    while not store.check([called]):
        invitation = store.get(_MEETING).decode()
        store.set(f"{_MEETING} {invitation} {rank}", mine)
        time.sleep(POLL_SECONDS)
    return store.get(called).decode()


def team_of(layout: Layout, device: str = "cpu", store: dist.Store | None = None) -> Team:
    """The team of an initialised default process group."""
    shape = (layout.pipeline, layout.replica, layout.nodes, layout.local)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("pipeline", "replica", "node", "local"))
    ends = None
    if layout.pipeline > 1:
        last = (layout.pipeline - 1) * layout.data
        ends, _ = dist.new_subgroups_by_enumeration([[place, last + place] for place in range(layout.data)])
    return Team(layout, dist.get_rank(), mesh, ends, store)
