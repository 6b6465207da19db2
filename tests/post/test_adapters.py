"""Adapters: they start as nothing, reach every expert, and merging keeps what they do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.small_models import make_model
from torch import nn

from shoal.config import ModelConfig
from shoal.engine.batch import Batch
from shoal.engine.native import NativeRunner
from shoal.kernels.packed import PackedMatrix, unpack
from shoal.kernels.selection import BACKEND
from shoal.model import Transformer, init_weights
from shoal.post.adapters import AdaptedExperts, AdaptedLinear, adapt, merge
from shoal.post.experts_tuning import train_only_used_experts
from shoal.post.packing import Text, make_row
from shoal.post.reference import Reference
from shoal.post.rollouts import LiveWeights
from shoal.runtime import Machine

MACHINE = Machine(torch.device("cpu"), "fp32", 1, 1.0, "")
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))


def stir(model: Transformer) -> None:
    """Adapters as training might leave them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def outputs(model: Transformer) -> torch.Tensor:
    depth = model.config.num_nextn_predict_layers
    with torch.no_grad():
        out = model(IDS, mtp_ids=[IDS] * depth)
        return torch.cat([model.logits(hidden) for hidden in (out.hidden, *out.mtp_hidden)])


@pytest.mark.parametrize("kind", ["v3", "v2", "llama"])
def test_new_adapters_change_nothing(kind: str) -> None:
    model = make_model(kind)
    before = outputs(model)
    adapt(model, 4, 8)
    assert torch.allclose(outputs(model), before, atol=1e-6)


@pytest.mark.parametrize("kind", ["v3", "v2", "llama"])
def test_merging_keeps_the_logits(kind: str) -> None:
    model = make_model(kind)
    plain = outputs(model)
    adapt(model, 4, 8)
    stir(model)
    adapted = outputs(model)
    names = set(dict(model.named_parameters()))
    merge(model)
    assert not (adapted - plain).abs().max() < 1e-2
    assert (outputs(model) - adapted).abs().max() < 1e-4
    assert set(dict(model.named_parameters())) == {name for name in names if not name.endswith(("_a", "_b"))}
    assert not any(isinstance(module, AdaptedLinear | AdaptedExperts) for module in model.modules())


def test_every_matrix_of_every_expert_and_of_attention_learns() -> None:
    model = make_model("v3")
    adapt(model, 4, 8)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if name.endswith(("_a", "_b"))}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    joined = [m.eh_proj for m in model.mtp_modules]
    assert all(isinstance(m, AdaptedLinear) for m in linears if not any(m is j for j in joined))
    stir(model)
    adapted = outputs(model)
    for layer in model.moe_layers:
        for expert in range(8):
            for part in ("gate_proj", "up_proj", "down_proj"):
                b = getattr(layer.experts, f"{part}_b")
                kept = b[expert].clone()
                with torch.no_grad():
                    b[expert] = 0
                    used = (outputs(model) - adapted).abs().max() > 0
                    b[expert] = kept
                assert used, f"adapter of {part} of expert {expert} does nothing"


def test_export_of_a_merged_model_opens_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from shoal.formats.huggingface import save_model

    model = make_model("v3", num_nextn_predict_layers=0)
    adapt(model, 4, 8)
    stir(model)
    with torch.no_grad():
        adapted = model.logits(model(IDS).hidden)
    merge(model)
    save_model(model, tmp_path / "merged", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(IDS).logits - adapted).abs().max() < 1e-4


def test_the_engine_sees_merged_weights() -> None:
    model = make_model("v3")
    adapt(model, 4, 8)
    live = LiveWeights(model, "fp32")
    stir(model)
    live.refresh()
    merge(model)
    merged = LiveWeights(model, "fp32")
    for name, part in merged.parts.items():
        one, other = (unpack(p) if isinstance(p, PackedMatrix) else p for p in (part, live.parts[name]))
        assert torch.allclose(one, other, atol=1e-6), name


@pytest.mark.skipif(BACKEND.cpu is None, reason=BACKEND.reason)
def test_the_engine_sees_what_a_model_has_learnt_about_look_ups() -> None:
    model = Transformer(
        ModelConfig(
            model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
            n_routed_experts=0, repeat_window=30, value_embedding=True, eos_token_id=1,
        )
    )  # fmt: skip
    init_weights(model, 0)
    live = LiveWeights(model, "fp32")
    runner = NativeRunner(model.config, live.parts, 1)
    runner.allocate(4, "fp32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    live.refresh()
    ids = IDS[0].tolist() * 2
    forward = runner.forward(Batch.lay_out([ids], [0], [np.arange(4, dtype=np.int32)]))
    with torch.no_grad():
        whole = model(torch.tensor([ids]))
        assert whole.keys is not None
        expected = model.logits(whole.hidden[0], whole.keys[0])
    torch.testing.assert_close(runner.logits(*forward.predictions(range(len(ids)))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_adapters", [True, False])
def test_the_reference_is_the_model_as_it_was(with_adapters: bool) -> None:
    model = make_model("v3")
    before = outputs(model)
    if with_adapters:
        adapt(model, 4, 8)
    reference = Reference(model)
    if with_adapters:
        stir(model)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    changed = outputs(model)
    with reference:
        assert torch.allclose(outputs(model), before, atol=1e-6)
    assert torch.equal(outputs(model), changed)
    assert not torch.allclose(changed, before, atol=1e-3)


def test_only_the_experts_that_the_data_uses_are_trained() -> None:
    model = make_model("v2")
    ids = IDS[0].numpy()
    row = make_row([Text(ids, ids >= 0)])
    kept = train_only_used_experts(model, [row], 0.5, MACHINE)
    assert 0 < kept.trained < kept.experts == 16 * len(model.moe_layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        model(row.ids).hidden.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = 0
    for name, tensor in model.state_dict().items():
        if ".experts." in name and "shared" not in name:
            changed += int((tensor != before[name]).flatten(1).any(1).sum())
        else:
            assert torch.equal(tensor, before[name]), name
    assert 0 < changed <= 3 * kept.trained
