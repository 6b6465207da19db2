"""Memory of a device in training, by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..config import ModelConfig
from .cost import HIDDEN_PARTS, layer_matrices, ngram_parameters
from .layout import Layout, Stage, stage_kinds, stage_parameters, table_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    master_weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    """Largest layer while its backward pass runs, beyond what is kept, and the dispatch buffers of one MoE layer."""
    logits: float
    heap: float = 0.0
    """On CPUs: gaps between blocks of the C library's heap."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def saved_values(model: ModelConfig, moe: bool) -> dict[str, float]:
    """Numbers per token that one layer keeps for its backward pass, by kind.

    `stream`, `attention`, `queries`, `unsplit`, `routing`: activations outside of matrix products; `unsplit` are keys of MLA's
    up-projection that live on because the values are a view of its output. `inputs`, `latent`, `gate_up`, `hidden`: inputs of
    matrix products. V3's selective recomputation drops `queries` and `unsplit` (for MLA; GQA cannot rebuild them cheaply), `norms`,
    `latent_norms` and `hidden`.
    """
    width, heads, mla = model.hidden_size, model.num_attention_heads, model.uses_mla
    copies = model.num_experts_per_tok if moe else 1
    inner = copies * model.moe_intermediate_size + (model.n_shared_experts or 0) * model.moe_intermediate_size
    if not moe:
        inner = model.intermediate_size
    normed = model.kv_lora_rank + (model.q_lora_rank or 0) if mla else 0
    keys = heads if mla else model.kv_heads
    queries = heads * model.qk_head_dim + keys * (model.qk_head_dim + model.value_head_dim)
    if model.qk_norm:  # what is normalised is kept beside the result
        queries += heads * model.qk_head_dim + (model.qk_rope_head_dim if mla else keys * model.qk_head_dim)
    return {
        "stream": 2 * width,
        "attention": heads * (model.value_head_dim + 1),
        "queries": queries,
        "unsplit": heads * model.qk_nope_head_dim if mla else 0,
        "norms": 2 * width,
        "latent": normed + model.qk_rope_head_dim if mla else 0,
        "latent_norms": normed,
        "routing": (model.n_routed_experts or 0) + 6 * copies if moe else 0,
        "inputs": copies * width if moe else 0,
        "outputs": copies * width if moe else 0,
        "gate_up": 2 * inner,
        "hidden": inner,
    }


def layer_activation_bytes(model: ModelConfig, moe: bool, layout: Layout, recompute: str) -> float:
    """Bytes per token that one layer keeps from its forward to its backward pass."""
    if recompute == "full":
        return model.hidden_size * layout.value_bytes
    kept = saved_values(model, moe)
    values = ["stream", "attention", "outputs", "queries", "unsplit", "routing"]
    products = ["latent", "latent_norms", "inputs", "gate_up", "norms", "hidden"]
    if recompute == "selective":
        values = ["stream", "attention", "routing"] + ([] if model.uses_mla else ["queries"])
        products = ["latent", "inputs", "gate_up"]
    return sum(kept[k] for k in values) * layout.value_bytes + sum(kept[k] for k in products) * layout.product_bytes


def stage_activation_bytes(model: ModelConfig, stage: Stage, layout: Layout, tokens: int) -> float:
    """Bytes that a micro-batch of `tokens` leaves on a stage between its forward and its backward pass."""
    per_token = 0.0
    modules = 0
    for (moe, module), layers in stage_kinds(model, stage).items():
        per_token += layers * layer_activation_bytes(model, moe, layout, layout.recompute)
        modules += layers * module
    heads = (1 + modules) if stage.head else 0
    # a head keeps its norm's input and the gradient of its output; a prediction module both streams, and them normalised
    per_token += (2 * heads + 4 * modules) * model.hidden_size * layout.value_bytes
    return tokens * per_token


