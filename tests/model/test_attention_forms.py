from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.model import MLA, Context, Transformer
from shoal.model.attention import visible
from shoal.model.rope import rotary_tables

Make = Callable[..., Transformer]

YARN = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 8}
STYLES: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla, compressed query, yarn": {"q_lora_rank": 10, "rope_scaling": YARN},
    "mla, qk_norm": {"qk_norm": True},
    "gqa": {"model_type": "llama", "num_key_value_heads": 2},
    "gqa, bias, qk_norm": {"model_type": "llama", "num_key_value_heads": 1, "attention_bias": True, "qk_norm": True},
    "mha, wide heads": {"model_type": "llama", "head_dim": 12},
}
styles = pytest.mark.parametrize("changes", STYLES.values(), ids=STYLES.keys())


class DenseCache:
    """Every sequence's values in one tensor, NaN where nothing has been written."""

    def __init__(self, batch: int, length: int, width: int) -> None:
        self.values = torch.full((batch, length, width), float("nan"))
        self.seen = 0

    def extend(self, values: Tensor, positions: Tensor) -> Tensor:
        self.values.scatter_(1, positions.unsqueeze(-1).expand_as(values), values)
        self.seen = max(self.seen, int(positions.max()) + 1)
        return self.values[:, : self.seen].nan_to_num()


@torch.no_grad()
@pytest.mark.parametrize("changes", [change for style, change in STYLES.items() if style.startswith("mla")])
def test_absorbed_equals_expanded(make_model: Make, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    attention = model.blocks[0].self_attn
    assert isinstance(attention, MLA)
    positions = torch.arange(11).unsqueeze(0)
    context = Context(positions, *rotary_tables(model.config, positions))
    query, latent, key_rope = attention.project(torch.randn(3, 11, 32), context)
    expanded = attention.expanded(query, latent, key_rope)
    absorbed = attention.absorbed(query, torch.cat([latent, key_rope[:, :, 0]], -1), visible(positions, 11))
    torch.testing.assert_close(absorbed, expanded, atol=2e-6, rtol=1e-5)
    assert expanded.std() > 0.01


@torch.no_grad()
@styles
def test_a_token_sees_no_later_one(make_model: Make, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    ids = torch.randint(0, 50, (2, 12))
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % 50
    before, after = model(ids).hidden, model(changed).hidden
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert ((before - after).abs().amax((0, 2))[7:] > 1e-4).all()


@torch.no_grad()
@styles
@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 3, 2]])
def test_decoding_with_a_cache_equals_the_full_pass(make_model: Make, changes: dict[str, Any], chunks: list[int]) -> None:
    model = make_model(**changes)
    ids = torch.randint(0, 50, (2, 10))
    full = model.logits(model(ids).hidden)
    caches = [DenseCache(2, 10, model.config.cache_values_per_token) for _ in model.blocks]
    start = 0
    for length in chunks:
        positions = torch.arange(start, start + length).expand(2, -1)
        out = model(ids[:, start : start + length], positions, caches)
        torch.testing.assert_close(model.logits(out.hidden), full[:, start : start + length], atol=2e-5, rtol=1e-4)
        start += length


@torch.no_grad()
@styles
def test_sequences_of_different_length_decode_side_by_side(make_model: Make, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    ids = torch.randint(0, 50, (2, 9))
    full = model.logits(model(ids).hidden)
    caches = [DenseCache(2, 9, model.config.cache_values_per_token) for _ in model.blocks]
    model(ids[:, :7], torch.arange(7).expand(2, -1), caches)
    positions = torch.tensor([[7], [3]])  # the second sequence goes back, as after rejected drafts: what it cached later is not to be seen
    out = model(ids.gather(1, positions), positions, caches)
    expected = full.gather(1, positions.unsqueeze(-1).expand(-1, -1, 50))
    torch.testing.assert_close(model.logits(out.hidden), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@styles
def test_only_the_distance_between_tokens_matters(make_model: Make, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    ids = torch.randint(0, 50, (1, 8))
    shifted = model(ids, torch.arange(100, 108).unsqueeze(0)).hidden
    torch.testing.assert_close(shifted, model(ids).hidden, atol=1e-4, rtol=1e-3)


def test_softcap_bounds_logits_and_keeps_small_ones(make_model: Make) -> None:
    plain, capped = make_model(), make_model(logit_softcap=3.0)
    hidden = torch.randn(4, 32) * 50
    assert capped.logits(hidden).abs().max() <= 3.0 < plain.logits(hidden).abs().max()
    torch.testing.assert_close(capped.logits(hidden * 1e-4), plain.logits(hidden * 1e-4), atol=1e-5, rtol=1e-4)
