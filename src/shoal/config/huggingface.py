"""Hugging Face `config.json` dictionaries to `ModelConfig` and back, without torch or transformers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .errors import UserError
from .model import ModelConfig, is_number

SHOAL = "shoal"
"""`model_type` of files that only Shoal can open; `base_model_type` then says what they are built on."""

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
_REQUIRED_MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_REQUIRED_MOE = ("num_experts_per_tok", "moe_intermediate_size")

_PLAIN = {"n_routed_experts": None, "n_shared_experts": None, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
# What an official file of this type means where it leaves a key out (or null), as transformers' modelling code has it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        **_PLAIN,
    },
    "deepseek_v2": {
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        **_PLAIN,
    },
    "llama": {"n_routed_experts": None},
}
_SUPPORTED = (*_DEFAULTS, "qwen2")
_FIRST_AND_LAST: dict[str, tuple[int | None, int | None]] = {
    "deepseek_v3": (0, 1), "deepseek_v2": (1, 2), "llama": (1, 2), "qwen2": (None, None),
}  # fmt: skip
"""`bos_token_id` and `eos_token_id` of a file that leaves them out, as transformers' configurations have it; null is null."""
_UNDERSTOOD = ("rope_parameters", "original_max_position_embeddings", "architectures", "hidden_act", "base_model_type")
_OF_ITS_FOLDER = ("auto_map", "transformers_version")
"""Names Python files that lie beside the file, and who wrote it: not true of another folder."""
_OWN = (
    *("qk_norm", "logit_softcap", "init", "zero_init_output"),
    *("ngram_order", "ngram_rows", "count_order", "count_entries", "repeat_window", "embedding_skip", "value_embedding", "convolution"),
)
_NULLABLE = (
    *("q_lora_rank", "num_key_value_heads", "head_dim", "n_routed_experts", "n_shared_experts", "rope_scaling", "logit_softcap"),
    *("bos_token_id", "eos_token_id"),
)
_MOE_FIELDS = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "moe_layer_freq",
    "topk_method",
    "scoring_func",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
_MLA_FIELDS = ("q_lora_rank", *_REQUIRED_MLA, *_MOE_FIELDS, "num_nextn_predict_layers")
_GQA_FIELDS = ("num_key_value_heads", "head_dim", "attention_bias")
_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def model_config_from_dict(d: dict[str, Any]) -> ModelConfig:
    """Read the dictionary of a `config.json` (DeepSeek-V2, V2-Lite, V3, R1; Llama; Qwen2), validated.

    Both the style of the official files (`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`)
    are understood. Qwen2 becomes `llama` with `attention_bias`. Keys without meaning for Shoal go to `extra`.

    Raises `UserError` for an unsupported `model_type`, a missing shape, or a feature that Shoal's model does not have.
    """
    written = d.get("model_type")
    if written == SHOAL:
        d = {**d, "model_type": d.get("base_model_type")}
        written = d["model_type"]
    if not isinstance(written, str) or written not in _SUPPORTED:
        raise UserError(f"model_type {written!r} is not supported: Shoal reads {', '.join(_SUPPORTED)}")
    model_type = "llama" if written == "qwen2" else written
    _refuse_other_models(d, written)

    known = {field.name for field in fields(ModelConfig)} - {"extra"}
    values = {key: value for key, value in d.items() if key in known and (value is not None or key in _NULLABLE)}
    extra = {key: value for key, value in d.items() if key not in {*known, *_UNDERSTOOD, *_OF_ITS_FOLDER}}
    values["model_type"] = model_type
    if written == "qwen2":
        values["attention_bias"] = True
    values["rope_theta"], values["rope_scaling"] = _read_rope(d)
    for key, default in zip(("bos_token_id", "eos_token_id"), _FIRST_AND_LAST[written], strict=True):
        values.setdefault(key, default)
        if isinstance(values[key], list) and values[key]:  # Llama-3.1 Instruct ends on any of three tokens
            extra[key] = values[key]
            values[key] = values[key][0]

    if model_type == "llama":
        values = {key: value for key, value in values.items() if key not in _MLA_FIELDS}
        required: tuple[str, ...] = _REQUIRED
    else:
        # transformers writes head_dim (the rotary width) and num_key_value_heads (all heads) for MLA too: derived, not settings
        values = {key: value for key, value in values.items() if key not in _GQA_FIELDS}
        extra.pop("qk_head_dim", None)
        for key in ("n_routed_experts", "n_shared_experts"):
            values[key] = values.get(key) or None
        required = _REQUIRED + _REQUIRED_MLA + (_REQUIRED_MOE if values["n_routed_experts"] else ())
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}: a {written} model cannot be built without")

    config = ModelConfig(**{**_DEFAULTS[model_type], **values}, extra=extra)
    config.validate()
    return config


def _refuse_other_models(d: dict[str, Any], model_type: str) -> None:
    """Raise `UserError` where the file asks for something that Shoal's model would silently leave out."""
    if d.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {d['hidden_act']!r} is not supported: Shoal's feed-forward layers are SwiGLU (silu)")
    if d.get("attention_bias") and model_type != "qwen2":
        raise UserError(f"attention_bias in a {model_type} model puts a bias on o_proj too, which Shoal does not have")
    if d.get("mlp_bias"):
        raise UserError("mlp_bias is not supported: Shoal's feed-forward layers have no biases")
    if d.get("rope_interleave") is False:
        raise UserError("rope_interleave false is not supported: Shoal turns interleaved pairs, as the official checkpoints have them")
    if d.get("use_sliding_window"):
        raise UserError("use_sliding_window is not supported: Shoal attends to the whole context")


