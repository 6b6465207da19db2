"""Multi-head Latent Attention and grouped-query attention.

Shapes: B sequences, T new tokens, S tokens seen so far, D model width, H heads, R latent width (`kv_lora_rank`),
N non-rotary, P rotary and V value channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from .documents import Documents
from .layers import Linear, RMSNorm, TokenTable
from .rope import softmax_scale

LATENT_NORM_EPS = 1e-6
"""Of the norms on the compressed query and key-value: a constant in the official models, whatever `rms_norm_eps` says."""


class LayerCache(Protocol):
    """What one attention layer needs of a cache: remember values of new tokens, return those of all tokens."""

    def extend(self, values: Tensor, positions: Tensor) -> Tensor:
        """Store `values [B, T, C]` at `positions [B, T]`; return everything stored so far, `[B, S, C]`, S > every position."""
        ...


@dataclass
class Context:
    """Where the tokens of one forward pass stand; the same for all layers."""

    positions: Tensor
    """`[B, T]` (or `[1, T]` without a cache)."""
    cos: Tensor
    """`[B or 1, T, P / 2]`."""
    sin: Tensor
    documents: Documents | None = None
    """Packed documents, which do not see each other; without a cache only."""
    ids: Tensor | None = None
    """`[B, T]`, for layers that look something up by token."""
    start: Tensor | None = None
    """The embeddings `[B, T, D]`, for layers that mix them in again."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """`kernels.causal_attention`, within documents where there are any."""
    attend = kernels.causal_attention if documents is None else documents.causal_attention
    return attend(q, k, v, scale)


def visible(positions: Tensor, seen: int) -> Tensor:
    """Causal mask over a cache, `[B, 1, T, S]`: a token sees the cached positions up to its own."""
    return torch.arange(seen, device=positions.device) <= positions[:, None, :, None]


class MLA(nn.Module):
    """Multi-head Latent Attention with decoupled rotary keys (DeepSeek-V2, 2405.04434, section 2.1).

    Two forms of the same function: `expanded` rebuilds every head's keys and values from the latent (few FLOPs per pair
    of tokens: training and prefill), `absorbed` moves the up-projections to the query and output side so that the
    latent itself is what is attended to (few bytes per cached token: decoding).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scale = softmax_scale(config)
        self.qk_norm_eps = config.rms_norm_eps if config.qk_norm else None
        query_width = self.heads * (self.nope + self.rope)
        self.compresses_query = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query_width)
        else:
            self.q_proj = Linear(config.hidden_size, query_width)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, config.hidden_size)
        self.value_embedding = TokenTable(config.vocab_size, self.latent) if config.value_embedding else None

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D]` -> `[B, T, D]`; without a cache the tokens attend to each other causally."""
        query, latent, key_rope = self.project(x, context)
        if cache is None:
            return self.o_proj(self.expanded(query, latent, key_rope, context.documents))
        cached = cache.extend(torch.cat([latent, key_rope[:, :, 0]], dim=-1), context.positions)
        return self.o_proj(self.absorbed(query, cached, visible(context.positions, cached.shape[1])))

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, N + P]` (rotated), normalised latent `[B, T, R]`, rotated shared key `[B, T, 1, P]`."""
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_query else self.q_proj(x)
        query = query.unflatten(-1, (self.heads, self.nope + self.rope))
        latent, key_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], dim=-1)
        if self.value_embedding is not None:
            latent = latent + self.value_embedding(context.ids)
        key_rope = key_rope.unsqueeze(2)
        if self.qk_norm_eps is not None:
            # The non-rotary key comes from an already normalised latent, so that the absorbed form stays possible.
            query = kernels.rms_norm(query, None, self.qk_norm_eps)
            key_rope = kernels.rms_norm(key_rope, None, self.qk_norm_eps)
        # One split, not two slices: the gradient of a slice fills the whole tensor with zeros first.
        query_nope, query_rope = query.split([self.nope, self.rope], dim=-1)
        query_rope = kernels.apply_rope(query_rope, context.cos, context.sin, interleaved=True)
        query = torch.cat([query_nope, query_rope], dim=-1)
        key_rope = kernels.apply_rope(key_rope, context.cos, context.sin, interleaved=True)
        return query, self.kv_a_layernorm(latent), key_rope

    def expanded(self, query: Tensor, latent: Tensor, key_rope: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal attention among the T tokens themselves; `[B, T, H * V]`."""
        key_value = self.kv_b_proj(latent).unflatten(-1, (self.heads, self.nope + self.value))
        key_nope, value = key_value.split([self.nope, self.value], dim=-1)
        key = torch.cat([key_nope, key_rope.expand(-1, -1, self.heads, -1)], dim=-1)
        return causal_attention(query, key, value, self.scale, documents).flatten(2)

    def absorbed(self, query: Tensor, cached: Tensor, mask: Tensor) -> Tensor:
        """Attention over `cached [B, S, R + P]` where `mask [B, 1, T, S]` is true; `[B, T, H * V]`."""
        assert isinstance(self.kv_b_proj, Linear)
        up = self.kv_b_proj.matrix().unflatten(0, (self.heads, self.nope + self.value)).to(query.dtype)  # [H, N + V, R]
        up_key, up_value = up.split([self.nope, self.value], dim=1)
        query_latent = torch.einsum("bthn,hnr->bhtr", query[..., : self.nope], up_key)
        query_rope = query[..., self.nope :].transpose(1, 2)  # [B, H, T, P]
        latent, key_rope = cached.split([self.latent, self.rope], dim=-1)
        scores = query_latent @ latent.unsqueeze(1).mT + query_rope @ key_rope.unsqueeze(1).mT  # [B, H, T, S]
        scores = (scores.float() * self.scale).masked_fill(~mask, float("-inf"))
        mixed = scores.softmax(-1).to(latent.dtype) @ latent.unsqueeze(1)  # [B, H, T, R]
        return torch.einsum("bhtr,hvr->bthv", mixed, up_value).flatten(2)


