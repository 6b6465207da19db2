"""One decoder layer."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import ModelConfig
from .attention import GQA, MLA, Context, LayerCache
from .convolution import Behind, ShortConvolution
from .embedding_skip import EmbeddingSkip
from .layers import RMSNorm, SwiGLU
from .moe import Dispatcher, MoE, RoutingStats


class Block(nn.Module):
    """Pre-norm decoder layer: attention, then a dense feed-forward layer or a mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config) if config.uses_mla else GQA(config)
        self.embedding_skip = EmbeddingSkip() if config.embedding_skip else None
        self.convolution = ShortConvolution(config.hidden_size, config.convolution) if config.convolution else None
        self.kept = config.attention_values_per_token
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if config.is_moe_layer(layer):
            assert config.n_routed_experts is not None
            self.mlp = MoE(config, config.n_routed_experts, dispatcher)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, context: Context, cache: LayerCache | None, chosen: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """`x [B, T, D]` -> `[B, T, D]`, and what the router did where there is one; see `Router` about `chosen`."""
        return self.feed(self.attend(x, context, cache), chosen)

    def attend(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        """The first half of the layer."""
        if self.embedding_skip is not None and context.start is not None:
            x = self.embedding_skip(x, context.start)
        normed = self.input_layernorm(x)
        if self.convolution is not None:
            behind = None if cache is None else Behind(cache, normed, self.kept)
            history = None if behind is None else behind.history(context.positions)
            normed, cache = self.convolution(normed, context.positions, history), behind
        return x + self.self_attn(normed, context, cache)

    def feed(self, x: Tensor, chosen: Tensor | None) -> tuple[Tensor, RoutingStats | None]:
        """The second half."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp(normed, chosen)
            return x + out, stats
        return x + self.mlp(normed), None
