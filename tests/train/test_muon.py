"""Muon against a plain loop over matrices, and which parameter goes to which optimizer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.config import ModelConfig, OptimizerConfig, TrainConfig
from shoal.data import open_corpus, prepare
from shoal.model import Transformer, init_weights
from shoal.parallel import Shards
from shoal.train import train
from shoal.train.muon import Muon
from shoal.train.optimizer import Optimizers, clip_gradients, decay_of

LR, MOMENTUM, STEPS, DECAY = 0.03, 0.9, 5, 0.1
SHAPES = [(6, 4), (4, 6), (6, 4), (3, 5, 4), (2, 4, 5), (1, 7)]


def newton_schulz(matrix: Tensor) -> Tensor:
    """One matrix, as the method's authors describe it."""
    x = matrix / matrix.norm()
    for _ in range(STEPS):
        if x.shape[0] > x.shape[1]:
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        else:
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


class NaiveMuon:
    """One matrix at a time; every expert of a stack is a matrix."""

    def __init__(self, params: list[Tensor]) -> None:
        self.matrices = [matrix for p in params for matrix in (p if p.ndim == 3 else p[None])]
        self.buffers = [torch.zeros_like(matrix) for matrix in self.matrices]

    def step(self, gradients: list[Tensor]) -> None:
        flat = [gradient for g in gradients for gradient in (g if g.ndim == 3 else g[None])]
        for matrix, buffer, gradient in zip(self.matrices, self.buffers, flat, strict=True):
            buffer.mul_(MOMENTUM).add_((1 - MOMENTUM) * gradient)
            update = newton_schulz((1 - MOMENTUM) * gradient + MOMENTUM * buffer)
            matrix.mul_(1 - LR * DECAY).sub_(LR * 0.2 * max(matrix.shape) ** 0.5 * update)


def parameters(seed: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return [p.grad.clone() for p in params if p.grad is not None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-4)])
def test_muon_equals_a_loop_over_single_matrices(dtype: torch.dtype, tolerance: float) -> None:
    params = parameters(0, dtype)
    naive_params = [p.detach().clone() for p in params]
    naive, muon = NaiveMuon(naive_params), Muon(params, LR, MOMENTUM, STEPS, DECAY)
    for seed in range(4):
        naive.step(set_gradients(params, seed))
        muon.step()
        for p, expected in zip(params, naive_params, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=tolerance, atol=tolerance)


def test_an_expert_is_updated_as_if_it_stood_alone() -> None:
    stack = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))
    alone = nn.Parameter(stack.detach()[1].clone())
    stack.grad = torch.randn_like(stack)
    stack.grad[0] *= 1e6  # another expert's huge gradient must not leak
    alone.grad = stack.grad[1].clone()
    for p in (stack, alone):
        Muon([p], LR, MOMENTUM, STEPS, DECAY).step()
    torch.testing.assert_close(stack.detach()[1], alone.detach(), rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 7), st.integers(0, 2**31))
def test_blocks_of_rows_are_updated_as_if_they_were_matrices(blocks: list[int], alike: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(sum(blocks), columns, dtype=torch.float64)) for _ in range(alike)]
    whole = nn.Parameter(torch.randn(sum(blocks), columns, dtype=torch.float64))  # of the same shape, but one matrix
    alone = [nn.Parameter(part.clone()) for p in params for part in p.detach().split(blocks)] + [nn.Parameter(whole.detach().clone())]
    split, single = (
        Muon([*params, whole], LR, MOMENTUM, STEPS, DECAY, blocks={id(p): tuple(blocks) for p in params}),
        Muon(alone, LR, MOMENTUM, STEPS, DECAY),
    )
    for _ in range(2):
        gradients = set_gradients([*params, whole], seed)
        parts = [part for gradient in gradients[:-1] for part in gradient.split(blocks)] + gradients[-1:]
        for p, gradient in zip(alone, parts, strict=True):
            p.grad = gradient
        split.step()
        single.step()
    got = [part for p in params for part in p.detach().split(blocks)] + [whole.detach()]
    for part, expected in zip(got, alone, strict=True):
        torch.testing.assert_close(part, expected.detach(), rtol=1e-9, atol=1e-9)


def test_muon_goes_on_from_its_state_dict_to_the_bit() -> None:
    params = parameters(1, torch.float32)
    muon = Muon(params, LR, MOMENTUM, STEPS, DECAY)
    for seed in range(3):
        set_gradients(params, seed)
        muon.step()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = Muon(copies, LR, MOMENTUM, STEPS, DECAY)
    other.load_state_dict(copy.deepcopy(muon.state_dict()))  # else the two would share their momentum
    for seed in range(3, 6):
        set_gradients(params, seed)
        set_gradients(copies, seed)
        muon.step()
        other.step()
    assert all(torch.equal(p, twin) for p, twin in zip(params, copies, strict=True))


def test_a_parameter_without_gradient_stays_and_a_zero_gradient_is_harmless() -> None:
    still, zero = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    zero.grad = torch.zeros(3, 3)
    Muon([still, zero], LR, MOMENTUM, STEPS, 0.0).step()
    assert torch.equal(still, torch.ones(3, 3))
    assert torch.equal(zero, torch.ones(3, 3))


V3: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "v3": {**V3, "q_lora_rank": 8, "num_nextn_predict_layers": 1},
    "llama": {**V3, "model_type": "llama", "num_key_value_heads": 1},
    "llama with biases": {**V3, "model_type": "llama", "attention_bias": True},
    "tied": {**V3, "tie_word_embeddings": True},
    "dense": {**V3, "n_routed_experts": None},
}


