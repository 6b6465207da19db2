"""Models that begin with anchors: where their heads look, and that nothing else is different."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.config import ModelConfig
from shoal.model import Transformer, init_weights
from shoal.model.attention import GQA, MLA
from shoal.model.rope import rotary_tables

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rope_theta": 300.0, "n_routed_experts": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mla": {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 16},
    "mha": {"model_type": "llama"},
    "gqa": {"model_type": "llama", "num_key_value_heads": 2},
}


def make(**changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, "init": "anchored", "zero_init_output": True, **changes}))
    init_weights(model, 3)
    return model


@torch.no_grad()
def looks_at(model: Transformer, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """Attention's weights `[H, T, T]`, by the definitions and its rotary channels alone."""
    config, block = model.config, model.blocks[layer]
    x = block.input_layernorm(model.model.embed_tokens(ids))
    cos, sin = rotary_tables(config, torch.arange(len(ids)))
    attention: Any = block.self_attn

    def turned(values: torch.Tensor, neighbours: bool) -> torch.Tensor:
        """`values [T, H, P]`, rotated by the definition."""
        half = values.shape[-1] // 2
        a, b = (values[..., ::2], values[..., 1::2]) if neighbours else (values[..., :half], values[..., half:])
        c, s = cos[:, None], sin[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    if isinstance(attention, MLA):
        query = attention.q_proj(x).unflatten(-1, (attention.heads, -1))[..., attention.nope :]
        key = attention.kv_a_proj_with_mqa(x)[:, None, attention.latent :].expand(-1, attention.heads, -1)
        scores = torch.einsum("thp,shp->hts", turned(query, True), turned(key, True))
    else:
        assert isinstance(attention, GQA)
        query = attention.q_proj(x).unflatten(-1, (attention.heads, -1))
        key = attention.k_proj(x).unflatten(-1, (attention.kv_heads, -1)).repeat_interleave(attention.heads // attention.kv_heads, 1)
        scores = torch.einsum("thp,shp->hts", turned(query, False), turned(key, False))
    unseen = torch.ones(len(ids), len(ids)).triu(1).bool()
    return (scores * attention.scale).masked_fill(unseen, float("-inf")).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_every_head_begins_by_looking_at_another_token_before(kind: str, layer: int) -> None:
    model = make(**KINDS[kind])
    weights = looks_at(model, layer, torch.randint(97, (40,), generator=torch.Generator().manual_seed(0)))
    for head in range(4):
        looked_at = weights[head].diagonal(-head - 1)
        # The norm of a token's embedding is not quite the same as its neighbour's.
        assert looked_at.mean() > 0.7
        assert (weights[head].max(-1).values[head + 1 :] == looked_at).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_channel_has_three_quarters_of_an_embedding(kind: str) -> None:
    embedding = make(**KINDS[kind]).model.embed_tokens.weight.detach()
    assert embedding[:, 0].unique().numel() == 1
    share = embedding[:, 0].square().mean() / embedding.square().sum(-1).mean()
    assert share == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"q_lora_rank": 24}, {"num_nextn_predict_layers": 1}, {"qk_norm": True}]
)
def test_other_shapes_begin_too(changes: dict[str, Any]) -> None:
    model = make(**KINDS["mla"], **changes)
    assert model(torch.arange(20)[None]).hidden.isfinite().all()
    plain = make(**KINDS["mla"], **changes, init="fan_in")
    same = [name for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True) if torch.equal(a, b)]
    assert len(same) >= len(list(model.parameters())) - 5, "only embedding, queries and keys begin in another way"
