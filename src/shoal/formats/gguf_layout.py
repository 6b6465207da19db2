"""Which tensors a GGUF file holds for a model, and the metadata that tells llama.cpp how to run them.

The names and keys are those that llama.cpp's `deepseek2`, `llama` and `qwen2` architectures read (llama.cpp, gguf-py/gguf/constants.py).
Shapes: D model width, H heads, R latent width, N non-rotary, P rotary, V value channels of a head, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..config import ModelConfig
from ..model.attention import LATENT_NORM_EPS
from ..model.rope import scaling_kind, table_magnitude, yarn_magnitude
from .parts import EMBEDDING, HEAD_WEIGHT

Treatment = Literal["", "key_up", "value_up", "pairs"]
"""What happens to a tensor on its way: the key or value half of `kv_b_proj`, or rows from half-split to interleaved rotary pairs."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Rows by columns, as torch writes it, after the treatment."""
    sources: tuple[str, ...]
    """Official names of the weights it is made of; several are stacked."""
    treatment: Treatment = ""
    exact: bool = False
    """Stays fp32 whatever the rest becomes: norms, biases and routers."""


def gguf_obstacles(config: ModelConfig) -> list[str]:
    """Why llama.cpp would compute something else than Shoal from a GGUF file: a phrase for each setting in the way."""
    found = config.additions
    if config.qk_norm:
        found.append("model.qk_norm is on")
    if config.logit_softcap is not None:
        found.append(f"model.logit_softcap is {config.logit_softcap}")
    scaling = config.rope_scaling or {}
    if not config.uses_mla:
        queries = config.num_attention_heads * config.qk_head_dim
        if config.attention_bias and queries != config.hidden_size:
            found.append(
                f"llama.cpp's qwen2 has queries of model.hidden_size {config.hidden_size}, but its heads are {queries} wide together"
            )
        if config.attention_bias and scaling_kind(scaling) == "llama3":
            found.append("model.rope_scaling is llama3's, which llama.cpp does not apply to qwen2")
        return found
    if config.rms_norm_eps != LATENT_NORM_EPS:
        found.append(f"model.rms_norm_eps is {config.rms_norm_eps} and not the {LATENT_NORM_EPS} of the latents' norms")
    layers = config.num_hidden_layers
    if config.q_lora_rank is not None and (layers in (26, 27) or (layers == 48 and config.vocab_size == 128256)):
        found.append(f"llama.cpp takes a model of {layers} layers for one like V2-Lite, which has no model.q_lora_rank")
    if scaling_kind(scaling) == "llama3":
        found.append("model.rope_scaling is llama3's, which llama.cpp does not apply to latent attention")
    elif scaling_kind(scaling) == "yarn" and (table_magnitude(config) != 1.0 or not scaling.get("mscale_all_dim")):
        found.append("model.rope_scaling's mscale and mscale_all_dim differ or are missing")
    elif scaling_kind(scaling) == "yarn" and scaling["factor"] < 1:
        found.append(f"model.rope_scaling's factor {scaling['factor']} is less than 1, where llama.cpp's magnitude differs")
    if not config.n_routed_experts:
        return found
    if not config.n_shared_experts:
        found.append("model.n_shared_experts is 0, but llama.cpp needs a shared expert")
    if not config.routed_scaling_factor:
        found.append("model.routed_scaling_factor is 0, which llama.cpp takes for 1")
    if config.moe_layer_freq != 1:
        found.append(f"model.moe_layer_freq is {config.moe_layer_freq} and not 1")
    if _limits_groups(config) and config.topk_method != "noaux_tc":
        found.append("model.topk_method group_limited_greedy scores a group by its best expert, llama.cpp by its best two")
    return found


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name: `deepseek2` for MLA, `llama`, or `qwen2` (the one whose query, key and value have biases)."""
    if config.uses_mla:
        return "deepseek2"
    return "qwen2" if config.attention_bias else "llama"


def tensors(config: ModelConfig) -> Iterator[GgufTensor]:
    """Every tensor of the file, in its order. The MTP layers follow the main model's as blocks of their own."""
    width = config.hidden_size
    yield GgufTensor("token_embd.weight", (config.vocab_size, width), (EMBEDDING,))
    yield GgufTensor("output_norm.weight", (width,), ("model.norm.weight",), exact=True)
    if not config.tie_word_embeddings:
        yield GgufTensor("output.weight", (config.vocab_size, width), (HEAD_WEIGHT,))
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        block, official = f"blk.{layer}", f"model.layers.{layer}"
        yield GgufTensor(f"{block}.attn_norm.weight", (width,), (f"{official}.input_layernorm.weight",), exact=True)
        yield from _latent_attention(config, block, official) if config.uses_mla else _grouped_attention(config, block, official)
        yield GgufTensor(f"{block}.ffn_norm.weight", (width,), (f"{official}.post_attention_layernorm.weight",), exact=True)
        if config.is_moe_layer(layer):
            yield from _experts(config, block, official)
        else:
            yield from _feed_forward(block, "", width, config.intermediate_size, f"{official}.mlp")
        if layer >= config.num_hidden_layers:
            yield GgufTensor(f"{block}.nextn.eh_proj.weight", (width, 2 * width), (f"{official}.eh_proj.weight",))
            for ours, theirs in (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head.norm", "shared_head_norm")):
                yield GgufTensor(f"{block}.nextn.{theirs}.weight", (width,), (f"{official}.{ours}.weight",), exact=True)


def _latent_attention(config: ModelConfig, block: str, official: str) -> Iterator[GgufTensor]:
    width, heads, latent, rope = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    queries = heads * config.qk_head_dim
    attention = f"{official}.self_attn"
    if config.q_lora_rank is None:
        yield GgufTensor(f"{block}.attn_q.weight", (queries, width), (f"{attention}.q_proj.weight",))
    else:
        rank = config.q_lora_rank
        yield GgufTensor(f"{block}.attn_q_a.weight", (rank, width), (f"{attention}.q_a_proj.weight",))
        yield GgufTensor(f"{block}.attn_q_a_norm.weight", (rank,), (f"{attention}.q_a_layernorm.weight",), exact=True)
        yield GgufTensor(f"{block}.attn_q_b.weight", (queries, rank), (f"{attention}.q_b_proj.weight",))
    yield GgufTensor(f"{block}.attn_kv_a_mqa.weight", (latent + rope, width), (f"{attention}.kv_a_proj_with_mqa.weight",))
    yield GgufTensor(f"{block}.attn_kv_a_norm.weight", (latent,), (f"{attention}.kv_a_layernorm.weight",), exact=True)
    up = (f"{attention}.kv_b_proj.weight",)
    yield GgufTensor(f"{block}.attn_k_b.weight", (heads, latent, config.qk_nope_head_dim), up, "key_up")
    yield GgufTensor(f"{block}.attn_v_b.weight", (heads, config.v_head_dim, latent), up, "value_up")
    yield GgufTensor(f"{block}.attn_output.weight", (width, heads * config.v_head_dim), (f"{attention}.o_proj.weight",))


def _grouped_attention(config: ModelConfig, block: str, official: str) -> Iterator[GgufTensor]:
    width, queries, keys = config.hidden_size, config.num_attention_heads * config.qk_head_dim, config.kv_heads * config.qk_head_dim
    attention = f"{official}.self_attn"
    # The architecture `llama` turns interleaved pairs, `qwen2` turns halves, as the official files of both do.
    turned: Treatment = "" if config.attention_bias else "pairs"
    parts: tuple[tuple[str, int, Treatment], ...] = (("q", queries, turned), ("k", keys, turned), ("v", keys, ""))
    for part, rows, treatment in parts:
        yield GgufTensor(f"{block}.attn_{part}.weight", (rows, width), (f"{attention}.{part}_proj.weight",), treatment)
        if config.attention_bias:
            yield GgufTensor(f"{block}.attn_{part}.bias", (rows,), (f"{attention}.{part}_proj.bias",), treatment, exact=True)
    yield GgufTensor(f"{block}.attn_output.weight", (width, queries), (f"{attention}.o_proj.weight",))


def _experts(config: ModelConfig, block: str, official: str) -> Iterator[GgufTensor]:
    experts, width, inner = config.n_routed_experts or 0, config.hidden_size, config.moe_intermediate_size
    yield GgufTensor(f"{block}.ffn_gate_inp.weight", (experts, width), (f"{official}.mlp.gate.weight",), exact=True)
    if config.topk_method == "noaux_tc":
        yield GgufTensor(f"{block}.exp_probs_b.bias", (experts,), (f"{official}.mlp.gate.e_score_correction_bias",), exact=True)
    for part, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        sources = tuple(f"{official}.mlp.experts.{e}.{part}_proj.weight" for e in range(experts))
        yield GgufTensor(f"{block}.ffn_{part}_exps.weight", (experts, *shape), sources)
    yield from _feed_forward(block, "_shexp", width, (config.n_shared_experts or 0) * inner, f"{official}.mlp.shared_experts")


def _feed_forward(block: str, suffix: str, width: int, inner: int, official: str) -> Iterator[GgufTensor]:
    for part, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        yield GgufTensor(f"{block}.ffn_{part}{suffix}.weight", shape, (f"{official}.{part}_proj.weight",))


def add_shape(writer: Any, config: ModelConfig) -> None:
    """Put the model's shape into a `gguf.GGUFWriter` made for `architecture(config)`."""
    depths = config.num_nextn_predict_layers
    writer.add_block_count(config.num_hidden_layers + depths)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.rope_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.uses_mla:
        # llama.cpp runs the absorbed form: one head of keys, the latent and the rotary key, whose values are the latent.
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(config.qk_head_dim)
        writer.add_value_length_mla(config.v_head_dim)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_q_lora_rank(config.q_lora_rank or 0)
        _add_experts(writer, config)
        if depths:
            writer.add_nextn_predict_layers(depths)
    else:
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.qk_head_dim)
        writer.add_value_length(config.qk_head_dim)
    _add_rope_scaling(writer, config)


