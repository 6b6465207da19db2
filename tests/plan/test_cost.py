"""Counts from shapes against published figures, and against what the real model allocates and computes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shoal.config import ModelConfig, OptimizerConfig, UserError
from shoal.engine.weights import quantized_scheme
from shoal.formats.parts import parts_of
from shoal.kernels.reference import newton_schulz
from shoal.model import Transformer
from shoal.plan import cost
from shoal.plan.layout import Stage, stage_parameters
from shoal.plan.models import BUILT_IN
from shoal.train.optimizer import Optimizers

V3 = BUILT_IN["deepseek-v3"]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v3", 671e9, 36.7e9),  # deepseek-ai/DeepSeek-V3, README_WEIGHTS.md
        ("deepseek-v2", 236e9, 21e9),  # 2405.04434, abstract
        ("deepseek-v2-lite", 15.7e9, 2.4e9),  # 2405.04434, appendix B
        ("llama-3.1-8b", 8.03e9, 7.5e9),
        ("llama-3.1-405b", 405.9e9, 403.8e9),
        ("qwen2.5-72b", 72.7e9, 71.5e9),
    ],
)
def test_published_parameter_counts(name: str, total: float, active: float) -> None:
    parameters = cost.count_parameters(BUILT_IN[name])
    assert parameters.total == pytest.approx(total, rel=0.003)
    assert parameters.active == pytest.approx(active, rel=0.025)


def test_v3_multi_token_prediction_module_has_11_5_billion_parameters_of_its_own() -> None:
    assert cost.count_parameters(V3).mtp == pytest.approx(11.5e9, rel=0.01)


def test_published_training_flops() -> None:
    """2505.09343, table 2; main models at sequence length 4096. Qwen's published 394 does not fit its shapes."""
    gigaflops = {name: cost.flops_per_token(model, 4096, training=True).main / 1e9 for name, model in BUILT_IN.items()}
    assert gigaflops["deepseek-v3"] == pytest.approx(250, rel=0.05)
    assert gigaflops["deepseek-v2"] == pytest.approx(155, rel=0.05)
    assert gigaflops["llama-3.1-405b"] == pytest.approx(2448, rel=0.05)
    assert gigaflops["llama-3.1-405b"] / gigaflops["deepseek-v3"] == pytest.approx(9.8, rel=0.05)
    assert gigaflops["qwen2.5-72b"] == pytest.approx(440, rel=0.05)
    with_mtp = cost.flops_per_token(V3, 4096, training=True).total / 1e9
    assert with_mtp == pytest.approx(250, rel=0.05)


def test_published_cache_sizes() -> None:
    """2505.09343, table 1."""
    assert cost.kv_bytes_per_token(V3) == 70_272
    assert cost.kv_bytes_per_token(BUILT_IN["llama-3.1-405b"]) == 516_096
    assert cost.kv_bytes_per_token(BUILT_IN["qwen2.5-72b"]) == 327_680
    assert cost.kv_bytes_per_token(V3, "fp8") * 2 == 70_272


def test_v3_checkpoint_is_as_large_as_the_official_files() -> None:
    """The 163 files of deepseek-ai/DeepSeek-V3 hold 688,586,727,753 bytes: headers, and embedding and head twice."""
    repeated = 2 * V3.vocab_size * V3.hidden_size * 2
    assert cost.checkpoint_bytes(V3, cost.NUMBER_FORMATS["fp8"]) + repeated == pytest.approx(688_586_727_753, rel=1e-4)


