"""Reading and writing Hugging Face config.json dictionaries."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig, UserError
from shoal.config.huggingface import model_config_from_dict, model_config_to_dict

# The keys of the official files, in their style.
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V3: dict[str, Any] = {
    **V2_LITE, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168, "q_lora_rank": 1536,
    "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_routed_experts": 256,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "ep_size": 1,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "hidden_size": 8192, "intermediate_size": 29568, "max_position_embeddings": 32768, "max_window_layers": 70,
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip


YARN: dict[str, Any] = V2_LITE["rope_scaling"]


def test_official_deepseek_files() -> None:
    lite, v3 = model_config_from_dict(V2_LITE), model_config_from_dict(V3)
    assert lite.q_lora_rank is None
    assert lite.rope_scaling is not None
    assert (lite.rope_scaling["type"], lite.rope_scaling["mscale"]) == ("yarn", 0.707)
    assert (lite.norm_topk_prob, lite.num_nextn_predict_layers, lite.num_key_value_heads) == (False, 0, None)
    assert lite.extra["aux_loss_alpha"] == 0.001
    assert (v3.topk_method, v3.scoring_func, v3.n_group, v3.topk_group, v3.num_nextn_predict_layers) == ("noaux_tc", "sigmoid", 8, 4, 1)
    assert v3.extra["quantization_config"]["weight_block_size"] == [128, 128]


def test_llama_with_several_end_tokens_and_qwen_with_biases() -> None:
    llama, qwen = model_config_from_dict(LLAMA), model_config_from_dict(QWEN)
    assert llama.eos_token_id == 128001
    assert model_config_to_dict(llama)["eos_token_id"] == [128001, 128008, 128009]
    assert llama.rope_scaling is not None
    assert llama.rope_scaling["type"] == "llama3"
    assert (qwen.model_type, qwen.attention_bias, qwen.n_routed_experts) == ("llama", True, None)
    assert model_config_to_dict(qwen)["model_type"] == "qwen2"


@pytest.mark.parametrize("official", [V2_LITE, V3, LLAMA, QWEN], ids=["v2-lite", "v3", "llama", "qwen2"])
def test_nothing_is_lost_on_the_way_there_and_back(official: dict[str, Any]) -> None:
    config = model_config_from_dict(official)
    written = model_config_to_dict(config)
    assert model_config_from_dict(written) == config
    assert {key: written.get(key) for key in official if key != "rope_scaling"} == {
        k: v for k, v in official.items() if k != "rope_scaling"
    }


@pytest.mark.parametrize("official", [V2_LITE, V3, LLAMA, QWEN], ids=["v2-lite", "v3", "llama", "qwen2"])
def test_transformers_reads_what_is_written_and_writes_what_is_read(official: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = model_config_from_dict(official)
    theirs = transformers.AutoConfig.for_model(**model_config_to_dict(config))
    new_style = theirs.to_dict()
    assert "rope_parameters" in new_style
    back = model_config_from_dict(new_style)
    if not config.uses_mla:
        config = replace(config, head_dim=config.qk_head_dim)  # transformers writes it out
        back = replace(back, head_dim=back.qk_head_dim)
    assert replace(back, extra={}) == replace(config, extra={})


def test_tables_of_both_styles_may_agree_and_harmless_keys_pass() -> None:
    config = model_config_from_dict(V2_LITE)
    both = {**V2_LITE, "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0, "attention_factor": None}}
    assert model_config_from_dict(both) == config
    first = {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True, "truncate": True}
    assert model_config_from_dict({**LLAMA, "rope_scaling": first}).rope_scaling == first


@pytest.mark.parametrize("official", [V2_LITE, V3, LLAMA, QWEN], ids=["v2-lite", "v3", "llama", "qwen2"])
def test_first_and_last_tokens_that_are_not_there_are_those_of_transformers(official: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    ends = ("bos_token_id", "eos_token_id")
    silent = {key: value for key, value in official.items() if key not in ends}
    theirs, ours = transformers.AutoConfig.for_model(**silent), model_config_from_dict(silent)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for none in (None, -1):
        said = model_config_from_dict({**official, **dict.fromkeys(ends, none)})
        assert [getattr(said, key) for key in ends] == [model_config_to_dict(said)[key] for key in ends] == [None, None]


CONFIGS = st.builds(
    ModelConfig,
    model_type=st.sampled_from(["deepseek_v3", "deepseek_v2"]),
    hidden_size=st.integers(1, 2000),
    num_hidden_layers=st.integers(1, 30),
    q_lora_rank=st.one_of(st.none(), st.integers(1, 99)),
    n_shared_experts=st.one_of(st.none(), st.integers(1, 3)),
    rope_theta=st.floats(1, 1e7),
    bos_token_id=st.none() | st.integers(0, 9),
    eos_token_id=st.none() | st.integers(0, 9),
    tie_word_embeddings=st.booleans(),
    num_nextn_predict_layers=st.integers(0, 2),
    qk_norm=st.booleans(),
    logit_softcap=st.one_of(st.none(), st.floats(1, 50)),
    init=st.sampled_from(["normal", "fan_in", "anchored"]),
    zero_init_output=st.booleans(),
    extra=st.just({"torch_dtype": "float32"}),
)


@settings(max_examples=60)
@given(CONFIGS)
def test_any_shoal_model_comes_back_as_it_was(config: ModelConfig) -> None:
    assert model_config_from_dict(model_config_to_dict(config)) == config


def test_dense_deepseek_is_written_so_that_transformers_builds_no_experts() -> None:
    dense = ModelConfig(n_routed_experts=None, num_hidden_layers=5)
    written = model_config_to_dict(dense)
    assert written["first_k_dense_replace"] == 5
    assert model_config_from_dict(written).n_routed_experts is None


def test_dtype_is_the_one_asked_for_or_the_one_read() -> None:
    config = model_config_from_dict({**V3, "torch_dtype": "float16"})
    assert model_config_to_dict(config)["torch_dtype"] == "float16"
    assert model_config_to_dict(config, "float32")["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("broken", "hint"),
    [
        ({**V3, "model_type": "mixtral"}, "deepseek_v3, deepseek_v2, llama, qwen2"),
        ({"hidden_size": 8}, "model_type None"),
        ({k: v for k, v in V3.items() if k != "kv_lora_rank"}, "lacks kv_lora_rank"),
        ({**V3, "num_experts_per_tok": None}, "num_experts_per_tok"),
        ({**LLAMA, "attention_bias": True}, "o_proj"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias"),
        ({**LLAMA, "hidden_act": "gelu"}, "SwiGLU"),
        ({**QWEN, "use_sliding_window": True}, "sliding"),
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({**V3, "rope_scaling": {**YARN, "truncate": False}}, "truncate"),
        ({**V3, "rope_scaling": {**YARN, "low_freq_factor": 1.0}}, "low_freq_factor"),
        ({**V3, "rope_scaling": {**LLAMA["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale, mscale_all_dim"),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "keep one"),
        ({**V2_LITE, "rope_parameters": {**YARN, "rope_theta": 5000.0}}, "keep one"),
        ({**QWEN, "rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**YARN, "factor": 2}}, "keep one"),
    ],
)
def test_unsupported_files_are_refused_with_the_reason(broken: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        model_config_from_dict(broken)
