"""What a training run on one CPU can do against its need for memory, what each measure saves, and what it costs.

Bytes follow from shapes (`memory.saved_values`); seconds from two round rates, as they only have to put the measures in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..config import Recomputed, TrainConfig
from .cost import count_parameters, flops_per_token, forward_flops
from .memory import saved_values

FLOPS, BYTES = 1e11, 1e10
"""Of a CPU, per second; their quotient says how much recomputation a byte is worth."""
GAPS = {False: 1.3, True: 1.05}
"""Resident over live bytes of activations, without and with memory that is returned at once."""
LOGIT_ROWS = 512
ORTHOGONALISED = 3 * (16 << 20)
"""Bytes that Muon works in: as many matrices as it takes at once, and copies."""
SAVED_BY: dict[Recomputed, dict[str, float]] = {
    "swiglu": {"hidden": 1.0},
    "feed_forward": {"hidden": 1.0, "gate_up": 1.0, "inputs": 1.0, "outputs": 1.0, "routing": 1.0, "norms": 0.5},
    "attention": {"attention": 1.0, "queries": 1.0, "unsplit": 1.0, "latent": 1.0, "latent_norms": 1.0, "norms": 0.5},
}
"""Shares of what a layer keeps that are not kept where something is computed again."""
RECOMPUTE: tuple[tuple[Recomputed, ...], ...] = (
    (), ("swiglu",), ("attention",), ("swiglu", "attention"), ("feed_forward",), ("feed_forward", "attention"),
)  # fmt: skip


@dataclass(frozen=True)
class Measures:
    """One choice of all measures."""

    micro_batch: int
    recompute: tuple[Recomputed, ...] = ()
    bf16_moments: bool = False
    return_memory: bool = False
    offload: bool = False
    update_early: bool = False

    def apply(self, config: TrainConfig) -> TrainConfig:
        """`config` with them."""
        moments = "bf16" if self.bf16_moments else config.optimizer.moments
        return replace(
            config, micro_batch_size=None if self.micro_batch == config.batch_size else self.micro_batch, recompute=self.recompute,
            return_memory=self.return_memory, offload=self.offload, update_early=self.update_early,
            optimizer=replace(config.optimizer, moments=moments),
        )  # fmt: skip

    def describe(self) -> str:
        parts = [f"{self.micro_batch} sequences at a time"]
        if self.recompute:
            parts.append(f"{' and '.join(self.recompute)} computed again")
        switches = {
            "BF16 moments": self.bf16_moments,
            "memory returned at once": self.return_memory,
            "experts' optimizer state in a file": self.offload,
            "gradients used as they come": self.update_early,
        }
        return ", ".join(parts + [name for name, on in switches.items() if on])


def candidates(config: TrainConfig) -> Iterator[Measures]:
    """Every choice that `config` allows; what it asks for itself is always part of it."""
    largest = config.micro_batch_size or config.batch_size
    sizes = [n for n in range(1, largest + 1) if config.batch_size % n == 0 and (n == largest or n & (n - 1) == 0)]
    asked = set(config.recompute)
    kinds = [what for what in RECOMPUTE if asked <= set(what) or what == tuple(config.recompute)]
    if config.precision == "fp8" or config.qat:
        kinds = [what for what in kinds if "swiglu" not in what]
    moments = [True] if config.optimizer.moments == "bf16" else [False, True] if config.optimizer.moments_may_be_bf16 else [False]
    early = [True] if config.update_early else [False, True]
    for size, kind, bf16, back, now in product(sizes, kinds, moments, [config.return_memory, True], early):
        whole = size == config.batch_size
        if now and (config.optimizer.clip or not whole):
            continue
        yield Measures(size, kind, bf16, back, config.offload, now)


def predicted_bytes(config: TrainConfig, measures: Measures) -> float:
    """Peak of what training itself allocates, without interpreter, libraries and data."""
    model, tokens = config.model, measures.micro_batch * config.sequence_length
    count = count_parameters(model)
    tables = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    hidden = count.trained - tables
    experts = _expert_parameters(config)
    moment = 2 if measures.bf16_moments else 4
    in_memory = hidden - (experts if measures.offload else 0)
    moments = moment * (2 * tables + (1 if config.optimizer.name == "muon" else 2) * in_memory)
    largest = max(tables, experts / max(_mixtures(config), 1) / 3)
    gradients = 4 * largest if measures.update_early else 4 * count.trained
    logits = min(tokens, LOGIT_ROWS) * model.vocab_size * 8 + 4 * tables
    kept, working = 0.0, 0.0
    for layer in range(model.num_hidden_layers + model.num_nextn_predict_layers):
        values = saved_values(model, model.is_moe_layer(layer))
        size = {kind: n * _value_bytes(kind, config) for kind, n in values.items()}
        dropped = {kind: share for what in measures.recompute for kind, share in SAVED_BY[what].items()}
        again = sum(size[kind] * share for kind, share in dropped.items())
        kept += sum(size.values()) - again
        working = max(working, again + size["gate_up"] + size["inputs"])
    heads = 1 + model.num_nextn_predict_layers
    kept += (2 * heads + 4 * model.num_nextn_predict_layers) * model.hidden_size * 4
    activations = tokens * (kept + working) + logits
    rounded = 0.0
    if config.precision == "fp8":  # simulated: the operands of a product are numbers of four bytes
        width = model.hidden_size + (model.moe_intermediate_size if experts else model.intermediate_size)
        rounded = 4 * largest + 8 * tokens * (model.num_experts_per_tok if experts else 1) * width
    if config.qat:
        rounded = 4 * hidden
    return rounded + 4 * count.trained + gradients + moments + ORTHOGONALISED + activations * GAPS[measures.return_memory]


def predicted_seconds(config: TrainConfig, measures: Measures) -> float:
    """Of a step, roughly: for putting measures in order."""
    model, tokens = config.model, config.tokens_per_step
    trained = count_parameters(model).trained
    flops = forward_flops(model, (config.sequence_length + 1) / 2)
    inner = sum(saved_values(model, model.is_moe_layer(layer))["hidden"] for layer in range(model.num_hidden_layers))
    again: dict[Recomputed, float] = {
        "swiglu": 3 * 4 * inner * FLOPS / BYTES,  # two inputs read, the result written
        "feed_forward": flops.dense_ffn + flops.routed_experts + flops.shared_experts + flops.router,
        "attention": flops.attention_projections + flops.attention_scores + flops.attention_values,
    }
    once = flops_per_token(model, config.sequence_length, training=True).total
    seconds = tokens * (once + sum(again[what] for what in measures.recompute)) / FLOPS
    # Every pass reads the weights twice, and reads and writes the gradients.
    seconds += config.batch_size // measures.micro_batch * 16 * trained / BYTES
    seconds *= 1.1 if measures.return_memory else 1.0
    # Not a matter of time: it rounds what is learnt from, so that other measures come first.
    return seconds * (1.15 if measures.bf16_moments and config.optimizer.moments == "fp32" else 1.0)


def _value_bytes(kind: str, config: TrainConfig) -> int:
    products = ("latent", "latent_norms", "inputs", "gate_up", "norms", "hidden")
    return 1 if config.precision == "fp8" and kind in products else 4


def _mixtures(config: TrainConfig) -> int:
    model = config.model
    return sum(model.is_moe_layer(i) for i in range(model.num_hidden_layers + model.num_nextn_predict_layers))


def _expert_parameters(config: TrainConfig) -> int:
    model = config.model
    if not model.n_routed_experts:
        return 0
    return _mixtures(config) * model.n_routed_experts * 3 * model.hidden_size * model.moe_intermediate_size