CONFIGS = st.builds(
    ModelConfig,
    model_type=st.sampled_from(["deepseek_v3", "deepseek_v2", "llama"]),
    vocab_size=st.integers(1, 300),
    hidden_size=st.integers(1, 4).map(lambda n: 24 * n),
    num_hidden_layers=st.integers(1, 4),
    intermediate_size=st.integers(1, 50),
    num_attention_heads=st.just(4),
    num_key_value_heads=st.sampled_from([None, 1, 2]),
    attention_bias=st.booleans(),
    q_lora_rank=st.sampled_from([None, 11]),
    kv_lora_rank=st.integers(1, 20),
    qk_nope_head_dim=st.integers(1, 9),
    qk_rope_head_dim=st.just(6),
    v_head_dim=st.integers(1, 9),
    n_routed_experts=st.sampled_from([None, 8]),
    n_shared_experts=st.sampled_from([None, 1, 2]),
    num_experts_per_tok=st.integers(1, 8),
    moe_intermediate_size=st.integers(1, 20),
    first_k_dense_replace=st.integers(0, 5),
    moe_layer_freq=st.integers(1, 2),
    num_nextn_predict_layers=st.integers(0, 2),
    tie_word_embeddings=st.booleans(),
    qk_norm=st.booleans(),
    ngram_order=st.sampled_from([0, 2, 4]),
    ngram_rows=st.integers(1, 50),
    embedding_skip=st.booleans(),
    value_embedding=st.booleans(),
    convolution=st.integers(0, 3),
    count_order=st.sampled_from([0, 3]),
    count_entries=st.integers(0, 100),
    repeat_window=st.sampled_from([0, 20]),
)


def without_impossible_mtp(config: ModelConfig) -> ModelConfig:
    """As `ModelConfig.validate` wants it: no module without MLA or beside a look-up, no entries without counting."""
    config = replace(config, count_entries=config.count_entries if config.count_order else 0)
    possible = config.uses_mla and not config.repeat_window and not config.count_order
    return config if possible else replace(config, num_nextn_predict_layers=0)


@settings(max_examples=60)
@given(CONFIGS)
def test_parameters_and_bytes_equal_what_the_transformer_allocates(config: ModelConfig) -> None:
    config = without_impossible_mtp(config)
    with torch.device("meta"):
        model = Transformer(config).double()  # fused kernels, which the counter does not know, leave fp64 to plain torch
    counted = cost.count_parameters(config)
    assert counted.trained == sum(parameter.numel() for parameter in model.parameters())
    whole = Stage(tuple(range(config.num_hidden_layers + config.num_nextn_predict_layers)), embedding=True, head=True)
    assert sum(stage_parameters(config, whole)) == counted.trained
    mtp = sum(parameter.numel() for module in model.mtp_modules for parameter in module.parameters())
    assert counted.mtp == mtp
    entries = {"entries", "counts"}
    sizes = [t.numel() * (t.itemsize if name.rsplit(".", 1)[-1] in entries else 4) for name, t in model.state_dict(keep_vars=True).items()]
    repeated = config.vocab_size * config.hidden_size * 4 * config.tie_word_embeddings
    assert cost.checkpoint_bytes(config, cost.NUMBER_FORMATS["fp32"]) == sum(sizes) - repeated


@settings(max_examples=3)
@given(st.sampled_from(["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "llama-3.1-405b", "qwen2.5-72b"]))
def test_published_models_agree_with_the_transformer_to_the_parameter(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(BUILT_IN[name])
    assert cost.count_parameters(BUILT_IN[name]).trained == sum(parameter.numel() for parameter in model.parameters())


# Values as wide as keys: the model pads narrower ones for the fused attention kernel, work that is not counted.
TINY = ModelConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=3, intermediate_size=80, num_attention_heads=4, q_lora_rank=24, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=20,
    num_nextn_predict_layers=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, q_lora_rank=None, n_routed_experts=None),
        replace(TINY, model_type="llama", num_nextn_predict_layers=0),
        replace(TINY, ngram_order=3, embedding_skip=True, value_embedding=True, convolution=3),
    ],
    ids=["moe-mtp", "dense-mla", "llama", "additions"],
)
def test_flops_equal_those_of_torch_flop_counter(config: ModelConfig) -> None:
    """Forward and backward; the counter charges attention for the whole square, which is a mean context of T, not (T + 1) / 2.

    It does not see convolutions over time, which are sums of products here.
    """
    torch.manual_seed(0)
    length = 16
    model = Transformer(config).double()  # fused kernels, which the counter does not know, leave fp64 to plain torch
    ids = torch.randint(config.vocab_size, (1, length))
    shifted = [ids] * config.num_nextn_predict_layers

    def step() -> torch.Tensor:
        output = model(ids, mtp_ids=shifted)
        hidden = [output.hidden, *output.mtp_hidden]
        return sum(model.logits(h).square().mean() for h in hidden)  # type: ignore[return-value]

    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        with FlopCounterMode(display=False) as forward:
            loss = step()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    counted = cost.forward_flops(config, context=length, mtp=True)
    assert counted.convolutions == 2 * 3 * config.hidden_size * config.convolution
    expected = length * (counted.total - counted.convolutions)
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected


def test_causal_context_is_the_mean_over_the_sequence() -> None:
    exact = sum(cost.forward_flops(V3, context).total for context in range(1, 65)) / 64
    assert cost.flops_per_token(V3, 64, training=False).total == pytest.approx(exact)


def test_newton_schulz_costs_what_torch_counts() -> None:
    """The C++ kernel and torch take the same products; the counter sees torch's, in fp64."""
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(3, 20, 64, dtype=torch.float64), 5)
    assert counter.get_total_flops() == 3 * cost.newton_schulz_flops(20, 64, 5)


