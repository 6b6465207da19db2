"""Published models to plan with and to compare against; shapes from their official `config.json` files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import ModelConfig

_DEEPSEEK: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}


def _yarn(mscale: float) -> dict[str, float | int | str]:
    return {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


def _deepseek_v3() -> ModelConfig:
    """deepseek-ai/DeepSeek-V3 (2412.19437, section 4.2)."""
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        num_attention_heads=128,
        q_lora_rank=1536,
        rope_scaling=_yarn(1.0),
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        **_DEEPSEEK,
    )


def _deepseek_v2() -> ModelConfig:
    """deepseek-ai/DeepSeek-V2 (2405.04434, section 3.1.2)."""
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        intermediate_size=12288,
        num_attention_heads=128,
        q_lora_rank=1536,
        rope_scaling=_yarn(1.0),
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1536,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        scoring_func="softmax",
        n_group=8,
        topk_group=3,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        **_DEEPSEEK,
    )


def _deepseek_v2_lite() -> ModelConfig:
    """deepseek-ai/DeepSeek-V2-Lite (2405.04434, appendix B)."""
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        num_attention_heads=16,
        q_lora_rank=None,
        rope_scaling=_yarn(0.707),
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        **_DEEPSEEK,
    )


def _llama(layers: int, hidden: int, inner: int, heads: int) -> ModelConfig:
    """meta-llama/Llama-3.1 (2407.21783, table 3)."""
    return ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        n_routed_experts=None,
    )


def _qwen25_72b() -> ModelConfig:
    """Qwen/Qwen2.5-72B (2412.15115)."""
    return ModelConfig(
        model_type="llama",
        vocab_size=152064,
        hidden_size=8192,
        num_hidden_layers=80,
        intermediate_size=29568,
        num_attention_heads=64,
        num_key_value_heads=8,
        attention_bias=True,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        n_routed_experts=None,
    )


@dataclass(frozen=True)
class Published:
    """What papers say of a model, to hold against what its shapes give; 0: nothing known."""

    total: float = 0.0
    active: float = 0.0
    mtp: float = 0.0
    kv_bytes: int = 0
    training_gflops: float = 0.0
    """Per token, sequence length 4096."""
    note: str = ""


PUBLISHED = {
    "deepseek-v3": Published(
        671e9,
        36.7e9,
        11.5e9,
        70_272,
        250,
        "DeepSeek-V3 README_WEIGHTS.md; 2505.09343, tables 1 and 2. The README counts 0.9B of embedding and 0.9B of head into its 36.7B; "
        "shapes give 36.6B with the head alone, 37.6B with both. Its 11.5B of prediction are the decoder layer; the projection adds 0.1B",
    ),
    "deepseek-v2": Published(236e9, 21e9, training_gflops=155, note="2405.04434; 2505.09343, table 2"),
    "deepseek-v2-lite": Published(15.7e9, 2.4e9, note="2405.04434, appendix B"),
    "llama-3.1-405b": Published(405e9, kv_bytes=516_096, training_gflops=2448, note="2407.21783; 2505.09343, tables 1 and 2"),
    "qwen2.5-72b": Published(
        72.7e9,
        kv_bytes=327_680,
        training_gflops=394,
        note="2412.15115; 2505.09343, tables 1 and 2. The 394 does not fit the model's shapes: 6 x active parameters alone is 429",
    ),
}

BUILT_IN = {
    "deepseek-v3": _deepseek_v3(),
    "deepseek-v2": _deepseek_v2(),
    "deepseek-v2-lite": _deepseek_v2_lite(),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128),
    "qwen2.5-72b": _qwen25_72b(),
}
