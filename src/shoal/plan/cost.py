"""Parameters, FLOPs and bytes of a model, counted from its shapes.

Everything here derives from one inventory: the weight matrices of the model, each with the number of copies that are
stored and the number that one token passes through. Shapes are written [out, in] as in the checkpoints.

Conventions, used everywhere in `shoal plan` and in the trainer's reports:

- A multiply-add is 2 FLOPs. Only matrix products count: norms, softmax, RoPE, SwiGLU's product and the optimizer's
  elementwise work do not.
- Attention is causal. The mean context of a token in a packed sequence of T tokens is exactly (T + 1) / 2.
- Training costs 3 times the forward pass (one product for the input's gradient, one for the weight's). Recomputed
  activations are not counted: they are work of the layout, not of the model.
- The embedding is a lookup and costs no FLOPs, as are tables of n-grams and values; the head does, tied or not.
- A convolution over time counts a multiply-add per channel and token that it looks back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil

from ..config import ModelConfig, OptimizerConfig, UserError
from ..config.model import REPEAT_LENGTHS, REPEAT_STATES


@dataclass(frozen=True)
class Matrix:
    """`stored` equal weight matrices [out, in], of which a token passes through `active`."""

    part: str
    name: str
    out_features: int
    in_features: int
    stored: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part. `total` and `active` are the main model's, without multi-token prediction.

    `active` counts the parameters a token multiplies with: everything except the experts it is not routed to and the
    embedding (and other tables), of which it reads one row. The output head is in. This is what the published 36.7B (DeepSeek-V3),
    21B (V2) and 2.4B (V2-Lite) come out as; V3's README says that 0.9B of embedding are in its 36.7B, but its shapes
    give 37.5B with the embedding and 36.6B without.
    """

    embedding: int
    head: int
    """0 where the head is tied to the embedding."""
    attention: int
    """Projections (and their biases, Qwen2 only)."""
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    tables: int
    """Looked up by token or by n-gram, beside the embedding."""
    mixing: int
    """Convolutions over time, weights of embedding skips, and trust in counts and repetitions."""
    mtp: int
    """Parameters of the multi-token prediction modules, without the embedding and the head that they share."""
    active: int

    @property
    def total(self) -> int:
        parts = asdict(self)
        return sum(parts.values()) - self.mtp - self.active

    @property
    def trained(self) -> int:
        """Everything that is allocated and trained: the main model and the multi-token prediction modules."""
        return self.total + self.mtp


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by part. `mtp` holds the prediction modules whole: projection, layer, attention and head."""

    attention_projections: float
    attention_scores: float
    """Queries times keys, causal."""
    attention_values: float
    """Attention weights times values, causal."""
    dense_ffn: float
    routed_experts: float
    shared_experts: float
    router: float
    convolutions: float
    head: float
    mtp: float

    @property
    def main(self) -> float:
        return self.total - self.mtp

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def scaled(self, factor: float) -> Flops:
        return Flops(**{part: factor * flops for part, flops in asdict(self).items()})


@dataclass(frozen=True)
class NumberFormat:
    """Bits of one stored weight, and the scale that a block of weights shares."""

    name: str
    bits: float
    block: tuple[int, int] | None = None
    """Rows and columns of the block that shares one scale; None: no scales."""
    scale_bytes: int = 0

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one [rows, columns] matrix with its scales; edge blocks may be partial."""
        scales = 0
        if self.block:
            scales = ceil(rows / self.block[0]) * ceil(columns / self.block[1]) * self.scale_bytes
        return ceil(rows * columns * self.bits / 8) + scales


NUMBER_FORMATS = {
    "fp32": NumberFormat("fp32", 32),
    "bf16": NumberFormat("bf16", 16),
    "fp8": NumberFormat("fp8", 8, block=(128, 128), scale_bytes=4),
    "int8": NumberFormat("int8", 8, block=(1, 32), scale_bytes=2),
    "int4": NumberFormat("int4", 4, block=(1, 32), scale_bytes=2),
}
"""FP8 as in DeepSeek-V3's files (fp32 scale per 128x128 block); int8 and int4 as `shoal quantize` writes them (a 16-bit scale per 32)."""

QUANTIZED_PARTS = ("attention", "dense_ffn", "routed_experts", "shared_experts")
"""Parts that fp8, int8 and int4 apply to. In FP8 models embedding, head, router, norms and `eh_proj` stay in BF16 (V3 report, 3.3)."""

NEWTON_SCHULZ_STEPS = OptimizerConfig().muon_steps
"""Iterations of Muon's orthogonalisation, where a plan is not told otherwise."""

