"""Measures against memory change what is kept, not what is computed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config import FP8Config, ModelConfig, OptimizerConfig, UserError
from shoal.model import Transformer, init_weights
from shoal.train.adamw import SmallAdamW
from shoal.train.early_updates import EarlyUpdates
from shoal.train.fp8 import compute_in_fp8
from shoal.train.loss import compute_losses
from shoal.train.moments import Moments
from shoal.train.optimizer import Optimizers
from shoal.train.recompute import recompute

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "initializer_range": 0.2,
}  # fmt: skip
LLAMA = {"model_type": "llama", "n_routed_experts": None, "n_shared_experts": None, "num_nextn_predict_layers": 0, "num_key_value_heads": 1}


def make(**changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, **changes}))
    init_weights(model, 0)
    return model


def backward(model: Transformer, seed: int = 0) -> torch.Tensor:
    depth = model.config.num_nextn_predict_layers
    rows = torch.randint(96, (3, 21 + depth), generator=torch.Generator().manual_seed(seed))
    losses = compute_losses(model, rows, 0.3, 0.01)
    losses.total.backward()
    return losses.total.detach()


def kept_bytes(model: Transformer) -> int:
    """Of distinct tensors that a forward pass keeps for the backward pass, parameters left out."""
    seen: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.randint(96, (3, 22), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = compute_losses(model, rows, 0.3, 0.01)
    assert losses.total.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("what", [("swiglu",), ("attention",), ("feed_forward",), ("feed_forward", "attention"), ("swiglu", "attention")])
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["moe", "llama"])
def test_what_is_computed_again_gives_the_same_bits(what: Any, changes: dict[str, Any]) -> None:
    plain, lean = make(**changes), make(**changes)
    recompute(lean, what)
    assert backward(plain).equal(backward(lean))
    for (name, p), q in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7)
    assert lean.state_dict().keys() == plain.state_dict().keys()


def test_each_measure_keeps_less() -> None:
    kept = []
    for what in ((), ("swiglu",), ("feed_forward",), ("feed_forward", "attention")):
        model = make(num_nextn_predict_layers=0)
        recompute(model, what)  # type: ignore[arg-type]
        kept.append(kept_bytes(model))
    assert all(less < more for more, less in itertools.pairwise(kept))


def test_fp8_keeps_less_than_fp32() -> None:
    plain, small = make(num_nextn_predict_layers=0), make(num_nextn_predict_layers=0)
    compute_in_fp8(small, FP8Config())
    assert kept_bytes(small) < 0.8 * kept_bytes(plain)


def step_each(models: Sequence[Transformer], optimizers: Sequence[Optimizers], step: int) -> None:
    """The same step of every model, each by its optimizers."""
    for model, mine in zip(models, optimizers, strict=True):
        backward(model, step)
        mine.set_rates(0.5)
        mine.step()
        mine.zero_grad()


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_file_holds_moments_as_memory_does(tmp_path: Path, name: Any, moments: Any) -> None:
    config = OptimizerConfig(name=name, moments=moments)
    models = make(), make()
    optimizers = Optimizers(models[0], config, one_by_one=True), Optimizers(models[1], config, offload=tmp_path)
    for step in range(3):
        step_each(models, optimizers, step)
        if step == 1:  # as a checkpoint does
            saved = copy.deepcopy(optimizers[0].state_dict())
            for mine in optimizers:
                mine.load_state_dict(saved)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert p.equal(q)
    dtypes = {value.dtype for one in optimizers[1].all for state in one.state.values() for key, value in state.items() if key != "step"}
    assert dtypes == {torch.bfloat16 if moments == "bf16" else torch.float32}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_one_parameter_at_a_time_is_what_torch_does_with_all(name: Any) -> None:
    models = make(), make()
    config = OptimizerConfig(name=name)
    optimizers = Optimizers(models[0], config), Optimizers(models[1], config, one_by_one=True)
    assert isinstance(optimizers[0].all[-1], torch.optim.AdamW)
    for step in range(8):
        step_each(models, optimizers, step)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-3, atol=2e-5, msg=lambda message, name=name: f"{name}: {message}")


def test_bf16_moments_stay_close_to_fp32(tmp_path: Path) -> None:
    models = make(), make()
    before = [p.detach().clone() for p in models[0].parameters()]
    kinds = [Optimizers(m, OptimizerConfig(moments=k)) for m, k in zip(models, ("fp32", "bf16"), strict=True)]
    for step in range(10):
        for model, mine in zip(models, kinds, strict=True):
            model.zero_grad()
            backward(model, step % 2)
            mine.set_rates(0.1)
            mine.step()
    moved = sum(((p - q) ** 2).sum() for p, q in zip(models[0].parameters(), before, strict=True))
    apart = sum(((p - q) ** 2).sum() for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert 0 < apart < 0.05**2 * moved


@pytest.mark.parametrize("beta2", [0.95, 0.99, 1 - 2**-8, 0.999])
def test_bf16_moments_forget_where_settings_say_that_they_do(beta2: float) -> None:
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = SmallAdamW([{"params": [p]}], (0.9, beta2), 1e-10, Moments(torch.bfloat16))
    p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    before = optimizer.state[p]["exp_avg_sq"].clone()
    p.grad.zero_()
    optimizer.step()
    assert bool((optimizer.state[p]["exp_avg_sq"] < before).all()) == OptimizerConfig(adam_betas=(0.9, beta2)).moments_may_be_bf16


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_updates_in_the_backward_pass_are_those_after_it(name: Any) -> None:
    config = OptimizerConfig(name=name, clip=0.0)
    late, early = make(), make()
    ours, theirs = Optimizers(late, config, one_by_one=True), Optimizers(early, config, one_by_one=True)
    updates = EarlyUpdates(theirs)
    for step in range(3):
        backward(late, step)
        norm = torch.stack([p.grad.norm() for p in late.parameters() if p.grad is not None]).norm()
        ours.set_rates(0.5)
        ours.step()
        ours.zero_grad()
        theirs.set_rates(0.5)
        backward(early, step)
        torch.testing.assert_close(updates.norm(), norm)
        assert all(p.grad is None for p in early.parameters())
    for p, q in zip(late.parameters(), early.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = make()
    optimizers = Optimizers(model, OptimizerConfig(clip=0.0), one_by_one=True)
    updates = EarlyUpdates(optimizers)
    optimizers.set_rates(1.0)
    before = model.lm_head.weight.detach().clone()
    (model.lm_head.weight.sum() * torch.inf).backward()
    assert not updates.norm().isfinite()
    assert model.lm_head.weight.equal(before)


def test_offloaded_moments_survive_being_read_and_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.train.moments.RELEASED_EVERY", 1e-4)
    p = torch.zeros(1000, 500)
    moment = Moments(offloaded=[p], folder=tmp_path)
    kept = moment.zeros(p).copy_(torch.arange(500_000.0).view(1000, 500))
    with moment.being_read():
        for _ in range(20):
            assert kept.equal(torch.arange(500_000.0).view(1000, 500))
    kept += 1
    assert float(kept[-1, -1]) == 500_000


def test_a_disk_without_room_for_offloaded_moments_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    p = torch.zeros(10, 10)
    with pytest.raises(UserError, match=r"--offload finds no room .*No space left"):
        Moments(offloaded=[p], folder=tmp_path).zeros(p)
