"""One process of `shoal bench dispatch`: python -m shoal.bench.dispatch_worker JSON; the first one prints a JSON line.

Parameters that are not experts are held by every process, and their gradients are summed between steps, outside of what is timed:
that traffic is the same for all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from ..config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from ..model import Transformer, init_weights
from ..parallel import Team, TravellingDispatcher, divide, join, make_dispatcher
from ..runtime import Machine
from ..train.optimizer import Optimizers
from ..train.passes import HalvedPasses, PlainPasses

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
"""What the node's interface has sent, headers included."""
SEED = 0


@dataclass
class Task:
    """What all processes of the benchmark do."""

    hidden: int
    experts: int
    expert_width: int
    layers: int
    sequence: int
    batch: int
    """Sequences of a process in a step."""
    per_node: int
    steps: int
    variants: list[tuple[str, dict[str, Any]]]
    """Names, and what each changes in the layout."""


def model_of(task: Task) -> ModelConfig:
    """V3's routing (256 experts in 8 groups, 8 experts from at most 4 of them) in a model of few layers."""
    return ModelConfig(
        vocab_size=256, hidden_size=task.hidden, num_hidden_layers=task.layers, intermediate_size=64, num_attention_heads=4,
        max_position_embeddings=max(task.sequence, 64), kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=task.experts, num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=task.expert_width,
        first_k_dense_replace=0, n_group=8, topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
        routed_scaling_factor=2.5, num_nextn_predict_layers=0,
    )  # fmt: skip


def settings(task: Task, world: int) -> TrainConfig:
    """Of all processes: each holds its share of the experts, and all of the rest."""
    layout = ParallelConfig(expert=world, dense="replicate", per_node=task.per_node)
    return TrainConfig(
        steps=1, model=model_of(task), batch_size=task.batch * world, sequence_length=task.sequence, device="cpu", parallel=layout
    )


class Bench:
    """The model, and ways for its tokens to travel."""

    def __init__(self, task: Task, config: TrainConfig, team: Team) -> None:
        self.task, self.team, self.config = task, team, config
        self.model = Transformer(config.model, dispatcher=make_dispatcher(config.parallel, team, task.experts))
        init_weights(self.model, SEED)
        self.shards = divide(self.model, config.parallel, team)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.machine = Machine(torch.device("cpu"), "fp32", 1, 1.0, "")

    def measure(self, changes: dict[str, Any]) -> dict[str, float]:
        """Of one variant: bytes of a dispatch over all links, seconds of a step and of waiting in it, and the mean loss of all steps."""
        self.model.load_state_dict(self.start)
        layout = ParallelConfig(**{**vars(self.config.parallel), **changes})
        dispatcher = make_dispatcher(layout, self.team, self.task.experts)
        assert dispatcher is not None
        for moe in self.model.moe_layers:
            moe.dispatcher = dispatcher
        state = cast(
            Any, SimpleNamespace(config=self.config, model=self.model, team=self.team, shards=self.shards, teacher=None, sampler=None)
        )
        passes = (HalvedPasses if layout.overlap else PlainPasses)(state, self.machine)
        optimizers = Optimizers(self.model, OptimizerConfig(name="adamw", adam_eps=1e-8), self.shards)
        bytes_of = {"dispatch_bytes": self._dispatch_bytes(dispatcher, even=True)}
        bytes_of["router_bytes"] = self._dispatch_bytes(dispatcher, even=False)
        generator = torch.Generator().manual_seed(SEED + 1)
        seconds, waited, sent, losses = [], [], [], []
        optimizers.set_rates(0.25)
        for _ in range(self.task.steps + 1):  # the first one warms up
            shape = (self.team.layout.world * self.task.batch, self.task.sequence + 1)
            batch = torch.randint(self.config.model.vocab_size, shape, generator=generator)
            batch[:, 1::2] = batch[:, :-1:2]  # something to learn: every second token repeats the one before
            before = self._sent()
            began = time.perf_counter()
            figures, _ = passes(batch.chunk(self.team.layout.world)[self.team.rank], 0.0)
            dist.barrier()
            seconds.append(time.perf_counter() - began)
            waited.append(passes.halves.exposed_seconds)
            sent.append(self._sent() - before)
            losses.append(float(self.team.sum(figures)[1] / self.team.layout.world))
            self.shards.collect_gradients()
            optimizers.step()
            optimizers.zero_grad()
            self.shards.forget_gradients()
        share = self.team.sum(torch.tensor(waited, dtype=torch.float64)) / self.team.layout.world
        median = sorted(range(1, len(seconds)), key=seconds.__getitem__)[(len(seconds) - 1) // 2]
        return {
            **bytes_of, "step_bytes": sent[-1], "step_seconds": seconds[median],
            "exposed_seconds": share[median].item(), "loss": sum(losses) / len(losses),
        }  # fmt: skip

    def _dispatch_bytes(self, dispatcher: TravellingDispatcher, even: bool) -> float:
        """What the links carry when tokens go to their experts once, without their way back.

        `even`: every choice that the limit to groups admits is equally likely; otherwise the router, not yet trained, chooses.
        """
        count, config = self.task.batch * self.task.sequence, self.config.model
        generator = torch.Generator().manual_seed(self.team.rank)
        x = torch.randn(count, self.task.hidden, generator=generator)
        with torch.no_grad():
            weights, indices, _ = self.model.moe_layers[0].gate(x)
            if even:
                groups = torch.rand(count, config.n_group, generator=generator).topk(config.topk_group).indices
                is_open = torch.zeros(count, config.n_group).scatter_(1, groups, 1.0)
                draw = torch.rand(count, self.task.experts, generator=generator)
                indices = (
                    (draw + is_open.repeat_interleave(self.task.experts // config.n_group, 1)).topk(config.num_experts_per_tok).indices
                )
            before = self._sent()
            dispatcher.dispatch(x, indices, weights, self.task.experts)
            return self._sent() - before

    def _sent(self) -> float:
        """Sum over nodes of what their interfaces have sent, once all processes are here."""
        dist.barrier()
        mine = int(SENT.read_text()) if self.team.rank % self.task.per_node == 0 else 0
        total = self.team.sum(torch.tensor(mine, dtype=torch.float64)).item()
        dist.barrier()
        return total


def main(description: str) -> None:
    task = Task(**json.loads(description))
    torch.set_num_threads(1)
    config = settings(task, int(os.environ["WORLD_SIZE"]))
    team = join(config)
    bench = Bench(task, config, team)
    results = {name: bench.measure(changes) for name, changes in task.variants}
    if team.is_first:
        print(json.dumps(results), flush=True)
    team.leave()


if __name__ == "__main__":
    main(sys.argv[1])