class GQA(nn.Module):
    """Grouped-query attention (2305.13245) with rotary positions: the Llama-style baseline."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.kv_heads, config.qk_head_dim
        self.scale = softmax_scale(config)
        self.qk_norm_eps = config.rms_norm_eps if config.qk_norm else None
        self.q_proj = Linear(config.hidden_size, self.heads * self.width, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.width, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.width, config.attention_bias)
        self.o_proj = Linear(self.heads * self.width, config.hidden_size)
        self.value_embedding = TokenTable(config.vocab_size, self.kv_heads * self.width) if config.value_embedding else None

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """`x [B, T, D]` -> `[B, T, D]`; without a cache the tokens attend to each other causally."""
        query = self.q_proj(x).unflatten(-1, (self.heads, self.width))
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, self.width))
        value = self.v_proj(x)
        if self.value_embedding is not None:
            value = value + self.value_embedding(context.ids)
        value = value.unflatten(-1, (self.kv_heads, self.width))
        if self.qk_norm_eps is not None:
            query, key = kernels.rms_norm(query, None, self.qk_norm_eps), kernels.rms_norm(key, None, self.qk_norm_eps)
        query = kernels.apply_rope(query, context.cos, context.sin, interleaved=False)
        key = kernels.apply_rope(key, context.cos, context.sin, interleaved=False)
        if cache is None:
            return self.o_proj(causal_attention(query, key, value, self.scale, context.documents).flatten(2))
        cached = cache.extend(torch.cat([key.flatten(2), value.flatten(2)], dim=-1), context.positions)
        return self.o_proj(self.attend(query, cached, visible(context.positions, cached.shape[1])))

    def attend(self, query: Tensor, cached: Tensor, mask: Tensor) -> Tensor:
        """Attention of `query [B, T, H, C]` over `cached [B, S, 2 * kv_heads * C]`; `[B, T, H * C]`."""
        key, value = cached.unflatten(-1, (2, self.kv_heads, self.width)).permute(2, 0, 3, 1, 4)  # each [B, kv_heads, S, C]
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=mask, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )
        return mixed.transpose(1, 2).flatten(2)