HIDDEN_PARTS = (*QUANTIZED_PARTS, "mtp_projection")
"""Parts whose matrices Muon trains; embedding, head, router and norms belong to AdamW."""

COUNTED_BYTES = 8 + 2
"""Of a counted n-gram: the entry and its count, whatever format the weights have."""


def attention_matrices(model: ModelConfig) -> list[Matrix]:
    """Projections of one attention layer: MLA (DeepSeek-V2, 2405.04434, section 2.1) or grouped-query attention."""
    width, heads, query = model.hidden_size, model.num_attention_heads, model.qk_head_dim
    output = Matrix("attention", "o_proj", width, heads * model.value_head_dim)
    if not model.uses_mla:
        keys = model.kv_heads * query
        projections = [("q_proj", heads * query), ("k_proj", keys), ("v_proj", keys)]
        return [*(Matrix("attention", name, size, width) for name, size in projections), output]
    rank, latent = model.q_lora_rank, model.kv_lora_rank
    if rank is None:
        queries = [Matrix("attention", "q_proj", heads * query, width)]
    else:
        queries = [Matrix("attention", "q_a_proj", rank, width), Matrix("attention", "q_b_proj", heads * query, rank)]
    down = Matrix("attention", "kv_a_proj_with_mqa", latent + model.qk_rope_head_dim, width)
    up = Matrix("attention", "kv_b_proj", heads * (model.qk_nope_head_dim + model.v_head_dim), latent)
    return [*queries, down, up, output]


def feed_forward_matrices(model: ModelConfig, moe: bool) -> list[Matrix]:
    """Matrices of one feed-forward layer: dense SwiGLU, or router, routed experts and shared experts."""
    if not moe:
        return _swiglu("dense_ffn", model.hidden_size, model.intermediate_size)
    experts, chosen = model.n_routed_experts or 0, model.num_experts_per_tok
    matrices = [Matrix("router", "gate", experts, model.hidden_size)]
    matrices += _swiglu("routed_experts", model.hidden_size, model.moe_intermediate_size, experts, chosen)
    if model.n_shared_experts:
        matrices += _swiglu("shared_experts", model.hidden_size, model.n_shared_experts * model.moe_intermediate_size)
    return matrices


def _swiglu(part: str, width: int, inner: int, stored: int = 1, active: int = 1) -> list[Matrix]:
    shapes = [("gate_proj", inner, width), ("up_proj", inner, width), ("down_proj", width, inner)]
    return [Matrix(part, name, rows, columns, stored, active) for name, rows, columns in shapes]


def layer_matrices(model: ModelConfig, moe: bool) -> list[Matrix]:
    """Matrices of one decoder layer."""
    return attention_matrices(model) + feed_forward_matrices(model, moe)


def layer_vectors(model: ModelConfig) -> tuple[int, int]:
    """(norm weights, biases) of one decoder layer."""
    norms = 2 * model.hidden_size
    if model.uses_mla:
        return norms + model.kv_lora_rank + (model.q_lora_rank or 0), 0
    biases = (model.num_attention_heads + 2 * model.kv_heads) * model.qk_head_dim if model.attention_bias else 0
    return norms, biases


def mtp_projection(model: ModelConfig) -> Matrix:
    """`eh_proj` of one multi-token prediction module: from the normalised stream and embedding, side by side, to the stream."""
    return Matrix("mtp_projection", "eh_proj", model.hidden_size, 2 * model.hidden_size)


def mtp_matrices(model: ModelConfig) -> list[Matrix]:
    """Matrices of all multi-token prediction modules, without the shared embedding and head (V3 report, section 2.2)."""
    matrices = []
    for depth in range(model.num_nextn_predict_layers):
        matrices.append(mtp_projection(model))
        matrices += layer_matrices(model, model.is_moe_layer(model.num_hidden_layers + depth))
    return matrices


