"""Options of `shoal plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import UserError
from .assumptions import Assumptions

_COUNTS = {
    "sequence_length": 10**9, "devices": 10**6, "nodes": 10**6, "batch": 10**8, "pipeline": 10**6, "expert": 10**6, "chunks": 1000,
    "micro_batch": 10**6, "context": 10**9, "serve_batch": 10**6,
}  # fmt: skip
"""Options that count something, and what is surely a slip of the finger."""
_MOST_TOKENS = 1e18
_PICTURES = (".png", ".svg", ".pdf")


@dataclass
class PlanCommand:
    """What a model costs to train and to serve, by arithmetic and simulation."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """Built-in name (deepseek-v3, deepseek-v2, deepseek-v2-lite, llama-3.1-8b, -70b, -405b, qwen2.5-72b), config.json, or a folder
    with one (checkpoint or run). Not needed with --here."""
    machine: str | None = None
    """h100, h800, h200, a100, rtx4090, rtx5090, mi300x, cpu, or a TOML file with the fields of a machine."""
    here: bool = False
    """Measure this machine and plan for it; without a model, say which ones it can serve."""
    check: bool = False
    """With --here: train and decode for some seconds and compare with the prediction."""
    sequence_length: int | None = None
    """Of training and prefill. Default: 4096, or what the model sees if that is less."""
    json: bool = False
    """End stdout with one JSON object."""
    markdown: str | None = None
    """Write the tables as Markdown to this file ("-": print them instead of the terminal's tables)."""
    chart: str | None = None
    """Draw memory, step time and cost of the training plan into this file (.png, .svg, .pdf)."""
    timeline: str | None = None
    """Draw the pipeline's timeline into this file."""

    train: bool = False
    """Plan training. Also asked for by --published, --search, --batch, --chart, --timeline, and by options of the layout, --pipeline to
    --moment-bytes."""
    published: bool = False
    """Use the machine, layout and batch that the model was published with (deepseek-v3)."""
    search: bool = False
    """Look for the fastest layout that fits on --devices; what is given of it stays."""
    devices: int | None = None
    """Of the machine. Default: 1, or as many as the model was published with."""
    nodes: int | None = None
    """Instead of --devices: whole nodes of the machine."""
    batch: int | None = None
    """Sequences per optimizer step. Default: 8 micro-batches per pipeline stage and data-parallel rank."""
    tokens: float = 1e12
    """Length of the training run that hours and cost are for."""
    pipeline: int | None = None
    """Stages that the layers are divided into."""
    expert: int | None = None
    """Devices that a layer's experts are divided among."""
    schedule: Literal["1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"] | None = None
    """Of the pipeline."""
    chunks: int | None = None
    """Stages per device of the interleaved schedule."""
    micro_batch: int | None = None
    """Sequences of one forward pass."""
    recompute: Literal["none", "selective", "full"] | None = None
    """What the backward pass computes again: nothing, what is cheap for its size, or whole layers."""
    zero: Literal[0, 1, 3] | None = None
    """What data-parallel ranks share: 0 nothing, 1 optimizer states, 3 weights and gradients too (FSDP)."""
    precision: Literal["fp32", "bf16", "fp8"] | None = None
    """Of products."""
    optimizer: Literal["adamw", "muon"] | None = None
    """For hidden matrices."""
    moment_bytes: Literal[2, 4] | None = None
    """Bytes of each of an optimizer's moments."""
    flat: bool = False
    """Send a token to every expert rank by itself instead of once per node."""

    serve: bool = False
    """Plan serving on --devices of the machine."""
    context: int | None = None
    """Tokens of a sequence that is served. Default: as for --sequence-length."""
    cache: Literal["bf16", "fp8"] = "bf16"
    """Number format of cached tokens."""
    serve_batch: int | None = None
    """Sequences decoded together. Default: what fits, at most 128."""

    expert_load: str | None = None
    """Place experts on --devices by their measured load: a file with what a server's /metrics said, or the folder of a run."""
    redundant_experts: int = 0
    """Second (third, ...) copies of busy experts in every layer, for --expert-load."""

    intra_node_gb_s: float | None = None
    """Override the machine's link inside a node."""
    inter_node_gb_s: float | None = None
    """Override its link between nodes, of one device."""
    price_per_hour: float | None = None
    """Override what a device costs an hour, in dollars."""
    assume: Assumptions = field(default_factory=Assumptions)

    def validate(self) -> None:
        """Raise `UserError` on the first option that makes no sense by itself."""
        for name, limit in _COUNTS.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must lie between 1 and {limit:,}")
        if not 0 <= self.redundant_experts <= _COUNTS["expert"]:
            raise UserError(f"--redundant-experts is {self.redundant_experts}: it must lie between 0 and {_COUNTS['expert']:,}")
        if not 1 <= self.tokens <= _MOST_TOKENS:
            raise UserError(f"--tokens is {self.tokens:g}: it must lie between 1 and {_MOST_TOKENS:g}")
        for name in ("intra_node_gb_s", "inter_node_gb_s", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {value:g}: it must be 0 or more")
        for name in ("chart", "timeline"):
            value = getattr(self, name)
            if value is not None and Path(value).suffix not in _PICTURES:
                raise UserError(f"--{name} {value}: its name must end in one of {', '.join(_PICTURES)}")
        self.assume.validate()
