from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.config import ModelConfig
from shoal.model import Router, Transformer
from shoal.model.moe import routing_stats


def make_router(seed: int = 0, **changes: Any) -> Router:
    generator = torch.Generator().manual_seed(seed)
    config = ModelConfig(**{"hidden_size": 16, "n_routed_experts": 12, "num_experts_per_tok": 3, **changes})
    config.validate()
    assert config.n_routed_experts is not None
    router = Router(config, config.n_routed_experts)
    router.weight.data.copy_(torch.randn(router.weight.shape, generator=generator))
    if config.topk_method == "noaux_tc":
        router.e_score_correction_bias.copy_(torch.randn(12, generator=generator) * 0.5 - 3)  # every biased score is negative
    return router


def naive(router: Router, token: Tensor) -> dict[int, float]:
    """Experts of one token and their weights, in float64 and plain Python."""
    config = router.config
    logits = (router.weight.double() @ token.double()).tolist()
    exponents = [torch.exp(torch.tensor(logit, dtype=torch.float64)).item() for logit in logits]
    if config.scoring_func == "sigmoid":
        scores = [exponent / (1 + exponent) for exponent in exponents]
    else:
        scores = [exponent / sum(exponents) for exponent in exponents]
    choice = list(scores)
    if config.topk_method == "noaux_tc":
        choice = [score + bias for score, bias in zip(scores, router.e_score_correction_bias.double().tolist(), strict=True)]
    candidates = list(range(len(scores)))
    if config.topk_method != "greedy":
        size = len(scores) // config.n_group
        groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]

        def worth(group: list[int]) -> float:
            best = sorted((choice[e] for e in group), reverse=True)
            return best[0] + best[1] if config.topk_method == "noaux_tc" else best[0]

        candidates = [e for group in sorted(groups, key=worth, reverse=True)[: config.topk_group] for e in group]
    chosen = sorted(candidates, key=lambda e: choice[e], reverse=True)[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


@settings(max_examples=60, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]),
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (4, 3), (6, 5)]),
    st.booleans(),
)
def test_choice_and_weights_match_a_plain_loop(seed: int, method: str, scoring: str, groups: tuple[int, int], norm: bool) -> None:
    shape = {"topk_method": method, "scoring_func": scoring, "n_group": groups[0], "topk_group": groups[1]}
    router = make_router(seed, **shape, norm_topk_prob=norm, routed_scaling_factor=2.5)
    # Small inputs: where sigmoids saturate, fp32 cannot tell apart what float64 can.
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed + 1)) * 0.3
    weights, indices, _ = router(x)
    for b in range(2):
        for t in range(5):
            expected = naive(router, x[b, t])
            assert set(indices[b, t].tolist()) == expected.keys()
            for e, weight in zip(indices[b, t].tolist(), weights[b, t].tolist(), strict=True):
                assert weight == pytest.approx(expected[e], rel=1e-4)


