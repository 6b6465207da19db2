from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.config.huggingface import model_config_from_dict, model_config_to_dict
from shoal.model import Transformer, init_weights
from shoal.model.rope import inverse_frequencies, rotary_tables, softmax_scale, table_magnitude, yarn_beyond

MSCALES = [(None, None), (1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (0.707, None), (None, 1.0)]


def yarn(factor: float, original: int, mscales: tuple[float | None, float | None]) -> dict[str, Any]:
    scaling = {"type": "yarn", "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    scaling |= {"beta_fast": 32, "beta_slow": 1}
    return scaling | {name: value for name, value in zip(("mscale", "mscale_all_dim"), mscales, strict=True) if value is not None}


@settings(max_examples=40)
@given(
    st.sampled_from([1.0, 2.0, 40.0]),
    st.sampled_from([64, 4096]),
    st.sampled_from(MSCALES),
    st.sampled_from([8, 64]),
    st.sampled_from([10000.0, 1e6]),
)
def test_yarn_equals_transformers(
    factor: float, original: int, mscales: tuple[float | None, float | None], width: int, theta: float
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    scaling = yarn(factor, original, mscales)
    shape: dict[str, Any] = {"hidden_size": 32, "qk_rope_head_dim": width, "qk_nope_head_dim": 12, "rope_theta": theta}
    shape |= {"max_position_embeddings": original * 64, "num_attention_heads": 2, "kv_lora_rank": 8, "v_head_dim": 8}
    ours = ModelConfig(**shape, rope_scaling=dict(scaling))
    theirs = transformers.DeepseekV3Config(**shape, rope_scaling=dict(scaling), q_lora_rank=None, num_key_value_heads=2)
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    torch.testing.assert_close(inverse_frequencies(ours), frequencies, rtol=1e-5, atol=0)
    assert table_magnitude(ours) == pytest.approx(magnitude)
    assert softmax_scale(ours) == pytest.approx(DeepseekV3Attention(theirs, 0).scaling)


def test_published_scale_of_v3() -> None:
    config = ModelConfig(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=yarn(40.0, 4096, (1.0, 1.0)))
    assert softmax_scale(config) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert table_magnitude(config) == 1.0


def test_llama_attention_keeps_its_scale_under_yarn() -> None:
    config = ModelConfig(model_type="llama", hidden_size=32, num_attention_heads=2, rope_scaling=yarn(4.0, 64, (1.0, 1.0)))
    assert softmax_scale(config) == 0.25


@settings(max_examples=20)
@given(st.sampled_from([16, 128]), st.sampled_from([10000.0, 500000.0]), st.sampled_from([64, 8192]))
def test_llama3_equals_transformers(width: int, theta: float, original: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = original
    shape: dict[str, Any] = {"hidden_size": 2 * width, "num_attention_heads": 2, "rope_theta": theta, "max_position_embeddings": 131072}
    theirs = transformers.LlamaConfig(**shape, rope_scaling=dict(scaling))
    ours = ModelConfig(model_type="llama", **shape, rope_scaling=scaling)
    torch.testing.assert_close(inverse_frequencies(ours), ROPE_INIT_FUNCTIONS["llama3"](theirs)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_the_original_length_beside_the_table_comes_first_as_in_transformers(style: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = model_config_to_dict(ModelConfig(model_type="llama", hidden_size=128, num_attention_heads=2))
    config |= {"rope_scaling": None, style: scaling, "original_max_position_embeddings": 1024}
    ours, theirs = model_config_from_dict(config), transformers.AutoConfig.for_model(**config)
    torch.testing.assert_close(inverse_frequencies(ours), ROPE_INIT_FUNCTIONS[kind](theirs)[0], rtol=1e-5, atol=0)
    assert model_config_from_dict(model_config_to_dict(ours)) == ours


def test_tables_follow_positions() -> None:
    config = ModelConfig(qk_rope_head_dim=8)
    positions = torch.tensor([[0, 5], [3, 100000]])
    cos, sin = rotary_tables(config, positions)
    assert cos.shape == sin.shape == (2, 2, 4)
    assert cos.dtype == torch.float32
    angle = 5 * 10000.0 ** (-2 / 8)
    assert cos[0, 1, 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sin[0, 1, 1].item() == pytest.approx(math.sin(angle), abs=1e-6)


@given(st.sampled_from([64, 256, 1024]), st.sampled_from([2, 8, 32]), st.sampled_from([8, 16, 64]), st.sampled_from([300.0, 10000.0]))
def test_slow_channels_turn_no_further_than_in_training(trained: int, factor: int, width: int, theta: float) -> None:
    shape: dict[str, Any] = {"qk_rope_head_dim": width, "rope_theta": theta, "max_position_embeddings": factor * trained}
    plain = ModelConfig(**shape)
    extended = ModelConfig(**shape, rope_scaling=yarn_beyond(plain, trained))
    before, after = inverse_frequencies(plain), inverse_frequencies(extended)
    assert bool((after <= before * (1 + 1e-6)).all())
    # Pairs that turned less than once in training, by a pair's distance at least.
    slow = before * trained < 2 * math.pi * theta ** (-2 / width)
    torch.testing.assert_close(after[slow] * factor, before[slow])


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_an_extended_model_is_the_one_its_config_describes(kind: str) -> None:
    shape: dict[str, Any] = {"model_type": kind, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    shape |= {"n_routed_experts": 0, "intermediate_size": 32, "max_position_embeddings": 64}
    model = Transformer(ModelConfig(**shape))
    init_weights(model, 0)
    ids = torch.arange(40)[None]
    short = model(ids).hidden
    model.extend_context(16)
    described = Transformer(model.config)
    described.load_state_dict(model.state_dict())
    assert described(ids).hidden.equal(model(ids).hidden)
    assert not short.equal(model(ids).hidden)
