"""One decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import GQA, MLA, Context, LayerCache
from .convolution import ShortConvolution
from .layers import LinearFactory, RMSNorm, SwiGLU
from .moe import Dispatcher, MoE, RoutingStats


class Block(nn.Module):
    """Pre-norm decoder layer: attention, then a dense feed-forward layer or a mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int, linear: LinearFactory, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, linear) if config.uses_mla else GQA(config, linear)
        if config.embedding_skip:
            self.embedding_skip = nn.Parameter(torch.tensor([1.0, 0.0]))
        if config.convolution:
            self.convolution = ShortConvolution(config.hidden_size, config.convolution)
        self.config = config
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if config.is_moe_layer(layer):
            assert config.n_routed_experts is not None
            self.mlp = MoE(config, config.n_routed_experts, linear, dispatcher)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, linear)

    def forward(
        self, x: Tensor, context: Context, cache: LayerCache | None, chosen: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """`x [B, T, D]` -> `[B, T, D]`, and what the router did where there is one; see `Router` about `chosen`."""
        if self.config.embedding_skip and context.start is not None:
            x = self.embedding_skip[0] * x + self.embedding_skip[1] * context.start
        normed = self.input_layernorm(x)
        if self.config.convolution:
            normed = self.convolution(normed, context.positions)
        x = x + self.self_attn(normed, context, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp(normed, chosen)
            return x + out, stats
        return x + self.mlp(normed), None
