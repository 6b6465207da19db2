"""The processes of `shoal bench dispatch`, without the network that it limits."""

from __future__ import annotations

from pathlib import Path

from processes import in_processes

from shoal.bench import dispatch_worker
from shoal.bench.dispatch import VARIANTS
from shoal.bench.dispatch_worker import Bench, Task, settings
from shoal.parallel import join


def measured(task: Task, sent: Path) -> dict[str, dict[str, float]]:
    dispatch_worker.SENT = sent
    config = settings(task, 2)
    team = join(config)
    bench = Bench(task, config, team)
    results = {name: bench.measure(changes) for name, changes in task.variants}
    team.leave()
    return results


def test_every_way_to_travel_takes_a_training_step(tmp_path: Path) -> None:
    (tmp_path / "tx_bytes").write_text("0\n")
    task = Task(hidden=32, experts=16, expert_width=32, layers=1, sequence=16, batch=2, per_node=1, steps=1, variants=VARIANTS)
    results = in_processes(2, measured, task, tmp_path / "tx_bytes")[0]
    assert list(results) == [name for name, _ in VARIANTS]
    losses = [row["loss"] for row in results.values()]
    assert max(losses) - min(losses) < 0.01 < min(losses)