def _read_rope(d: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling or None); the kind of scaling is called `type`, whatever the file calls it."""
    for key in ("rope_parameters", "rope_scaling"):
        if d.get(key) and not isinstance(d[key], dict):
            raise UserError(f"{key} is {d[key]!r}: it must be a table or null")
    tables = [d[key] for key in ("rope_parameters", "rope_scaling") if d.get(key)]
    first, *others = [_read_rope_table(d, table) for table in tables or [{}]]
    if others and others[0] != first:
        raise UserError("config.json has rope_parameters and a rope_scaling that says otherwise: keep one of them (and rope_theta)")
    return first


def _read_rope_table(d: dict[str, Any], table: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """What one of the tables says, with what stands beside it in `config.json`, in the order of precedence that transformers has."""
    scaling = {key: value for key, value in table.items() if value is not None}
    theta = scaling.pop("rope_theta", d.get("rope_theta", 10000.0))
    if not is_number(theta):
        raise UserError(f"rope_theta is {theta!r}: it must be a number")
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    if not isinstance(kind, str):
        raise UserError(f"rope_scaling type {kind!r} is not supported: use yarn, llama3 or none")
    if kind == "default":
        return float(theta), None
    if d.get("original_max_position_embeddings") is not None:
        scaling["original_max_position_embeddings"] = d["original_max_position_embeddings"]
    return float(theta), {"type": kind, **scaling}


def model_config_to_dict(cfg: ModelConfig, dtype: str | None = None, *, own_weights: bool = False) -> dict[str, Any]:
    """The dictionary of a `config.json` that transformers, vLLM and SGLang understand; inverse of `model_config_from_dict`.

    RoPE is written in the style of the official files, which transformers 4 and 5 both read. `dtype` is the name of the
    weights' type, by default the one in `extra`, or bfloat16. Shoal's own fields are written where they are not off.
    A `llama` with `attention_bias` is written as Qwen2, the type whose biases sit on query, key and value only.
    A model with `export_obstacles` gets the `model_type` "shoal", so that no other program opens it and computes something else; so does
    any with `own_weights`, which lie in files that only Shoal reads.
    """
    model_type = "qwen2" if cfg.model_type == "llama" and cfg.attention_bias else cfg.model_type
    written: dict[str, Any] = {"architectures": [_ARCHITECTURES[model_type]], "model_type": model_type}
    shared = (*_REQUIRED, "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "initializer_range")
    written.update({name: getattr(cfg, name) for name in shared})
    scaling = cfg.rope_scaling
    written["rope_scaling"] = {**scaling, "rope_type": scaling.get("type", scaling.get("rope_type"))} if scaling else None
    if cfg.uses_mla:
        written.update({name: getattr(cfg, name) for name in _MLA_FIELDS})
        written["num_key_value_heads"] = cfg.num_attention_heads  # MLA expands to one key and value per query head
        written["attention_bias"] = False
        # transformers wants numbers here, and builds the mixture from layer first_k_dense_replace on
        written["n_routed_experts"] = cfg.n_routed_experts or 0
        written["n_shared_experts"] = cfg.n_shared_experts or 0
        if not cfg.n_routed_experts:
            written["first_k_dense_replace"] = cfg.num_hidden_layers
    else:
        written["num_key_value_heads"] = cfg.kv_heads
        if cfg.head_dim is not None:
            written["head_dim"] = cfg.head_dim
        if model_type == "llama":
            written["attention_bias"] = False
    written["hidden_act"] = "silu"
    written.update(bos_token_id=cfg.bos_token_id, eos_token_id=cfg.eos_token_id)
    plain = ModelConfig()
    written.update({name: getattr(cfg, name) for name in _OWN if getattr(cfg, name) != getattr(plain, name)})

    written.update({key: value for key, value in cfg.extra.items() if key not in written})
    for key in ("bos_token_id", "eos_token_id"):
        several = cfg.extra.get(key)
        if isinstance(several, list) and several[0] == getattr(cfg, key):
            written[key] = several
    if own_weights or export_obstacles(cfg):
        del written["architectures"]
        written.update(model_type=SHOAL, base_model_type=model_type)
    written["torch_dtype"] = dtype or cfg.extra.get("torch_dtype") or cfg.extra.get("dtype") or "bfloat16"
    written.pop("dtype", None)
    return written


def export_obstacles(cfg: ModelConfig) -> list[str]:
    """Why transformers would compute something else from plain files of this `model_type`: a phrase for each setting in the way."""
    found = cfg.additions
    if cfg.qk_norm:
        found.append("model.qk_norm is on")
    if cfg.logit_softcap is not None:
        found.append(f"model.logit_softcap is {cfg.logit_softcap}")
    if cfg.model_type != "deepseek_v3" and cfg.hidden_size % cfg.num_attention_heads:
        found.append(f"model.hidden_size {cfg.hidden_size} is not a multiple of the {cfg.num_attention_heads} attention heads")
    if not cfg.uses_mla or not cfg.n_routed_experts:
        return found
    if cfg.moe_layer_freq != 1:
        found.append(f"model.moe_layer_freq is {cfg.moe_layer_freq} and not 1")
    wanted: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
    if cfg.model_type == "deepseek_v2":
        wanted = {"scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy"), "norm_topk_prob": (False,)}
    for name, values in wanted.items():
        if getattr(cfg, name) not in values:
            found.append(f"model.{name} is {getattr(cfg, name)} and not {' or '.join(map(str, values))}")
    return found
