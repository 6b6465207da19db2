"""The shape of a model, in the vocabulary of Hugging Face's `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

import tyro

from .errors import UserError

ModelType = Literal["deepseek_v3", "deepseek_v2", "llama"]
TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]
ScoringFunction = Literal["softmax", "sigmoid"]
Initialisation = Literal["normal", "fan_in", "anchored", "copying"]
CHOICES: dict[str, Any] = {"model_type": ModelType, "topk_method": TopkMethod, "scoring_func": ScoringFunction, "init": Initialisation}

SCALING_NEEDS: dict[str | None, tuple[str, ...]] = {
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What `rope_scaling` must hold, by type."""
SCALING_TAKES: dict[str | None, tuple[str, ...]] = {
    "yarn": (
        *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
        "finetuned",  # how the first models with YaRN were made, not how they are run
    ),
    "llama3": (),
}
"""What it may hold besides."""
SCALING_NUMBERS = {
    *("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("mscale", "mscale_all_dim"),
}
"""What must be a number where `rope_scaling` holds it and it is not null; above 0 but for the last two, which may be 0."""

LONGEST_NGRAM = 8

REPEAT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Of repetitions that are told apart, in tokens."""
REPEAT_STATES = 3
"""Of each: what the repetition before it says."""

LARGEST = {"num_hidden_layers": 1000, "num_nextn_predict_layers": 100, "n_routed_experts": 2**14, "hidden_size": 2**20, "vocab_size": 2**24}
"""Above these no model is plausible; of other whole numbers the largest is 2^31 - 1."""


@dataclass
class ModelConfig:
    """Every field that shapes a `Transformer`; names and meaning as in the official `config.json` files.

    `model_type` decides the attention: `deepseek_v2` and `deepseek_v3` use MLA, `llama` uses GQA. A DeepSeek model
    with `n_routed_experts = None` is dense throughout.

    The last fields are Shoal's own. Those that plain `deepseek_v3` or `llama` files cannot hold are off unless asked for; how a model
    begins (`init`, `zero_init_output`) never hinders export.
    """

    model_type: ModelType = "deepseek_v3"
    """Kind of the files."""
    vocab_size: int = 8192
    """Tokens that there are."""
    hidden_size: int = 384
    """Width of the model."""
    num_hidden_layers: int = 8
    """Layers, without those of multi-token prediction."""
    intermediate_size: int = 1024
    """Width of a dense SwiGLU feed-forward layer."""
    num_attention_heads: int = 6
    """Query heads."""
    max_position_embeddings: int = 4096
    """Longest context in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square that norms divide by."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """None, or YaRN: {type: yarn, factor, beta_fast, beta_slow, mscale, mscale_all_dim, original_max_position_embeddings}."""
    tie_word_embeddings: bool = False
    """The output head is the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of first weights, where `init` is normal."""

    # Multi-head Latent Attention (DeepSeek-V2, 2405.04434, section 2.1)
    q_lora_rank: int | None = None
    """MLA: width of the latent that queries come from; None: they come from the hidden state."""
    kv_lora_rank: int = 128
    """MLA: width of the latent that keys and values come from, which is what the cache holds."""
    qk_nope_head_dim: int = 64
    """MLA: what of a query or key head does not turn with position."""
    qk_rope_head_dim: int = 32
    """MLA: what of it turns; all heads share one such key."""
    v_head_dim: int = 64
    """MLA: width of a value head."""

    # Grouped-query attention (Llama)
    num_key_value_heads: int | None = None
    """llama: heads of keys and values; None: as many as of queries."""
    head_dim: int | None = None
    """llama: width of a head; None: hidden_size / num_attention_heads."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2.5 style); Llama and DeepSeek have none."""

    # DeepSeekMoE (2401.06066) and its routing
    n_routed_experts: int | None = 16
    """Experts of a layer that a router chooses from; None or 0: the model is dense."""
    n_shared_experts: int | None = 1
    """Experts that every token passes."""
    num_experts_per_tok: int = 4
    """Routed experts of a token."""
    moe_intermediate_size: int = 192
    """Width of one routed expert; the shared experts together are `n_shared_experts` times as wide."""
    first_k_dense_replace: int = 1
    """First layers, which have a dense feed-forward part."""
    moe_layer_freq: int = 1
    """Behind them, one layer of so many has experts."""
    topk_method: TopkMethod = "noaux_tc"
    """How experts are chosen: `greedy`, `group_limited_greedy` (V2), or `noaux_tc` (V3: groups, and a bias that balances)."""
    scoring_func: ScoringFunction = "sigmoid"
    """What turns the router's logits into scores."""
    n_group: int = 1
    """Groups of experts."""
    topk_group: int = 1
    """Groups that a token's experts come from."""
    norm_topk_prob: bool = True
    """Weights of a token's experts add up to 1, before they are scaled."""
    routed_scaling_factor: float = 1.0
    """Times the sum of the routed experts."""

    # Multi-token prediction (DeepSeek-V3, 2412.19437, section 2.2)
    num_nextn_predict_layers: int = 0
    """Modules, each of which predicts one token further."""

    bos_token_id: int | None = 0
    """None, or -1: there is no such token."""
    eos_token_id: int | None = 1
    """Ends a text; None, or -1: there is no such token."""

    # Shoal's own
    qk_norm: bool = False
    """RMSNorm without weights on every query and key head. Not exportable."""
    logit_softcap: float | None = None
    """Logits become cap * tanh(logits / cap). Not exportable."""
    init: Initialisation = "normal"
    """`normal`: every matrix with std `initializer_range`; `fan_in`: hidden matrices with std 1/sqrt(fan_in); `anchored`: the same, but
    with a constant channel in the embedding, and heads that begin by looking at the tokens before; `copying`: besides, with a head of MLA's
    second layer that finds repetitions."""
    zero_init_output: bool = False
    """Start `o_proj` and `down_proj` at zero, so that every block starts as the identity."""
    ngram_order: int = 0
    """Tables of n-grams of 2 to so many tokens join the embedding; 0 for none. Not exportable."""
    ngram_rows: int = 16384
    """Rows of the table of every length."""
    count_order: int = 0
    """Longest context whose continuations in the training text are counted, as a prior of the output that the network corrects; 0 for none.
    Not exportable."""
    count_entries: int = 0
    """N-grams that were counted; training sets it."""
    repeat_window: int = 0
    """Tokens back to which a repetition of the last ones is looked for; what followed it is a hint for the output. 0 for none.
    Not exportable."""
    embedding_skip: bool = False
    """Every layer starts from a learned mixture of its input and the embedding. Not exportable."""
    value_embedding: bool = False
    """Attention's values (MLA: its latent) get a vector of the token, from a table of every layer. Not exportable."""
    convolution: int = 0
    """Tokens that a causal convolution before attention looks back; 0 for none. Not exportable."""

    extra: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Keys of a loaded `config.json` that Shoal does not use, kept so that saving loses nothing."""

    def __post_init__(self) -> None:
        # Files write "no experts" as null or 0; here it is None.
        self.n_routed_experts = self.n_routed_experts or None
        self.n_shared_experts = self.n_shared_experts or None
        self.bos_token_id = None if self.bos_token_id == -1 else self.bos_token_id
        self.eos_token_id = None if self.eos_token_id == -1 else self.eos_token_id

    @property
    def uses_mla(self) -> bool:
        return self.model_type != "llama"

    @property
    def qk_head_dim(self) -> int:
        """Width of one query/key head."""
        if self.uses_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """Number of query/key channels that RoPE turns."""
        return self.qk_rope_head_dim if self.uses_mla else self.qk_head_dim

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim if self.uses_mla else self.qk_head_dim

    def head_rows(self, matrix: str) -> tuple[int, ...] | None:
        """Rows of the matrices that an attention's projection, called `matrix`, puts on top of each other; None for any other one.

        Each is what one head has for one purpose: its non-rotary or rotary queries, its keys, its values; of MLA's down-projection what
        makes the latent, and what makes the rotary key.
        """
        heads = self.num_attention_heads
        if not self.uses_mla:
            counts = {"q_proj": heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
            return (self.qk_head_dim,) * counts[matrix] if matrix in counts else None
        queries = (self.qk_nope_head_dim, self.qk_rope_head_dim) * heads
        return {
            "q_proj": queries,
            "q_b_proj": queries,
            "kv_a_proj_with_mqa": (self.kv_lora_rank, self.qk_rope_head_dim),
            "kv_b_proj": (self.qk_nope_head_dim, self.v_head_dim) * heads,
        }.get(matrix)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def cache_values_per_token(self) -> int:
        """Numbers cached per token and layer: what attention reads, and what a convolution does."""
        return self.attention_values_per_token + (self.hidden_size if self.convolution else 0)

    @property
    def attention_values_per_token(self) -> int:
        """Of them, the latent and the shared rotary key (MLA), or keys and values (GQA)."""
        if self.uses_mla:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.qk_head_dim

    @property
    def looks_back(self) -> int:
        """Tokens before each that are looked at beside attention: by tables of n-grams, and for repetitions."""
        return max(self.ngram_order - 1, self.count_order - 1, self.repeat_window + REPEAT_LENGTHS[-1] - 1 if self.repeat_window else 0, 0)

    @property
    def additions(self) -> list[str]:
        """The settings in use, each as a phrase, of parts that only Shoal's model has."""
        return self._in_use("ngram_order", "count_order", "repeat_window", "embedding_skip", "value_embedding", "convolution")

    @property
    def in_torch_only(self) -> list[str]:
        """Of these, those of parts that the C++ decoder does not have and quantized folders do not hold."""
        return self._in_use("ngram_order", "embedding_skip", "convolution")

    def _in_use(self, *names: str) -> list[str]:
        plain = ModelConfig()
        return [f"model.{name} is {value}" for name in names if (value := getattr(self, name)) != getattr(plain, name)]

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward part of `layer` is a mixture of experts.

        MTP layers (>= num_hidden_layers) follow the main model's last.
        """
        if not self.uses_mla or not self.n_routed_experts:
            return False
        if layer >= self.num_hidden_layers:
            return self.first_k_dense_replace < self.num_hidden_layers
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def validate(self) -> None:
        """Raise `UserError` on the first setting that cannot work, with what to do about it."""
        self._validate_types()
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
        positive += ["max_position_embeddings", "q_lora_rank", "num_key_value_heads", "head_dim"]
        if self.uses_mla:
            positive += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} is {value}: it must be at least 1")
        for name in ("rms_norm_eps", "rope_theta", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{name} is {value}: it must be more than 0")
        if not 0 <= self.initializer_range < math.inf:
            raise UserError(f"model.initializer_range is {self.initializer_range}: it must be 0 or more")
        if self.ngram_order not in (0, *range(2, LONGEST_NGRAM + 1)):
            raise UserError(f"model.ngram_order is {self.ngram_order}: it must be 0 for no tables, or 2 to {LONGEST_NGRAM}")
        if self.ngram_rows < 1:
            raise UserError(f"model.ngram_rows is {self.ngram_rows}: it must be at least 1")
        if self.count_entries < 0:
            raise UserError(f"model.count_entries is {self.count_entries}: it must be 0, until training sets it")
        if not 0 <= self.count_order <= LONGEST_NGRAM:
            raise UserError(f"model.count_order is {self.count_order}: it must be 0 for no counts, or 1 to {LONGEST_NGRAM}")
        if self.repeat_window < 0:
            raise UserError(f"model.repeat_window is {self.repeat_window}: it must be 0 for none, or the tokens to look back")
        for name in ("count_order", "repeat_window"):
            if getattr(self, name) and (self.logit_softcap or self.num_nextn_predict_layers):
                raise UserError(f"model.{name} knows neither logit_softcap nor multi-token prediction: leave them away, or set it to 0")
        if self.convolution < 0:
            raise UserError(f"model.convolution is {self.convolution}: it must be 0 for none, or the tokens to look back")
        if self.rope_dim % 2:
            raise UserError(f"RoPE turns pairs of channels, but its width is {self.rope_dim}: make it even")
        if not self.uses_mla:
            self._validate_gqa()
        elif self.n_routed_experts:
            self._validate_moe(self.n_routed_experts)
        if self.init == "copying":
            self._validate_copying()
        if self.num_nextn_predict_layers < 0:
            raise UserError("model.num_nextn_predict_layers is negative: use 0 for no multi-token prediction")
        if self.num_nextn_predict_layers and not self.uses_mla:
            raise UserError("multi-token prediction needs a DeepSeek model: set model.num_nextn_predict_layers to 0 for llama")
        self._validate_scaling(self.rope_scaling or {})

    def _validate_copying(self) -> None:
        if not self.uses_mla or self.q_lora_rank is not None or self.tie_word_embeddings or not self.zero_init_output:
            raise UserError(
                "model.init copying is for MLA without q_lora_rank, an output head of its own (tie_word_embeddings false) and blocks that "
                "start as the identity (zero_init_output true): change these, or set model.init anchored"
            )
        if min(self.num_hidden_layers, self.num_attention_heads, self.kv_lora_rank) < 2 or self.hidden_size < 8:
            raise UserError("model.init copying needs two layers, two heads, a latent of 2 and a width of 8: set model.init anchored")

    def _validate_types(self) -> None:
        """Files may hold anything: every setting must be of its kind before it is compared with numbers."""
        for setting in fields(self):
            if setting.name in ("rope_scaling", "extra"):
                continue
            value, kind = getattr(self, setting.name), str(setting.type)
            if value is None and kind.endswith("| None"):
                continue
            kind = kind.removesuffix(" | None")
            if kind == "int":
                largest = LARGEST.get(setting.name, 2**31 - 1)
                if type(value) is not int or abs(value) > largest:
                    raise UserError(f"model.{setting.name} is {value!r}: it must be a whole number of at most {largest:,}")
            elif kind == "float":
                if not is_number(value):
                    raise UserError(f"model.{setting.name} is {value!r}: it must be a number")
            elif kind == "bool":
                if type(value) is not bool:
                    raise UserError(f"model.{setting.name} is {value!r}: it must be true or false")
            else:
                choices = get_args(CHOICES[setting.name])
                if value not in choices:
                    raise UserError(f"model.{setting.name} is {value!r}: it must be one of {', '.join(choices)}")

    def _validate_scaling(self, scaling: dict[str, Any]) -> None:
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind not in (None, "yarn", "default", "llama3"):
            raise UserError(f"rope_scaling type {kind!r} is not supported: use yarn, llama3 or none")
        for name in sorted(SCALING_NUMBERS & scaling.keys()):
            value = scaling[name]
            least_is_zero = name.startswith("mscale")
            if value is not None and not (is_number(value) and (value > 0 or (least_is_zero and value == 0))):
                raise UserError(f"model.rope_scaling has {name} {value!r}: it must be a number above 0")
        missing = [name for name in SCALING_NEEDS.get(kind, ()) if scaling.get(name) is None]
        if missing:
            raise UserError(f"model.rope_scaling of type {kind} lacks the number {', '.join(missing)}: add it")
        known = {"type", "rope_type", *SCALING_NEEDS.get(kind, ()), *SCALING_TAKES.get(kind, ())}
        unknown = [name for name, value in scaling.items() if value is not None and name not in known]
        if unknown and kind in SCALING_TAKES:
            raise UserError(f"model.rope_scaling of type {kind} has {', '.join(unknown)}, which Shoal does not know: it would be left out")
        if scaling.get("truncate") not in (None, True):
            raise UserError(
                f"model.rope_scaling has truncate {scaling['truncate']!r}: Shoal's YaRN has only true, a range of whole channels"
            )
        if kind == "yarn" and self.rope_theta <= 1:
            raise UserError(f"model.rope_theta is {self.rope_theta}: YaRN needs more than 1")
        if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise UserError("model.rope_scaling has a low_freq_factor that is not below its high_freq_factor: swap them")

    def _validate_gqa(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise UserError(f"model.hidden_size {self.hidden_size} does not divide into {heads} heads: change one or set model.head_dim")
        if heads % kv_heads:
            raise UserError(f"{heads} query heads cannot share {kv_heads} key/value heads: make the first a multiple of the second")

    def _validate_moe(self, experts: int) -> None:
        if experts < 1:
            raise UserError(f"model.n_routed_experts is {experts}: it must be at least 1, or null for none")
        if not 1 <= self.num_experts_per_tok <= experts:
            raise UserError(f"model.num_experts_per_tok is {self.num_experts_per_tok}: it must be between 1 and the {experts} experts")
        for name in ("moe_intermediate_size", "moe_layer_freq"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("n_shared_experts", "first_k_dense_replace"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.topk_method != "greedy":
            if self.n_group < 1 or experts % self.n_group:
                raise UserError(f"{experts} experts do not divide into {self.n_group} groups: change model.n_group")
            if not 1 <= self.topk_group <= self.n_group:
                raise UserError(f"model.topk_group is {self.topk_group}: it must be between 1 and n_group = {self.n_group}")
            reachable = experts // self.n_group * self.topk_group
            if self.num_experts_per_tok > reachable:
                chosen = self.num_experts_per_tok
                raise UserError(f"{self.topk_group} groups hold {reachable} experts, fewer than num_experts_per_tok = {chosen}")
            if self.topk_method == "noaux_tc" and experts // self.n_group < 2:
                raise UserError("noaux_tc scores a group by its best two experts: give each group at least 2")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) < 1e300
