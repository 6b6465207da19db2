"""Logits of our model and of transformers' own implementation, over files that either side has written."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.formats.huggingface import load_model, save_model
from shoal.model import Transformer

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SEARCH = settings(max_examples=10, derandomize=True, suppress_health_check=list(HealthCheck))
LENGTH = 40


def yarn(draw: st.DrawFn) -> dict[str, Any]:
    scaling: dict[str, Any] = {"type": "yarn", "rope_type": "yarn", "factor": draw(st.sampled_from([1.0, 4.0, 40.0]))}
    scaling |= {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": draw(st.sampled_from([16, 512]))}
    mscale, all_dim = draw(st.sampled_from([(1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (None, None)]))
    if mscale is not None:
        scaling |= {"mscale": mscale, "mscale_all_dim": all_dim}
    return scaling


def llama3(draw: st.DrawFn) -> dict[str, Any]:
    original = draw(st.sampled_from([16, 64]))
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


@st.composite
def common(draw: st.DrawFn, heads: tuple[int, ...] = (2, 4)) -> dict[str, Any]:
    return {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": draw(st.sampled_from(heads)),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "rope_theta": draw(st.sampled_from([10000.0, 500.0])),
        "max_position_embeddings": 640,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


@st.composite
def deepseek(draw: st.DrawFn, version: int) -> dict[str, Any]:
    shape = draw(common())
    groups, size = draw(st.sampled_from([(1, 6), (2, 3), (4, 2)]))
    grouped = version == 3 or draw(st.booleans())
    open_groups = draw(st.integers(1, groups))
    reachable = size * open_groups if grouped else size * groups
    shape |= {
        "num_key_value_heads": shape["num_attention_heads"],
        "q_lora_rank": draw(st.sampled_from([None, 12])),
        "kv_lora_rank": 16,
        "qk_nope_head_dim": draw(st.sampled_from([8, 12])),
        "qk_rope_head_dim": 8,
        "v_head_dim": draw(st.sampled_from([8, 16])),
        "n_routed_experts": groups * size,
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_experts_per_tok": draw(st.integers(1, min(3, reachable))),
        "moe_intermediate_size": 12,
        "first_k_dense_replace": draw(st.integers(0, shape["num_hidden_layers"])),
        "n_group": groups,
        "topk_group": open_groups,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "norm_topk_prob": version == 3 and draw(st.booleans()),
    }
    if version == 2:
        shape["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    else:
        shape["num_nextn_predict_layers"] = 0
    if draw(st.booleans()):
        shape["rope_scaling"] = yarn(draw)
    return shape


@st.composite
def llama(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(common(heads=(4,)))
    shape |= {"num_key_value_heads": draw(st.sampled_from([1, 2, 4])), "head_dim": draw(st.sampled_from([8, 16]))}
    scaling = draw(st.sampled_from([None, llama3, yarn]))
    if scaling is not None:
        shape["rope_scaling"] = scaling(draw)
    return shape


def build(config_class: Any, shape: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config_class(**shape), dtype=torch.float32).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) - 2)  # most biased scores are negative
    return theirs


@torch.no_grad()
def differences(theirs: Any, ours: Transformer) -> float:
    ids = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = theirs(ids).logits
    assert logits.std() > 0.01
    return float((logits - ours.logits(ours(ids).hidden)).abs().max())


def check(config_class: Any, shape: dict[str, Any]) -> None:
    theirs = build(config_class, shape)
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as back:
        theirs.save_pretrained(there)
        ours = load_model(Path(there))
        assert differences(theirs, ours) < 1e-4
        save_model(ours, Path(back))
        reopened, report = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
        assert not any(report.values()), report
        assert differences(reopened, ours) < 1e-4


@SEARCH
@given(deepseek(3))
def test_deepseek_v3_agrees_both_ways(shape: dict[str, Any]) -> None:
    check(transformers.DeepseekV3Config, shape)


@SEARCH
@given(deepseek(2))
def test_deepseek_v2_agrees_both_ways(shape: dict[str, Any]) -> None:
    check(transformers.DeepseekV2Config, shape)


@SEARCH
@given(llama())
def test_llama_agrees_both_ways(shape: dict[str, Any]) -> None:
    check(transformers.LlamaConfig, shape)


def test_qwen2_biases_agree_both_ways() -> None:
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = build(transformers.Qwen2Config, {**shape, "num_key_value_heads": 2, "initializer_range": 0.15})
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as back:
        theirs.save_pretrained(there)
        ours = load_model(Path(there))
        assert differences(theirs, ours) < 1e-4
        save_model(ours, Path(back))
        assert differences(transformers.AutoModelForCausalLM.from_pretrained(back), ours) < 1e-4


@pytest.mark.parametrize("changes", [{"n_shared_experts": None}, {"n_routed_experts": None}, {"num_nextn_predict_layers": 2}])
def test_transformers_opens_models_that_only_we_build(make_model: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = make_model(vocab_size=61, **changes)
    save_model(ours, tmp_path)
    assert differences(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ours) < 1e-4


@torch.no_grad()
def test_mtp_layer_agrees(make_model: Any, tmp_path: Path) -> None:
    from transformers.modeling_layers import MtpModel

    ours = make_model(vocab_size=61, num_nextn_predict_layers=1)
    save_model(ours, tmp_path)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = MtpModel(main, 1).eval()
    module = ours.mtp_modules[0]
    block = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.split(".")[0] not in ("enorm", "hnorm", "eh_proj", "shared_head")
    }
    experts = {part: block.pop(f"mlp.experts.{part}_proj") for part in ("gate", "up", "down")}
    block |= {"mlp.experts.gate_up_proj": torch.cat([experts["gate"], experts["up"]], 1), "mlp.experts.down_proj": experts["down"]}
    theirs.layers[0].mtp_block.load_state_dict(block)
    for name in ("enorm", "hnorm", "eh_proj"):
        getattr(theirs.layers[0], name).load_state_dict(getattr(module, name).state_dict())
    theirs.layers[0].post_norm.load_state_dict(module.shared_head["norm"].state_dict())
    ids = torch.randint(0, 61, (1, 12))
    out = ours(ids[:, :-1], mtp_ids=[ids[:, 1:]])
    positions = torch.arange(1, 12).unsqueeze(0)
    hidden = theirs.forward_layer(0, out.hidden, positions, None, input_ids=ids[:, 1:])
    torch.testing.assert_close(hidden, out.mtp_hidden[0], atol=1e-4, rtol=1e-4)


def test_files_that_announce_mtp_but_hold_none_load_with_a_warning() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    theirs = build(transformers.DeepseekV3Config, {**shape, "vocab_size": 61, "intermediate_size": 40, "num_nextn_predict_layers": 1})
    with tempfile.TemporaryDirectory() as there:
        theirs.save_pretrained(there)
        with pytest.warns(UserWarning, match="announces multi-token prediction"):
            ours = load_model(Path(there))
    assert ours.mtp_modules == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert differences(theirs, ours) < 1e-4
