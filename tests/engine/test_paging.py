"""What is said about a model that is larger than memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from shoal.config import ModelConfig
from shoal.engine.paging import disk_rate, outlook, touched_bytes
from shoal.engine.weights import Weights
from shoal.formats.parts import Scheme, parts_of

SHAPE = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
CONFIG = ModelConfig(**SHAPE, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, num_nextn_predict_layers=1)  # type: ignore[arg-type]


def weights() -> Weights:
    scheme = Scheme("int4", "int8", "int8")
    plan = parts_of(CONFIG, scheme)
    return Weights(CONFIG, scheme, {name: part.assemble(part.empty()) for name, part in plan.items()})


def test_a_token_touches_its_experts_and_no_drafting_layer() -> None:
    model = weights()
    always, experts = touched_bytes(model)
    stacks = [model.parts[f"model.layers.1.mlp.experts.{part}_proj"].nbytes for part in ("gate", "up", "down")]
    assert experts == sum(stacks) * 2 // 8
    assert always == sum(
        part.nbytes
        for name, part in model.parts.items()
        if not isinstance(part, torch.Tensor) and ".experts." not in name and ".layers.2." not in name
    )


def test_less_memory_means_fewer_experts_in_it_and_less_speed() -> None:
    model = weights()
    assert outlook(model, model.nbytes, 1e9) is None
    speeds = []
    always, _ = touched_bytes(model)
    stacks = sum(part.nbytes for name, part in model.parts.items() if ".experts." in name)
    assert "no reading from disk" in (outlook(model, model.nbytes - 1, 1e6) or ""), "what is left out is never read"
    for available in (always + stacks // 2, always, always // 2, 0):
        text = outlook(model, available, 1e6)
        assert text is not None
        speeds.append(float(re.findall(r"at most ([\d.e+]+) tokens/s", text)[0]))
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] == float(f"{1e6 / sum(touched_bytes(model)):.2g}")


def test_disk_rate_is_measured_on_the_largest_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(10))
    (tmp_path / "b.safetensors").write_bytes(bytes(1 << 20))
    assert disk_rate(tmp_path) > 1e5
