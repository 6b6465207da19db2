"""Packed documents see themselves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.model import Documents, Transformer, init_weights

MLA = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
}
SHAPES = {
    "mla": ModelConfig(num_experts_per_tok=2, num_nextn_predict_layers=1, **MLA),
    "llama": ModelConfig(model_type="llama", num_key_value_heads=1),
}


def tiny(shape: str, dtype: torch.dtype = torch.float32) -> Transformer:
    config = SHAPES[shape]
    config.vocab_size, config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads = 64, 32, 2, 48, 2
    model = Transformer(config)
    init_weights(model, 0)
    return model.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9))
@settings(max_examples=15)
def test_packed_documents_give_what_each_gives_alone(shape: str, lengths: list[int]) -> None:
    model = tiny(shape)
    texts = [torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths]
    depth = model.config.num_nextn_predict_layers
    packed = torch.cat(texts, 1)
    output = model(packed, mtp_ids=[packed] * depth, documents=Documents.of(lengths))
    alone = [model(text, mtp_ids=[text] * depth) for text in texts]
    assert torch.allclose(output.hidden, torch.cat([one.hidden for one in alone], 1), atol=1e-5)
    if depth:
        assert torch.allclose(output.mtp_hidden[0], torch.cat([one.mtp_hidden[0] for one in alone], 1), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_documents_alone(shape: str) -> None:
    lengths, model = [7, 3, 12, 1, 11], tiny(shape, torch.float64)
    texts = [torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths]
    direction = torch.randn(1, sum(lengths), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(hidden: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (hidden * direction).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = gradients(model(torch.cat(texts, 1), documents=Documents.of(lengths)).hidden)
    alone = gradients(torch.cat([model(text).hidden for text in texts], 1))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(packed, alone, strict=True))


def test_replayed_experts_take_the_place_of_the_routers_choice() -> None:
    model = tiny("mla")
    ids = torch.randint(0, 64, (1, 9))
    own = model(ids)
    indices = [stats.indices for stats in own.routing]
    assert torch.equal(model(ids, chosen=indices).hidden, own.hidden)
    other = model(ids, chosen=[(index + 1) % 4 for index in indices])
    assert [stats.indices.tolist() for stats in other.routing] == [((index + 1) % 4).tolist() for index in indices]
    assert not torch.allclose(other.hidden, own.hidden)
