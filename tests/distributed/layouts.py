"""Small models, and what a layout makes of them: losses of every step and gradients of the first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from processes import in_processes
from torch import Tensor

from shoal.config import (
    BalanceConfig,
    CheckpointConfig,
    CorpusConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from shoal.model import Transformer, init_weights
from shoal.model.moe import Router
from shoal.parallel import divide, join, make_dispatcher
from shoal.runtime import Machine
from shoal.train import train
from shoal.train.passes import make_passes

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 2,
    "max_position_embeddings": 64, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "n_group": 4, "topk_group": 2, "zero_init_output": False,
}  # fmt: skip
STYLES: dict[str, dict[str, Any]] = {
    "v2": {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "q_lora_rank": 24, "routed_scaling_factor": 2.5},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon"},
    "split": {"name": "muon", "muon_split": True},
    "adamw": {"name": "adamw"},
}
SEEDS = {("v2", "muon"): 54, ("v2", "adamw"): 38, ("v3", "muon"): 7, ("v3", "split"): 47, ("v3", "adamw"): 12}
"""Of runs in which one process chooses no expert by a hair (`MARGIN`).

Sums in another order move scores by up to 2e-7. Where two scores are closer than that, a token may go to another expert, with which losses
part by more than rounding errors: such a run says nothing about a layout. Seeds were found by runs of one process.
"""
MARGIN = 3e-7
"""By which the scores that decide a choice must differ in a run that others are compared with."""
MACHINE = Machine(torch.device("cpu"), "fp32", 1, 1e9, "")


def settings(workshop: Path, out: Path, *, style: str = "v3", optimizer: str = "muon", steps: int = 20, **changes: Any) -> TrainConfig:
    """A run of a small model; `changes` that are settings of a layout go there, others to the run."""
    changes.setdefault("seed", SEEDS[style, optimizer])
    layout = {name: changes.pop(name) for name in list(changes) if name in ParallelConfig.__dataclass_fields__}
    rates = OptimizerConfig(**OPTIMIZERS[optimizer], muon_lr=0.01, adam_lr=0.002, embed_lr=0.005, head_lr=0.002)
    return TrainConfig(**{
        "data": (str(workshop / "text.txt"),), "corpus": CorpusConfig(cache=str(workshop / "cache")), "out": str(out), "steps": steps,
        "sequence_length": 24, "batch_size": 16, "eval_every_minutes": 0, "eval_tokens": 512, "precision": "fp32", "device": "cpu",
        "threads": 1, "model": ModelConfig(**SMALL, **STYLES[style]), "optimizer": rates, "balance": BalanceConfig(0.001, 1e-3),
        "schedule": ScheduleConfig(extension=0.2), "checkpoint": CheckpointConfig(every_minutes=0), "parallel": ParallelConfig(**layout),
        **changes,
    })  # fmt: skip


@dataclass
class Learned:
    rows: list[dict[str, Any]]
    """Of every step, in `metrics.jsonl`."""
    gradients: dict[str, Tensor]
    """Of the first step, whole."""
    margin: float = float("inf")
    """The closest choice of experts, where one process learns."""

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def learn(config: TrainConfig, processes: int = 1) -> Learned:
    """What this process learns, or several."""
    if processes == 1:
        with closest_choice() as margins:
            rows = training(config)
        return Learned(rows, first_gradients(config), min(margins))
    return Learned(in_processes(processes, training, config)[0], in_processes(processes, first_gradients, config)[0])


@contextmanager
def closest_choice() -> Iterator[list[float]]:
    """Collects, of every choice of experts in training, by how much the scores that decide it differ."""
    margins: list[float] = []
    choose = Router.choose

    def watch(router: Router, scores: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            margins.append(margin(router, scores))
        return choose(router, scores)

    with mock.patch.object(Router, "choose", watch):
        yield margins


def margin(router: Router, scores: Tensor) -> float:
    """Over tokens: the smallest difference between the last group or expert that is taken and the first that is not; `scores [..., E]`."""
    config, by_best_two = router.config, router.config.topk_method == "noaux_tc"
    grouped = (scores + router.e_score_correction_bias if by_best_two else scores).unflatten(-1, (config.n_group, -1))
    of_groups = grouped.topk(2).values.sum(-1) if by_best_two else grouped.amax(-1)
    groups = of_groups.topk(config.topk_group + 1)
    inside = groups.indices[..., :-1, None].expand(*groups.indices.shape[:-1], -1, grouped.shape[-1])
    experts = grouped.gather(-2, inside).flatten(-2).topk(config.num_experts_per_tok + 1).values
    return min(float((best[..., -2] - best[..., -1]).min()) for best in (groups.values, experts))


def training(config: TrainConfig) -> list[dict[str, Any]]:
    """The rows of every step of a run, in the process that reports."""
    trained = train(config)
    lines = (trained.folder / "metrics.jsonl").read_text().splitlines() if trained.reports else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def first_gradients(config: TrainConfig) -> dict[str, Tensor]:
    """Gradients of a batch of random tokens, gathered in the first process."""
    team = join(config)
    model = Transformer(config.model, dispatcher=make_dispatcher(config.parallel, team, config.model.n_routed_experts or 0))
    init_weights(model, 1)
    shards = divide(model, config.parallel, team)
    state = SimpleNamespace(config=config, model=model, team=team, shards=shards, teacher=None, sampler=None)
    passes = make_passes(cast(Any, state), MACHINE)
    generator = torch.Generator().manual_seed(2)
    length = config.sequence_length + 1 + config.model.num_nextn_predict_layers
    batch = torch.randint(config.model.vocab_size, (config.batch_size, length), generator=generator)
    passes(batch.chunk(team.layout.data)[team.data_rank], 0.3)
    shards.collect_gradients()
    gathered = shards.gather({p.name: p.local.grad for p in shards.pieces if p.local.grad is not None})
    team.leave()
    return {name: tensor.clone() for name, tensor in gathered.items()}
