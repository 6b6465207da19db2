"""DeepSeekMoE: router, experts, and the exchange of tokens between them (2401.06066; DeepSeek-V3, 2412.19437, section 2.1.2).

Router, experts and dispatcher are separate, so that how tokens travel can change without touching the model.
Shapes: B sequences of T tokens, N = B * T tokens, D model width, E experts, F expert width, K experts per token, R = N * K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from .layers import SwiGLU


@dataclass
class RoutingStats:
    """What one MoE layer did in one forward pass."""

    load: Tensor
    """Tokens sent to every expert, `[E]`, int64."""
    balance_loss: Tensor
    """Sequence-wise balance loss (V3, equations 17-20) before its weight alpha; 1 when perfectly balanced. Scalar."""
    entropy: Tensor
    """Mean entropy of a token's normalised scores, as a share of ln E. Scalar without gradient."""
    indices: Tensor
    """The experts chosen for every token, `[B, T, K]`."""


class Router(nn.Module):
    """Chooses K experts for every token, in fp32 whatever the model's precision."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # The bias moves in steps of 0.001: bf16 would lose them, so a change of the model's precision passes it by.
        bias = getattr(self, "e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.e_score_correction_bias
            if moved.dtype != torch.float32:
                self.e_score_correction_bias = moved.float() if moved.is_meta else bias.to(moved.device)
        return self

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`x [..., D]` -> weights `[..., K]`, expert indices `[..., K]`, scores `[..., E]`; all fp32 but the indices.

        `chosen [..., K]` takes the place of the router's own choice (routing replay); weights follow the scores as ever.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        indices = self.choose(scores.detach()) if chosen is None else chosen
        weights = scores.gather(-1, indices)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor, indices, scores

    def choose(self, scores: Tensor) -> Tensor:
        """Indices `[..., K]` of the experts with the best scores, after bias and limit to groups as configured."""
        config = self.config
        if config.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias
        if config.topk_method != "greedy" and config.n_group > 1:
            grouped = scores.unflatten(-1, (config.n_group, -1))
            if config.topk_method == "noaux_tc":
                group_scores = grouped.topk(2, dim=-1).values.sum(-1)
            else:
                group_scores = grouped.amax(-1)
            chosen = group_scores.topk(config.topk_group, dim=-1).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, chosen, False)
            # -inf and not 0: a bias can make every score of an open group negative.
            scores = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, load: Tensor, speed: float) -> None:
        """Auxiliary-loss-free balancing (2408.15664): raise the bias of underloaded experts by `speed`, lower the others'.

        `load [E]` must be counted over the whole batch of the optimizer step, on all ranks.
        """
        load = load.float()
        self.e_score_correction_bias += speed * (load.mean() - load).sign()


def routing_stats(scores: Tensor, indices: Tensor) -> RoutingStats:
    """Load, balance loss and entropy from `scores [B, T, E]` and `indices [B, T, K]`."""
    batch, length, experts = scores.shape
    chosen = torch.zeros(batch, experts, device=scores.device, dtype=torch.int64)
    chosen.scatter_add_(1, indices.flatten(1), torch.ones_like(indices).flatten(1))
    share = scores / scores.sum(-1, keepdim=True)
    frequency = chosen * (experts / (indices.shape[-1] * length))
    balance = (frequency * share.mean(1)).sum(-1).mean()
    with torch.no_grad():
        entropy = torch.special.entr(share).sum(-1).mean() / torch.log(torch.tensor(float(experts)))
    return RoutingStats(chosen.sum(0), balance, entropy, indices)


class Dispatcher(Protocol):
    """Brings tokens to the experts that this process holds, and their results back."""

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, Any]:
        """Tokens `x [N, D]` to the experts `indices [N, K]`, whose results will count with `weights [N, K]`.

        Returns rows sorted by local expert `[R, D]`, their inclusive ends `[E_local]` (int32), and a ticket.
        """
        ...

    def combine(self, y: Tensor, ticket: Any) -> Tensor:
        """Expert results `y [R, D]` -> weighted sums `[N, D]`."""
        ...


class LocalDispatcher:
    """All experts are in this process: dispatch is a permutation."""

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        order, inverse, offsets = kernels.sort_by_expert(indices, experts)
        return kernels.permute_tokens(x, order, inverse), offsets, (weights, inverse)

    def combine(self, y: Tensor, ticket: tuple[Tensor, Tensor]) -> Tensor:
        return kernels.combine_tokens(y, *ticket)


class Experts(nn.Module):
    """The routed experts' SwiGLU layers, stacked; checkpoints hold them one by one as `experts.{e}`."""

    def __init__(self, experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`x [R, D]` sorted by expert, `offsets [E]` the inclusive end of every expert's rows -> `[R, D]`."""
        gate = kernels.grouped_linear(x, self.gate_proj, offsets)
        up = kernels.grouped_linear(x, self.up_proj, offsets)
        return kernels.grouped_linear(kernels.swiglu(gate, up), self.down_proj, offsets)


class MoE(nn.Module):
    """Routed experts plus shared experts that see every token."""

    def __init__(self, config: ModelConfig, experts: int, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.gate = Router(config, experts)
        self.experts = Experts(experts, config.hidden_size, config.moe_intermediate_size)
        shared_width = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared_width) if shared_width else None
        self.dispatcher = dispatcher

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """`x [B, T, D]` -> `[B, T, D]` and what the router did; see `Router` about `chosen`."""
        weights, indices, scores = self.gate(x, chosen)
        tokens = x.flatten(0, 1)
        rows, offsets, ticket = self.dispatcher.dispatch(tokens, indices.flatten(0, 1), weights.flatten(0, 1), scores.shape[-1])
        out = self.dispatcher.combine(self.experts(rows, offsets), ticket).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, routing_stats(scores, indices)