def test_closed_groups_stay_closed_when_all_biased_scores_are_negative() -> None:
    router = make_router(n_group=4, topk_group=1, num_experts_per_tok=3)
    _, indices, _ = router(torch.randn(200, 16))
    assert all(len(set(token)) == 1 for token in (indices // 3).tolist())


def test_the_bias_chooses_but_does_not_weigh() -> None:
    router = make_router(norm_topk_prob=False)
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[5] = 100.0
    weights, indices, scores = router(torch.randn(20, 16))
    assert (indices == 5).any(-1).all()
    torch.testing.assert_close(weights, scores.gather(-1, indices))


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones() -> None:
    router = make_router()
    router.e_score_correction_bias.zero_()
    load = torch.tensor([0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6])
    router.update_bias(load, 0.001)
    expected = [0.001] * 3 + [0.0] * 6 + [-0.001] * 3
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor(expected))


def test_updates_even_out_the_load() -> None:
    router = make_router()
    router.e_score_correction_bias.zero_()
    x = torch.randn(2, 64, 16) + 0.5

    def load() -> Tensor:
        _, indices, scores = router(x)
        return routing_stats(scores, indices).load.float()

    before = load()
    for _ in range(200):
        router.update_bias(load(), 0.005)
    after = load()
    assert after.sum() == before.sum() == 2 * 64 * 3
    assert (after.max() / after.mean() - 1) < 0.3 * (before.max() / before.mean() - 1)


def test_bias_and_routing_stay_fp32_in_a_bf16_model(make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    gate = model.moe_layers[0].gate
    gate.e_score_correction_bias.fill_(1.001)
    before = gate.e_score_correction_bias.clone()
    for change in (lambda: model.to(torch.bfloat16), lambda: model.half(), lambda: model.bfloat16()):
        change()
        assert model.lm_head.weight.dtype != torch.float32
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, before)
        assert "e_score_correction_bias" in dict(gate.named_buffers())
    weights, _, scores = gate(torch.randn(3, 32, dtype=torch.bfloat16))
    assert weights.dtype == scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(torch.randn(3, 32))[2].dtype == torch.float32
    model.to(torch.float32).to("meta")
    assert gate.e_score_correction_bias.is_meta


def test_balance_loss_is_one_when_uniform_and_grows_with_imbalance() -> None:
    experts, chosen = 8, 2
    uniform = torch.full((2, 16, experts), 0.5)
    spread = torch.arange(16 * chosen).remainder(experts).view(1, 16, chosen).expand(2, -1, -1)
    stats = routing_stats(uniform, spread)
    assert stats.balance_loss.item() == pytest.approx(1.0)
    assert stats.entropy.item() == pytest.approx(1.0)
    assert stats.load.tolist() == [8] * experts
    skewed = uniform.clone()
    skewed[..., :chosen] = 0.9
    skewed_loss = routing_stats(skewed, torch.tensor([0, 1]).expand(2, 16, -1)).balance_loss
    assert skewed_loss.item() == pytest.approx(2 * 4 * 0.9 / 4.8)  # experts x frequency 4 x share, V3 equations 17-20


def test_balance_loss_is_counted_within_each_sequence() -> None:
    scores = torch.full((2, 4, 4), 0.1)
    scores[0, :, 0] = scores[1, :, 1] = 0.9
    indices = torch.tensor([0, 1]).view(2, 1, 1).expand(2, 4, 1)
    apart = routing_stats(scores, indices).balance_loss
    together = routing_stats(scores.view(1, 8, 4), indices.reshape(1, 8, 1)).balance_loss
    assert apart.item() == pytest.approx(4 * 0.9 / 1.2)
    assert together < apart


def test_the_gradient_of_the_balance_loss_reaches_the_router_and_lowers_it() -> None:
    router = make_router(topk_method="greedy")
    x = torch.randn(2, 64, 16) + 0.5

    def loss() -> Tensor:
        _, indices, scores = router(x)
        return routing_stats(scores, indices).balance_loss

    before = loss()
    before.backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 0
    router.weight.data -= 0.5 * router.weight.grad
    assert loss() < before


def test_a_mixture_is_the_weighted_sum_of_its_experts(make_model: Callable[..., Transformer]) -> None:
    moe = make_model(n_shared_experts=2).moe_layers[0]
    x = torch.randn(2, 7, 32)
    out, stats = moe(x)
    weights, indices, _ = moe.gate(x)
    assert stats.load.sum() == 2 * 7 * 2
    for b in range(2):
        for t in range(7):
            expected = moe.shared_experts(x[b, t])
            for k, e in enumerate(indices[b, t].tolist()):
                hidden = torch.nn.functional.silu(moe.experts.gate_proj[e] @ x[b, t]) * (moe.experts.up_proj[e] @ x[b, t])
                expected = expected + weights[b, t, k] * (moe.experts.down_proj[e] @ hidden)
            torch.testing.assert_close(out[b, t], expected, atol=1e-5, rtol=1e-4)
