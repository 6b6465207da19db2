"""Which parameter is trained by which optimizer, at which rate."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelConfig, OptimizerConfig
from ..model import Transformer
from ..model.convolution import ShortConvolution
from ..model.layers import TokenTable
from ..model.ngrams import Ngrams
from ..model.repeats import Repeats
from ..parallel import Piece, Shards, SplitMatrices
from ..runtime import DTYPES
from .adamw import SmallAdamW
from .moments import Moments
from .muon import Muon
from .one_by_one import OneByOne
from .table_adam import TableAdam
from .uncompiled import AdamW

MOST_READINGS = 30.0
"""So many times the usual decay is the most that a text calls for that is read again and again (Kim et al., 2509.14786)."""


class Optimizers:
    """Muon for hidden matrices, AdamW for embedding, head, router and norms, `TableAdam` for n-grams, driven as one."""

    def __init__(
        self,
        model: Transformer,
        config: OptimizerConfig,
        shards: Shards | None = None,
        offload: Path | None = None,
        one_by_one: bool = False,
    ) -> None:
        """For what this process holds of the model: `shards`, or all of it.

        With `offload`, experts' moments lie in a file in that folder; `one_by_one`: each parameter can be updated by itself.
        """
        shards = shards or Shards.whole(model)
        pieces = [[shards.of(p) for p in part] for part in _partition(model)]
        self.names = {id(piece.local): piece.name for part in pieces for piece in part}
        # Of a matrix that is cut, processes without rows help to orthogonalise the others'.
        muon = [piece.local for piece in pieces[0] if piece.local.numel() or piece.is_split_matrix]
        hidden, embed, head, small, tables = ([piece.local for piece in part if piece.local.numel()] for part in pieces)
        groups = [
            {"params": embed, "lr": config.embed_lr, "weight_decay": config.embed_decay},
            {"params": head, "lr": config.head_lr, "weight_decay": config.head_decay},
            {"params": small, "lr": config.adam_lr, "weight_decay": 0.0},
        ]
        experts = [p for p in hidden if p.ndim == 3] if offload else []
        self.moments = moments = Moments(DTYPES[config.moments], experts, offload)
        self.all: list[Muon | OneByOne | AdamW] = []
        if config.name == "muon":
            split = _split_matrices(pieces[0], shards)
            blocks = _blocks(pieces[0], model.config) if config.muon_split else None
            rates = (config.muon_lr, config.muon_momentum, config.muon_steps, config.weight_decay)
            self.all.append(Muon(muon, *rates, split, moments, blocks))
        else:
            groups.append({"params": hidden, "lr": config.adam_lr, "weight_decay": config.weight_decay})
        groups = [group for group in groups if group["params"]]
        if config.moments == "fp32" and not one_by_one and not offload:
            self.all.append(AdamW(groups, betas=config.adam_betas, eps=config.adam_eps, fused=True))
        else:
            self.all.append(SmallAdamW(groups, config.adam_betas, config.adam_eps, moments))
        if tables:
            self.all.append(TableAdam(tables, config.embed_lr, config.adam_betas[1], config.adam_eps))
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        # Beside the groups, which a checkpoint replaces by its own: older ones do not say what decays began with.
        self._decays = [[group.get("weight_decay", 0.0) for group in optimizer.param_groups] for optimizer in self.all]

    def set_rates(self, share: float, decay: float = 1.0) -> None:
        """`share` of every peak learning rate and `decay` times every weight decay, from now on."""
        for optimizer, decays in zip(self.all, self._decays, strict=True):
            for group, own in zip(optimizer.param_groups, decays, strict=True):
                group["lr"], group["weight_decay"] = group["peak_lr"] * share, own * decay

    def step(self) -> None:
        """One update at the present rates."""
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def parameter_names(self) -> list[list[str]]:
        """Names of the parameters of every optimizer, in the order in which its `state_dict` counts them."""
        return [[self.names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in self.all]

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def _partition(model: Transformer) -> tuple[list[nn.Parameter], ...]:
    """Hidden matrices, embedding, head, the rest (routers, norms, biases, convolutions, trusts), and tables of n-grams."""
    # A pipeline stage may have neither.
    embed = list(model.model.embed_tokens.parameters())
    embed += [module.weight for module in model.modules() if isinstance(module, TokenTable)]
    tables = [module.weight for module in model.modules() if isinstance(module, Ngrams)]
    head = [] if model.config.tie_word_embeddings else list(model.lm_head.parameters())
    ends = {id(p) for p in embed + head + tables}
    # Of two dimensions, but no maps from one hidden vector to another.
    other = {id(layer.gate.weight) for layer in model.moe_layers}
    other |= {id(module.weight) for module in model.modules() if isinstance(module, ShortConvolution)}
    other |= {id(module.trust_in_kind) for module in model.modules() if isinstance(module, Repeats)}
    rest = [p for p in model.parameters() if id(p) not in ends]
    hidden = [p for p in rest if id(p) not in other and p.ndim >= 2]
    small = [p for p in rest if id(p) in other or p.ndim < 2]
    return hidden, embed, head, small, tables


def decay_of(config: OptimizerConfig, readings: float) -> float:
    """What weight decays are multiplied with when the text has been read `readings` times."""
    return min(max(1.0, readings), MOST_READINGS) if config.decay_by_readings else 1.0


def clip_gradients(shards: Shards, limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit` (0: leave them); returns the norm before, a scalar."""
    norm = shards.gradient_norm()
    if limit:
        torch._foreach_mul_(shards.gradients(), (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _split_matrices(hidden: list[Piece], shards: Shards) -> SplitMatrices | None:
    cut = {id(piece.local): piece.shape for piece in hidden if piece.is_split_matrix}
    return SplitMatrices(shards.team.data_mesh.get_group(), cut) if cut else None


def _blocks(hidden: list[Piece], model: ModelConfig) -> dict[int, tuple[int, ...]]:
    """Rows of each of the matrices that a parameter consists of, where there are several."""
    rows = {id(piece.local): model.head_rows(piece.name.split(".")[-2]) for piece in hidden}
    return {piece: blocks for piece, blocks in rows.items() if blocks is not None}
