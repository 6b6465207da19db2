"""What a layer does beside matrix products and attention: memory-bound kernels, counted in numbers per token."""

from __future__ import annotations

from ..config import ModelConfig
from .memory import saved_values
from .sustained import Sustained


def moved_values(model: ModelConfig, moe: bool, precision: str) -> tuple[float, float]:
    """Numbers per token that memory-bound kernels of one layer read and write, (forward, backward).

    Counted kernel by kernel, each fused as usual: two norms (3 D forward, 3 D + residual 3 D backward), two residual sums,
    rotary encoding and assembly of queries and keys, SwiGLU, permutation to and from experts, and for FP8 the casts of the
    inputs of matrix products (again, transposed, for weight gradients).
    """
    width, kept = model.hidden_size, saved_values(model, moe)
    copies = model.num_experts_per_tok if moe else 0
    queries = kept["queries"]
    forward = 12 * width + 2 * queries + 1.5 * kept["gate_up"] + 3 * copies * width
    backward = 12 * width + 4 * queries + 2 * kept["attention"] + 2.5 * kept["gate_up"] + 4 * copies * width
    if precision == "fp8":
        products = kept["norms"] + kept["latent"] + kept["attention"] + kept["inputs"] + kept["hidden"]
        gradients = 2 * width + queries + kept["latent"] + kept["outputs"] + kept["gate_up"]
        forward += 1.5 * products  # read 2 bytes, write 1
        backward += 2 * gradients + 1.5 * products
    return forward, backward


def kernel_values(model: ModelConfig, moe: bool) -> dict[str, float]:
    """Numbers per token that pass through each kernel of Shoal's own layer, forward and backward together, by `Sustained`'s names.

    `add` counts sums of two tensors: residuals, shared with routed experts, and gradients of what is used more than once (the
    input of a norm, and a norm's output by every projection that reads it). A concatenation or its gradient is two thirds of a sum.
    """
    width, heads = model.hidden_size, model.num_attention_heads
    shared, copies = bool(model.n_shared_experts), model.num_experts_per_tok
    norm, rope, joined, readers = 2.0 * width, 0.0, 0.0, 0
    if model.uses_mla:
        norm += model.kv_lora_rank + (model.q_lora_rank or 0)
        rope = (heads + 1) * model.qk_rope_head_dim
        # queries and keys from their two parts; gradients of queries, of keys with values, and of the latent with its key
        joined = heads * (3 * model.qk_head_dim + model.qk_nope_head_dim + model.value_head_dim) + model.kv_lora_rank
        readers = 2
    else:
        rope = (heads + model.kv_heads) * model.qk_head_dim
        readers = 3
    if model.qk_norm:
        norm += rope if not model.uses_mla else heads * model.qk_head_dim + model.qk_rope_head_dim
    sums = 4 * width + (readers - 1) * width
    sums += (copies + 1 + 3 * shared) * width if moe else width
    return {
        "norm": norm,
        "rope": rope,
        "swiglu": saved_values(model, moe)["hidden"],
        "route": copies * width if moe else 0.0,
        "add": sums + 2 / 3 * joined,
    }


def kernel_seconds(model: ModelConfig, moe: bool, known: Sustained) -> float:
    """Seconds per token of one layer's memory-bound kernels, forward and backward, at measured rates."""
    return sum(values / getattr(known, kernel) for kernel, values in kernel_values(model, moe).items())
