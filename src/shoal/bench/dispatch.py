"""`shoal bench dispatch`: how tokens travel to experts over slow links, in bytes at the interfaces and seconds of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ..config import BenchDispatchCommand, UserError
from ..plan.communication import reach, simulated_places
from .dispatch_worker import Task, model_of
from .network import Network
from .pictures import new_figure, require_picture, save

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("flat bf16", {"dispatch": "flat", "dispatch_format": "bf16"}),
    ("flat bf16, overlap", {"dispatch": "flat", "dispatch_format": "bf16", "overlap": True}),
    ("two-hop bf16", {"dispatch": "two-hop", "dispatch_format": "bf16"}),
    ("two-hop bf16, overlap", {"dispatch": "two-hop", "dispatch_format": "bf16", "overlap": True}),
    ("two-hop fp8", {"dispatch": "two-hop", "dispatch_format": "fp8"}),
    ("two-hop fp8, overlap", {"dispatch": "two-hop", "dispatch_format": "fp8", "overlap": True}),
]
BASE, BEST = "flat bf16", "two-hop fp8, overlap"
PORT = 29400
KINDS = (("dispatch_bytes", "bytes"), ("router_bytes", "router_bytes"))

Results = dict[str, dict[str, float]]


def run_bench(command: BenchDispatchCommand) -> dict[str, Any]:
    """Measure, print the table and return what the last line says."""
    command.validate()
    picture = None if command.picture is None else Path(command.picture)
    if picture is not None:
        require_picture(picture)
    task = Task(
        hidden=command.hidden, experts=256, expert_width=command.expert_width, layers=command.layers, sequence=command.sequence,
        batch=command.batch, per_node=command.per_node, steps=command.steps, variants=VARIANTS,
    )  # fmt: skip
    with Network(command.nodes) as network:
        mbit = command.link_mbit
        if mbit is None:
            mbit = _rate_for_half(network, task, command.nodes)
            print(f"links of {mbit:.0f} Mbit/s: as busy as the processors in a flat step without overlap", file=sys.stderr)
        network.limit(mbit)
        measured = _measure(network, task, command.nodes)
    expected = predicted(task, command.nodes)
    for name, row in measured.items():
        row["predicted_bytes"], row["predicted_router_bytes"] = expected[name]
    _print_table(measured)
    if picture is not None:
        draw(measured, picture)
    base, best = measured[BASE], measured[BEST]
    return {
        "nodes": command.nodes, "per_node": command.per_node, "link_mbit": mbit,
        "byte_ratio": base["dispatch_bytes"] / best["dispatch_bytes"], "router_byte_ratio": base["router_bytes"] / best["router_bytes"],
        "step_byte_ratio": base["step_bytes"] / best["step_bytes"], "step_ratio": base["step_seconds"] / best["step_seconds"],
        "loss_error": abs(best["loss"] / base["loss"] - 1),
        "variants": measured,
    }  # fmt: skip


def predicted(task: Task, nodes: int) -> dict[str, tuple[float, float]]:
    """Bytes between nodes that the planner expects of one dispatch of all processes, by variant.

    First for choices that are all equally likely, then for those of a router with random scores, which takes groups by their best two
    experts and therefore reaches more of them.
    """
    model, world = model_of(task), nodes * task.per_node
    trip = reach(model, world, task.per_node)
    by_scores = simulated_places(model, nodes, samples=2000) * (nodes - 1) / nodes
    values = task.batch * task.sequence * world * task.hidden
    size = {"bf16": 2.0, "fp8": 1 + 4 / 128}
    copies = {"flat": (trip.per_expert_inter,) * 2, "two-hop": (trip.two_hop_inter, by_scores)}
    found = {}
    for name, way in VARIANTS:
        even, router = (values * size[way["dispatch_format"]] * each for each in copies[way["dispatch"]])
        found[name] = even, router
    return found


def _rate_for_half(network: Network, task: Task, nodes: int) -> float:
    """The rate, in megabits a second, at which the links are busy for as long as a flat step takes without a limit."""
    free = _measure(network, Task(**{**asdict(task), "variants": VARIANTS[:1]}), nodes)[BASE]
    return free["step_bytes"] / nodes * 8 / 1e6 / free["step_seconds"]


def _measure(network: Network, task: Task, nodes: int) -> Results:
    """Run the workers on their nodes. Raises `UserError` with the last words of one that fails."""
    world = nodes * task.per_node
    shared = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(task.per_node), "MASTER_ADDR": network.address(0), "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "shoal.bench.dispatch_worker", json.dumps(asdict(task))]
    workers: list[tuple[subprocess.Popen, IO[str]]] = []
    try:
        for rank in range(world):
            node, local = divmod(rank, task.per_node)
            errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as its process)
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(local)}
            output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            workers.append(
                (subprocess.Popen(network.inside(node, command), env=environment, stdout=output, stderr=errors, text=True), errors)
            )
        said, _ = workers[0][0].communicate()
        if not said:
            workers[0][1].seek(0)
            words = workers[0][1].read().strip().splitlines()
            raise UserError(f"a process of the benchmark failed: {words[-1] if words else 'it was killed'}")
        return json.loads(said.splitlines()[-1])
    finally:
        for process, complaints in workers:
            process.kill()
            process.wait()
            complaints.close()


def _print_table(measured: Results) -> None:
    print("MB between nodes in one dispatch, measured and (predicted): choices all equally likely; choices of the untrained router\n")
    print(f"{'':<22} {'even choices':>17} {'router':>17} {'step, s':>9} {'exposed, s':>11} {'loss':>9}")
    for name, row in measured.items():
        pairs = (f"{row[kind] / 1e6:.2f} ({row[f'predicted_{short}'] / 1e6:.2f})" for kind, short in KINDS)
        bytes_ = " ".join(f"{pair:>17}" for pair in pairs)
        print(f"{name:<22} {bytes_} {row['step_seconds']:>9.3f} {row['exposed_seconds']:>11.3f} {row['loss']:>9.5f}")


def draw(measured: Results, path: Path) -> None:
    """Bytes of a dispatch and seconds of a step, variant by variant. Raises `UserError` where the picture cannot be written."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    names = list(measured)
    left.barh(names, [measured[name]["dispatch_bytes"] / 1e6 for name in names], color="#35a7c9")
    left.set_xlabel("MB between nodes in one dispatch")
    exposed = [measured[name]["exposed_seconds"] for name in names]
    right.barh(names, [measured[name]["step_seconds"] for name in names], color="#35a7c9", label="step")
    right.barh(names, exposed, color="#e2734f", label="of it, waiting for tokens")
    right.set_xlabel("seconds")
    right.set_yticklabels([])
    right.legend()
    for axes in (left, right):
        axes.invert_yaxis()
    save(figure, path)
