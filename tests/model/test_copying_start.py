"""Models that begin copying: what followed the last two tokens when they stood there before is looked at, and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.kernels import reference
from shoal.model import Transformer, init_weights
from shoal.model.attention import MLA, Context
from shoal.model.copying import group_width
from shoal.model.rope import rotary_tables

V, LENGTH = 512, 96
SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2, "rope_theta": 300.0,
    "max_position_embeddings": 512, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "init": "copying", "zero_init_output": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "as the rules have it": {},
    "narrow": {"hidden_size": 64, "first_k_dense_replace": 1},
    "wide": {"hidden_size": 192, "num_attention_heads": 6, "num_hidden_layers": 3},
    "as the demo": {"kv_lora_rank": 48, "v_head_dim": 32, "num_attention_heads": 3, "num_nextn_predict_layers": 1},
}


def make(**changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, **changes}))
    init_weights(model, 3)
    return model


def said_twice() -> torch.Tensor:
    """Random tokens, and the same once more, `[1, 2 * LENGTH]`."""
    ids = torch.randint(V, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids, ids], 1)


@torch.no_grad()
def looks_at(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Weights `[T, T]` of head 0 of the second layer, from its queries and keys by the definition."""
    positions = torch.arange(ids.shape[1])[None]
    context = Context(positions, *rotary_tables(model.config, positions), ids=ids)
    x = model.blocks[0](model.model.embed_tokens(ids), context, None)[0]
    attention: Any = model.blocks[1].self_attn
    assert isinstance(attention, MLA)
    query, latent, key_rope = attention.project(model.blocks[1].input_layernorm(x), context)
    key = torch.cat([attention.kv_b_proj(latent).unflatten(-1, (attention.heads, -1))[..., 0, : attention.nope], key_rope[:, :, 0]], -1)
    scores = (query[0, :, 0] @ key[0].T * attention.scale).masked_fill(torch.ones(len(key[0]), len(key[0])).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("name", SHAPES)
def test_a_head_looks_at_what_followed_the_same_two_tokens(name: str) -> None:
    weights = looks_at(make(**SHAPES[name]), said_twice())
    again = torch.arange(LENGTH + 2, 2 * LENGTH - 1)
    found = weights[again, again - LENGTH + 1]
    assert found.mean() > 0.5
    assert (weights[again].argmax(-1) == again - LENGTH + 1).float().mean() > 0.75
    assert weights[2:LENGTH].max(-1).values.mean() < found.mean(), "where nothing is repeated it does not know where to look"


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_and_the_output_head_names_it(name: str) -> None:
    model, ids = make(**SHAPES[name]), said_twice()
    logits = model.logits(model(ids).hidden)[0]
    again = torch.arange(LENGTH + 2, 2 * LENGTH - 1)
    copied = logits[again].gather(1, ids[0, again + 1, None])
    assert (copied > logits[again]).float().mean() > 0.9, "above other tokens"
    first = torch.arange(2, LENGTH - 1)
    assert (logits[first].gather(1, ids[0, first + 1, None]) > logits[first]).float().mean() < 0.6, "which could not be known"


def test_order_matters() -> None:
    """Two tokens are found, not the same two the other way round."""
    ids = torch.randint(V, (1, 60), generator=torch.Generator().manual_seed(1))
    ids[0, 10:13] = torch.tensor([7, 8, 100])
    ids[0, 30:33] = torch.tensor([8, 7, 101])
    ids[0, -2:] = torch.tensor([7, 8])
    weights = looks_at(make(), ids)[-1]
    assert weights[12] > 5 * weights[32]
    assert weights[12] > weights[31], "the last token alone is less than both"


def test_training_can_move_all_of_it() -> None:
    model, ids = make(), said_twice()
    model.cross_entropy(model(ids[:, :-1]).hidden, ids[:, 1:]).loss.backward()
    attention: Any = model.blocks[1].self_attn
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight, attention.q_proj.weight, attention.kv_b_proj.weight):
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().max() > 0


def test_it_begins_the_same_for_the_same_seed_and_anchored_otherwise() -> None:
    one, other, anchored = make().state_dict(), make().state_dict(), make(init="anchored").state_dict()
    assert all(other[name].equal(tensor) for name, tensor in one.items())
    changed = {name for name, tensor in one.items() if not anchored[name].equal(tensor)}
    attentions = {f"model.layers.{i}.self_attn.{part}.weight" for i in (0, 1) for part in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight", *attentions}
    group = group_width(ModelConfig(**SHAPE))
    assert one["model.embed_tokens.weight"][:, 1 : 1 + 3 * group].abs().max() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama", "n_routed_experts": None},
        {"q_lora_rank": 24},
        {"tie_word_embeddings": True},
        {"zero_init_output": False},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 1},
        {"kv_lora_rank": 1},
        {"hidden_size": 7},
    ],
)
def test_where_it_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.init anchored"):
        make(**changes)


@given(width=st.integers(8, 80), latent=st.integers(2, 40), nope=st.integers(1, 20), value=st.integers(1, 20), heads=st.integers(2, 4))
@settings(max_examples=25)
def test_any_other_shape_begins_with_finite_weights(width: int, latent: int, nope: int, value: int, heads: int) -> None:
    shape = {"hidden_size": width, "kv_lora_rank": latent, "qk_nope_head_dim": nope, "v_head_dim": value, "num_attention_heads": heads}
    model = make(**shape)
    assert model.logits(model(said_twice()).hidden).isfinite().all()


def test_the_reference_knows_the_same_repetitions() -> None:
    """What the head looks for is what `find_repeats` finds: the token after it is the one that followed."""
    ids = said_twice()
    found = reference.find_repeats(ids, torch.zeros_like(ids), 2 * LENGTH, 2 * LENGTH, (2,))[0, LENGTH + 2 : -1, 0]
    assert (found == ids[0, LENGTH + 3 :]).float().mean() > 0.95
    seen = looks_at(make(), ids).argmax(-1)[LENGTH + 2 : -1]
    assert (ids[0, seen] == found).float().mean() > 0.9