def moments_per_parameter(model: ModelConfig, stage: Stage, optimizer: str) -> tuple[float, float]:
    """Optimizer moments per (replicated, expert) parameter of a stage: AdamW keeps two, Muon one for hidden matrices, tables of n-grams
    have one with either."""
    single = stage.embedding * ngram_parameters(model)
    if optimizer == "muon":
        single += sum(
            layers * matrix.stored * matrix.size
            for (moe, _), layers in stage_kinds(model, stage).items()
            for matrix in layer_matrices(model, moe)
            if matrix.part in HIDDEN_PARTS and matrix.part != "routed_experts"
        )
    replicated, _ = stage_parameters(model, stage)
    return 2.0 - single / max(replicated, 1), 1.0 if optimizer == "muon" else 2.0


def state_memory(replicated: float, experts: float, moments: tuple[float, float], layout: Layout, replicas: int) -> Memory:
    """Weights, master weights, gradients and optimizer states of a device with so many parameters; the rest is 0.

    `replicas` copies of every stage exist over the pipeline (2 for DualPipe); they share optimizer states too.
    """
    weights = master = gradients = optimizer = 0.0
    data = layout.data * replicas
    for count, copies, kept in (
        (replicated, data, moments[0]),
        (experts / layout.expert, data // layout.expert, moments[1]),
    ):
        shared = copies if layout.zero >= 1 else 1
        shared_weights = copies if layout.zero == 3 else 1
        weights += count * layout.product_bytes / shared_weights
        gradients += count * 4 / shared_weights
        master += count * (0 if layout.precision == "fp32" else 4) / shared
        optimizer += count * kept * layout.moment_bytes / shared
    return Memory(weights, master, gradients, optimizer, 0.0, 0.0, 0.0)


def device_memory(
    model: ModelConfig, layout: Layout, stages: list[Stage], in_flight: float, tokens: int, loss_chunk: int, replicas: int = 1
) -> Memory:
    """Memory of a device that holds `stages`, each with `in_flight` micro-batches of `tokens` at the worst moment.

    The logits of `loss_chunk` tokens exist at a time.
    """
    whole = Memory(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for stage in stages:
        replicated, experts = stage_parameters(model, stage)
        states = state_memory(replicated, experts, moments_per_parameter(model, stage, layout.optimizer), layout, replicas)
        # embedding, head and other tables stay in BF16 where products run in FP8
        unquantized = (
            table_parameters(model, stage) * max(0, 2 - layout.product_bytes) / (layout.data * replicas if layout.zero == 3 else 1)
        )
        working = max((working_bytes(model, moe, layout, tokens) for moe, _ in stage_kinds(model, stage)), default=0.0)
        # logits as the head gives them, and in FP32, which their gradient overwrites
        logits = min(tokens, loss_chunk) * model.vocab_size * (4 if layout.precision == "fp32" else 6) if stage.head else 0
        whole = Memory(
            whole.weights + states.weights + unquantized,
            whole.master_weights + states.master_weights,
            whole.gradients + states.gradients,
            whole.optimizer + states.optimizer,
            whole.activations + in_flight * stage_activation_bytes(model, stage, layout, tokens),
            max(whole.working, working),
            max(whole.logits, logits),
        )
    return whole


def working_bytes(model: ModelConfig, moe: bool, layout: Layout, tokens: int) -> float:
    """Bytes that a layer needs while its backward pass runs, beyond what it has kept from the forward pass."""
    beyond = layer_activation_bytes(model, moe, layout, "none") - layer_activation_bytes(model, moe, layout, layout.recompute)
    buffers = 2 * model.num_experts_per_tok * model.hidden_size * layout.value_bytes if moe and layout.expert > 1 else 0
    gathered = 0.0
    if layout.zero == 3 and layout.data > 1:  # one layer's weights and gradients are whole while it runs
        matrices = layer_matrices(model, moe)
        stored = sum(m.stored * m.size / (layout.expert if m.part == "routed_experts" else 1) for m in matrices)
        gathered = stored * (layout.product_bytes + 4)
    return tokens * (beyond + buffers) + gathered
