"""Saved activations against what autograd really keeps."""

from dataclasses import replace

import pytest
import torch

from shoal.config import ModelConfig
from shoal.kernels.selection import BACKEND
from shoal.model import Transformer, init_weights
from shoal.plan.layout import Layout, Stage
from shoal.plan.memory import stage_activation_bytes
from shoal.train.loss import compute_losses

MLA = ModelConfig(
    vocab_size=64, hidden_size=96, num_hidden_layers=3, intermediate_size=256, num_attention_heads=3, kv_lora_rank=48, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, num_nextn_predict_layers=1,
)  # fmt: skip
SHAPES = {
    "mla": MLA,
    "query latent, norm of queries": replace(MLA, q_lora_rank=80, qk_norm=True, num_nextn_predict_layers=0),
    "dense": replace(MLA, n_routed_experts=None),
    "llama": replace(MLA, model_type="llama", n_routed_experts=None, num_key_value_heads=1, num_nextn_predict_layers=0),
}


@pytest.mark.skipif(BACKEND.cpu is None, reason=BACKEND.reason)
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_those_that_autograd_keeps(name: str) -> None:
    shape = SHAPES[name]
    model = Transformer(shape)
    init_weights(model, 0)
    batch, time, depth = 4, 128, shape.num_nextn_predict_layers
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # the gradient of the head is kept as well, once for every prediction: it is no activation
    head = {parameter.nbytes for parameter in [model.lm_head.weight]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes() not in head:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = compute_losses(model, torch.randint(64, (batch, time + 1 + depth)), 0.3 if depth else 0.0, 1e-4)
    assert losses.total.requires_grad
    stage = Stage(tuple(range(shape.num_hidden_layers + depth)), embedding=True, head=True)
    predicted = stage_activation_bytes(shape, stage, Layout(precision="fp32", micro_batch=batch), batch * time)
    assert predicted == pytest.approx(sum(kept.values()), rel=0.03)