def test_a_head_has_as_many_rows_as_its_queries_keys_and_values_take() -> None:
    heads = {kind: ModelConfig(**KINDS[kind]).head_rows for kind in ("v3", "dense", "llama")}
    assert heads["v3"]("q_b_proj") == heads["dense"]("q_proj") == (4, 4, 4, 4)
    assert heads["v3"]("kv_a_proj_with_mqa") == (8, 4)
    assert heads["v3"]("kv_b_proj") == (4, 4, 4, 4)
    assert (heads["llama"]("q_proj"), heads["llama"]("k_proj"), heads["llama"]("v_proj")) == ((8, 8), (8,), (8,))
    assert heads["v3"]("q_a_proj") is heads["llama"]("o_proj") is heads["v3"]("down_proj") is None


@pytest.mark.parametrize("kind", list(KINDS))
def test_with_muon_split_every_head_is_orthogonal_by_itself(kind: str) -> None:
    model = make(kind)
    optimizers = Optimizers(model, OptimizerConfig(muon_lr=1.0, muon_split=True, weight_decay=0.0))
    optimizers.set_rates(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers.step()
    seen = 0
    for name, p in model.named_parameters():
        blocks = model.config.head_rows(name.split(".")[-2]) if p.ndim == 2 else None
        for part in (before[name] - p.detach()).split(blocks) if blocks else ():
            spread = torch.linalg.svdvals(part / 0.2 / max(part.shape) ** 0.5)
            assert spread.min() > 0.6, name  # Newton-Schulz' five steps bring them near 1, no nearer
            assert spread.max() < 1.3, name
            seen += 1
    assert seen


def make(kind: str) -> Transformer:
    model = Transformer(ModelConfig(**KINDS[kind]))
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained_by_exactly_one_optimizer(kind: str, name: Any) -> None:
    model = make(kind)
    config = OptimizerConfig(name=name, muon_lr=1.0, embed_lr=2.0, head_lr=3.0, adam_lr=4.0)
    rates: dict[int, float] = {}
    for optimizer in Optimizers(model, config).all:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in rates
                rates[id(p)] = group["lr"]
    assert rates.keys() == {id(p) for p in model.parameters()}
    for full_name, p in model.named_parameters():
        last = full_name.split(".")[-2]
        if "embed_tokens" in full_name:
            expected = 2.0
        elif full_name == "lm_head.weight":
            expected = 3.0
        elif p.ndim == 1 or last == "gate" or name == "adamw":
            expected = 4.0
        else:
            expected = 1.0
        assert rates[id(p)] == expected, full_name


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_optimizers_go_on_from_their_state_to_the_bit(name: Any) -> None:
    def step(model: Transformer, optimizers: Optimizers, seed: int) -> None:
        set_gradients(list(model.parameters()), seed)
        optimizers.set_rates(0.5)
        optimizers.step()

    model, twin = make("v3"), make("v3")
    optimizers = Optimizers(model, OptimizerConfig(name=name))
    for seed in range(2):
        step(model, optimizers, seed)
    twin.load_state_dict(model.state_dict())
    restored = Optimizers(twin, OptimizerConfig(name=name))
    restored.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for seed in range(2, 4):
        step(model, optimizers, seed)
        step(twin, restored, seed)
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_decays_grow_with_every_reading_after_the_first() -> None:
    config = OptimizerConfig(weight_decay=0.3, embed_decay=0.2, head_decay=0.1)
    assert [decay_of(config, readings) for readings in (0.0, 0.7, 1.0, 2.5, 1e6)] == [1.0, 1.0, 1.0, 2.5, 30.0]
    assert decay_of(replace(config, decay_by_readings=False), 2.5) == 1.0
    model = make("v3")
    optimizers = Optimizers(model, config)
    for times in (2.0, 4.0, 1.0):
        optimizers.set_rates(0.5, times)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers.step()
        for name, p in model.named_parameters():
            if "embed_tokens" in name:
                taken = config.embed_lr * 0.2
            elif name == "lm_head.weight":
                taken = config.head_lr * 0.1
            else:
                taken = 0.0 if p.ndim == 1 or ".gate." in name else config.muon_lr * 0.3
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * taken * times), msg=name)


def test_share_scales_the_peak_rates_and_zero_changes_nothing() -> None:
    model = make("v3")
    optimizers = Optimizers(model, OptimizerConfig())
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(list(model.parameters()), 0)
    optimizers.set_rates(0.0)
    optimizers.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizers.set_rates(0.25)
    optimizers.step()
    assert {group["lr"] / group["peak_lr"] for optimizer in optimizers.all for group in optimizer.param_groups} == {0.25}


@settings(max_examples=25)
@given(scale=st.floats(1e-3, 1e3), limit=st.sampled_from([0.0, 0.5, 1.0, 10.0]))
def test_clipping_equals_that_of_torch(scale: float, limit: float) -> None:
    ours, theirs = (nn.ParameterList(parameters(2, torch.float32)) for _ in range(2))
    for model in (ours, theirs):
        set_gradients(list(model), 3)
        for p in model:
            p.grad *= scale
    norm = clip_gradients(Shards.whole(ours), limit)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
    torch.testing.assert_close(norm, expected)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_run_decays_by_how_often_it_has_read_its_text(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    set_rates = Optimizers.set_rates

    def watch(optimizers: Optimizers, share: float, decay: float) -> None:
        asked.append(decay)
        set_rates(optimizers, share, decay)

    monkeypatch.setattr(Optimizers, "set_rates", watch)
    text = prepare(open_corpus(config.data, config.corpus), None, config.model.vocab_size, config.corpus, progress=False).train
    config = replace(config, steps=3 * text.num_tokens // config.tokens_per_step)
    train(config)
    assert asked == [max(1.0, step * config.tokens_per_step / text.num_tokens) for step in range(len(asked))]
    assert asked[-1] > 2