def main_matrices(model: ModelConfig) -> Iterator[Matrix]:
    """Every matrix of the main model, layer by layer, and the head; the embedding comes first."""
    yield Matrix("embedding", "embed_tokens", model.vocab_size, model.hidden_size, active=0)
    for layer in range(model.num_hidden_layers):
        yield from layer_matrices(model, model.is_moe_layer(layer))
    yield Matrix("head", "lm_head", model.vocab_size, model.hidden_size, stored=0 if model.tie_word_embeddings else 1)


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameters by part, equal to what the `Transformer` allocates (the routing bias is a buffer and not counted)."""
    parts = dict.fromkeys(("embedding", "head", "attention", "dense_ffn", "routed_experts", "shared_experts", "router"), 0)
    active = 0
    for matrix in main_matrices(model):
        parts[matrix.part] += matrix.stored * matrix.size
        active += matrix.active * matrix.size
    layer_norms, biases = layer_vectors(model)
    norms = model.num_hidden_layers * layer_norms + model.hidden_size
    parts["attention"] += model.num_hidden_layers * biases
    active += norms + model.num_hidden_layers * biases

    mixing = model.num_hidden_layers * layer_mixing(model) + trust_parameters(model)
    extra = {"norms": norms, "tables": table_parameters(model), "mixing": mixing}
    return Parameters(**parts, **extra, mtp=sum(mtp_parameters(model).values()), active=active + mixing)


def table_parameters(model: ModelConfig) -> int:
    """Parameters of the tables beside the embedding: n-grams of every length, values of every layer."""
    return ngram_parameters(model) + model.num_hidden_layers * layer_values(model)


def ngram_parameters(model: ModelConfig) -> int:
    """Parameters of the tables of n-grams, which lie with the embedding."""
    return max(model.ngram_order - 1, 0) * model.ngram_rows * model.hidden_size


def layer_values(model: ModelConfig) -> int:
    """Parameters of a main layer's table of values."""
    width = model.kv_lora_rank if model.uses_mla else model.kv_heads * model.value_head_dim
    return model.value_embedding * model.vocab_size * width


def layer_mixing(model: ModelConfig) -> int:
    """Parameters of a main layer's convolution and embedding skip."""
    return model.convolution * model.hidden_size + 2 * model.embedding_skip


def trust_parameters(model: ModelConfig) -> int:
    """Parameters that weigh what counted n-grams and repetitions say."""
    counted = model.hidden_size + model.count_order + 1 if model.count_order else 0
    return counted + (model.hidden_size + len(REPEAT_LENGTHS) * REPEAT_STATES if model.repeat_window else 0)


def mtp_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of all multi-token prediction modules by part; embedding and head are the main model's."""
    modules = model.num_nextn_predict_layers
    matrices = mtp_matrices(model)
    projection = sum(matrix.stored * matrix.size for matrix in matrices if matrix.part == "mtp_projection")
    layer_norms, _ = layer_vectors(model)
    return {
        "decoder layer": sum(matrix.stored * matrix.size for matrix in matrices) - projection + modules * layer_norms,
        "projection of stream and embedding": projection,
        "norms of its own": modules * 3 * model.hidden_size,  # enorm, hnorm, shared_head.norm
    }