def _add_experts(writer: Any, config: ModelConfig) -> None:
    import gguf

    experts = config.n_routed_experts
    if not experts or config.first_k_dense_replace >= config.num_hidden_layers:
        writer.add_leading_dense_block_count(config.num_hidden_layers + config.num_nextn_predict_layers)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_shared_count(0)
        return
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts or 0)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    gating = gguf.ExpertGatingFuncType.SIGMOID if config.scoring_func == "sigmoid" else gguf.ExpertGatingFuncType.SOFTMAX
    writer.add_expert_gating_func(gating)
    if _limits_groups(config):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _limits_groups(config: ModelConfig) -> bool:
    """Whether a token cannot reach some groups of experts."""
    return config.topk_method != "greedy" and config.topk_group < config.n_group


def _add_rope_scaling(writer: Any, config: ModelConfig) -> None:
    import gguf

    scaling = config.rope_scaling or {}
    if scaling_kind(scaling) != "yarn":  # llama3's factors are a tensor
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    factor = float(scaling["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(float(scaling.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(scaling.get("beta_slow") or 1))
    if config.uses_mla:
        # llama.cpp divides this key by 0.1 for deepseek2, for the sake of early files.
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])
    else:
        # llama.cpp multiplies by YaRN's magnitude itself.
        writer.add_rope_scaling_attn_factors(table_magnitude(config) / yarn_magnitude(factor, 1.0))