def test_newton_schulz_is_counted_on_the_smaller_side_and_for_every_expert() -> None:
    m, n, steps = 20, 64, 5
    assert cost.newton_schulz_flops(n, m, steps) == cost.newton_schulz_flops(m, n, steps) == steps * (4 * m * m * n + 2 * m**3)
    muon = OptimizerConfig(muon_steps=steps)
    more = cost.optimizer_flops(replace(TINY, n_routed_experts=16), muon) - cost.optimizer_flops(TINY, muon)
    moe_layers = 2 + 1
    assert more == 8 * moe_layers * 3 * cost.newton_schulz_flops(20, 64, steps)
    assert cost.optimizer_flops(TINY, OptimizerConfig(name="adamw")) == 0


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
@pytest.mark.parametrize("split", [False, True])
def test_muon_costs_what_torch_counts(monkeypatch: pytest.MonkeyPatch, model_type: str, split: bool) -> None:
    """With Newton-Schulz's products taken by torch, which its counter sees."""
    config = replace(TINY, model_type=model_type, num_nextn_predict_layers=0)
    model = Transformer(config)
    optimizers = Optimizers(model, OptimizerConfig(muon_split=split))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    monkeypatch.setattr("shoal.train.muon.newton_schulz", newton_schulz)
    with FlopCounterMode(display=False) as counter:
        optimizers.step()
    assert counter.get_total_flops() == cost.optimizer_flops(config, OptimizerConfig(muon_split=split))


def test_quantized_checkpoints_shrink_and_partial_blocks_have_scales() -> None:
    sizes = [cost.checkpoint_bytes(V3, cost.NUMBER_FORMATS[name]) for name in ("fp32", "bf16", "int8", "fp8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert cost.NUMBER_FORMATS["fp8"].matrix_bytes(129, 1) == 129 + 2 * 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_models_weigh_what_shoal_quantize_writes(bits: int, tied: bool) -> None:
    # all in whole tiles and groups: what does not fit is padded, which the planner does not count
    shape = replace(
        TINY, vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_attention_heads=2, kv_lora_rank=32,
        q_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, tie_word_embeddings=tied,
    )  # fmt: skip
    written = sum(part.nbytes for part in parts_of(shape, quantized_scheme(bits)).values())
    assert cost.checkpoint_bytes(shape, cost.NUMBER_FORMATS[f"int{bits}"]) == written


def test_bad_requests_say_what_to_do() -> None:
    with pytest.raises(UserError, match="at least 1"):
        cost.flops_per_token(V3, 0, training=True)
    with pytest.raises(UserError, match="fp32, bf16, fp8"):
        cost.kv_bytes_per_token(V3, "int3")
    with pytest.raises(UserError, match="int4"):
        cost.number_format("q4_k")