def forward_flops(model: ModelConfig, context: float, mtp: bool = False) -> Flops:
    """FLOPs per token of a forward pass in which a token attends to `context` tokens on average (expanded attention).

    With `mtp` the prediction modules run too, as they do in training.
    """
    parts = dict.fromkeys(("embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "head"), 0)
    for matrix in main_matrices(model):
        parts[matrix.part] += 2 * matrix.active * matrix.size
    scores = 2 * model.num_attention_heads * model.qk_head_dim * context
    values = 2 * model.num_attention_heads * model.value_head_dim * context
    prediction = 0.0
    if mtp:
        prediction = sum(2 * matrix.active * matrix.size for matrix in mtp_matrices(model))
        prediction += model.num_nextn_predict_layers * (scores + values + parts["head"])
    return Flops(
        attention_projections=parts["attention"],
        attention_scores=model.num_hidden_layers * scores,
        attention_values=model.num_hidden_layers * values,
        dense_ffn=parts["dense_ffn"],
        routed_experts=parts["routed_experts"],
        shared_experts=parts["shared_experts"],
        router=parts["router"],
        convolutions=2 * model.num_hidden_layers * model.convolution * model.hidden_size,
        head=parts["head"],
        mtp=prediction,
    )


def flops_per_token(model: ModelConfig, sequence_length: int, training: bool) -> Flops:
    """FLOPs per token over causal sequences of `sequence_length`: the training step (with MTP), or prefill (without)."""
    if sequence_length < 1:
        raise UserError(f"the sequence length is {sequence_length}: it must be at least 1")
    forward = forward_flops(model, (sequence_length + 1) / 2, mtp=training)
    return forward.scaled(3) if training else forward


def decode_flops_per_token(model: ModelConfig, context: float) -> float:
    """FLOPs to decode one token against a cache of `context` tokens, without MTP.

    MLA runs in its absorbed form (2405.04434, section 2.1.2): `kv_b_proj` is applied to the query and to the attention's
    output, at the cost of one pass per token, and every head reads the latent: scores over latent + rotary channels,
    values over latent channels.
    """
    flops = forward_flops(model, 0).total
    heads = model.num_attention_heads
    if model.uses_mla:
        channels = 2 * model.kv_lora_rank + model.qk_rope_head_dim
    else:
        channels = model.qk_head_dim + model.value_head_dim
    return flops + model.num_hidden_layers * 2 * heads * channels * context


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """FLOPs of `steps` quintic Newton-Schulz iterations on X [m, n], m <= n: A = X X^T, A A, and (bA + cAA) X."""
    m, n = min(rows, columns), max(rows, columns)
    return steps * (4 * m * m * n + 2 * m**3)


def optimizer_flops(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """FLOPs of Muon's orthogonalisation in one optimizer step: all hidden matrices, every expert (with `muon_split` head) for itself."""
    if optimizer.name != "muon":
        return 0
    flops = 0
    for matrix in [*main_matrices(model), *mtp_matrices(model)]:
        if matrix.part in HIDDEN_PARTS:
            blocks = (model.head_rows(matrix.name) if optimizer.muon_split else None) or (matrix.out_features,)
            flops += matrix.stored * sum(newton_schulz_flops(rows, matrix.in_features, optimizer.muon_steps) for rows in blocks)
    return flops


def kv_bytes_per_token(model: ModelConfig, number_format: str = "bf16") -> int:
    """Cache bytes per token over all layers of the main model; fp8 is one byte per value (scales per tensor)."""
    bytes_per_value = {"fp32": 4, "bf16": 2, "fp8": 1}
    if number_format not in bytes_per_value:
        raise UserError(f"the cache cannot be kept as {number_format!r}: use one of {', '.join(bytes_per_value)}")
    return model.num_hidden_layers * model.cache_values_per_token * bytes_per_value[number_format]


def number_format(name: str) -> NumberFormat:
    """The number format called `name`. Raises `UserError` for an unknown one."""
    if name not in NUMBER_FORMATS:
        raise UserError(f"unknown number format {name!r}: use one of {', '.join(NUMBER_FORMATS)}")
    return NUMBER_FORMATS[name]


def stored_as(part: str, weights: NumberFormat, mtp: bool = False) -> NumberFormat:
    """The number format of a matrix of `part` in a model whose weights are called `weights`; `mtp`: in a prediction module.

    FP8 as in DeepSeek-V3's files. int8 and int4 as `shoal quantize` writes them: embedding in bf16, router in fp32, head and
    prediction modules in int8.
    """
    if weights.block is None:
        return weights
    if weights.name == "fp8":
        return weights if part in QUANTIZED_PARTS else NUMBER_FORMATS["bf16"]
    if part in ("embedding", "router"):
        return NUMBER_FORMATS["bf16" if part == "embedding" else "fp32"]
    return NUMBER_FORMATS["int8"] if mtp or part == "head" else weights


def checkpoint_bytes(model: ModelConfig, weights: NumberFormat) -> int:
    """Bytes of the model's tensors on disk or in memory, every tensor once, routing biases in fp32 and counted n-grams included.

    Official DeepSeek-V3 files repeat the embedding and the head in the prediction module; they are counted once here. A head that is
    tied to the embedding is stored beside it in int8 and int4 models.
    """
    vector = NUMBER_FORMATS["fp32"] if weights.name in ("int8", "int4") else stored_as("norms", weights)
    modules = model.num_nextn_predict_layers
    total = sum(m.stored * stored_as(m.part, weights).matrix_bytes(m.out_features, m.in_features) for m in main_matrices(model))
    if model.tie_word_embeddings and weights.name in ("int8", "int4"):
        total += stored_as("head", weights).matrix_bytes(model.vocab_size, model.hidden_size)
    matrices = mtp_matrices(model)
    total += sum(m.stored * stored_as(m.part, weights, mtp=True).matrix_bytes(m.out_features, m.in_features) for m in matrices)
    layer_norms, biases = layer_vectors(model)
    vectors = table_parameters(model) + model.num_hidden_layers * layer_mixing(model) + trust_parameters(model)
    vectors += model.hidden_size + model.num_hidden_layers * (layer_norms + biases) + modules * (layer_norms + 3 * model.hidden_size)
    routing_biases = 0
    if model.topk_method == "noaux_tc":
        layers = sum(model.is_moe_layer(layer) for layer in range(model.num_hidden_layers + modules))
        routing_biases = layers * (model.n_routed_experts or 0)
    return total + vector.matrix_bytes(1, vectors) + 4 * routing_biases + COUNTED_BYTES * model.count_entries
