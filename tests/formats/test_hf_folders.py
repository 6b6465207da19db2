from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.config import UserError
from shoal.formats.huggingface import load_model, load_state, read_config, save_model
from shoal.model import Transformer

Make = Callable[..., Transformer]


def assert_same(a: Transformer, b: Transformer) -> None:
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype, name
        assert torch.equal(tensor, states[1][name]), name


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("shard", [10**9, 6000])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_nextn_predict_layers": 2},
        {"tie_word_embeddings": True, "num_nextn_predict_layers": 1},
        {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "q_lora_rank": 8},
        {"model_type": "llama", "attention_bias": True, "num_key_value_heads": 1},
        {"qk_norm": True, "logit_softcap": 15.0, "init": "fan_in", "moe_layer_freq": 2},
    ],
)
def test_round_trip_keeps_every_bit(make_model: Make, tmp_path: Path, changes: dict[str, Any], shard: int) -> None:
    model = make_model(**changes)
    save_model(model, tmp_path, max_shard_bytes=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == 6000)
    loaded = load_model(tmp_path)
    assert_same(model, loaded)
    config = loaded.config
    config.extra = {}
    assert {name: getattr(config, name) for name in changes} == changes
    assert config.rope_scaling == model.config.rope_scaling


def test_tied_weights_stay_one_tensor(make_model: Make, tmp_path: Path) -> None:
    save_model(make_model(tie_word_embeddings=True), tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_bf16_keeps_the_routing_bias_in_fp32(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert {tensor.dtype for name, tensor in stored.items() if name != bias} == {torch.bfloat16}
    assert torch.equal(stored[bias], model.state_dict()[bias])
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.state_dict()[bias], model.state_dict()[bias])
    assert load_model(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_files_bear_the_official_names(make_model: Make, tmp_path: Path) -> None:
    model = make_model(num_nextn_predict_layers=1)
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    experts = model.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(stored["model.layers.1.mlp.experts.3.down_proj.weight"], experts[3])
    for copy, source in {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}.items():
        assert torch.equal(stored[f"model.layers.2.{copy}.weight"], stored[source])
    assert {"eh_proj", "enorm", "hnorm"} <= {name.split(".")[3] for name in stored if name.startswith("model.layers.2.")}


def test_mtp_copies_may_be_absent_but_not_different(make_model: Make, tmp_path: Path) -> None:
    model = make_model(num_nextn_predict_layers=1)
    save_model(model, tmp_path, mtp_copies=False)
    assert_same(model, load_model(tmp_path))
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.2.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match=r"layers\.2\.embed_tokens\.weight differs"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "first", "all_of_them"),
    [
        (5, {"eos_token_id": [5, 7]}, 5, [5, 7]),
        ([5, 7], {"eos_token_id": 9}, 5, [5, 7, 9]),
        (None, {"eos_token_id": 7}, 7, None),
        (5, {"temperature": 0.6}, 5, None),
        (5, {"eos_token_id": [5]}, 5, None),
        (None, {"eos_token_id": None}, None, None),
        ([5], None, 5, [5]),
    ],
)
def test_ends_of_a_text_that_only_generation_config_names(
    make_model: Make, tmp_path: Path, config: Any, generation: Any, first: Any, all_of_them: Any
) -> None:
    save_model(make_model(), tmp_path)
    edit_config(tmp_path, eos_token_id=config)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    for read in (read_config(tmp_path), load_model(tmp_path).config):
        assert (read.eos_token_id, read.extra.get("eos_token_id")) == (first, all_of_them)


@pytest.mark.parametrize("ends", ["</s>", [1, None], {"id": 1}, -2, True])
def test_ends_of_a_text_that_are_no_tokens_are_refused(make_model: Make, tmp_path: Path, ends: Any) -> None:
    save_model(make_model(), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UserError, match=r"generation_config\.json: it must be the id of a token"):
        read_config(tmp_path)


def test_load_state_fills_in_place(make_model: Make, tmp_path: Path) -> None:
    source, target = make_model(seed=1), make_model(seed=2)
    parameters = list(target.parameters())
    save_model(source, tmp_path)
    load_state(target, tmp_path)
    assert_same(source, target)
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))


def test_fp8_files_are_dequantized(make_model: Make, tmp_path: Path) -> None:
    model = make_model(num_nextn_predict_layers=1)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    expected: dict[str, torch.Tensor] = {}
    block = (5, 7)  # fits no side of the matrices: every edge is ragged

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name and "eh_proj" not in name]:
            rows, columns = tensors[name].shape
            scale = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
            wide = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
            tensors[name] = (tensors[name].float() / wide).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            expected[name] = (tensors[name].float() * wide).bfloat16()

    edit(tmp_path, quantize)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_config(tmp_path, quantization_config=quantization)
    loaded = load_model(tmp_path)
    state = loaded.state_dict()
    for name, tensor in expected.items():
        if ".experts." in name:
            prefix, expert, part = name.removesuffix(".weight").rsplit(".", 2)
            assert torch.equal(state[f"{prefix}.{part}"][int(expert)], tensor), name
        else:
            assert torch.equal(state[name], tensor), name
    assert "quantization_config" not in loaded.config.extra
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.weight_scale_inv"))
    with pytest.raises(UserError, match=r"scales .* are missing"):
        load_model(tmp_path)


def damaged(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damaged(lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight")),
            r"lacks 1 tensor \(model.layers.1.mlp.experts.2.up_proj.weight\)",
        ),
        (damaged(lambda t: t.update({f"x{i}": torch.ones(1) for i in range(5)})), r"5 tensors \(x0, x1, x2 and 2 more\)"),
        (damaged(lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)})), r"layers\.2\.input_layernorm"),
        (damaged(lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)})), "weight_scale_inv"),
        (damaged(lambda t: t.update({GATE: torch.ones(5, 32)})), r"gate.weight has shape \[5, 32\], but config.json makes it \[4, 32\]"),
        (damaged(lambda t: t[GATE].view(-1)[7].fill_(float("nan"))), "gate.weight holds NaN"),
        (damaged(lambda t: t[GATE].view(-1)[7].fill_(float("inf"))), "gate.weight holds NaN or infinite"),
        (damaged(lambda t: t.update({GATE: t[GATE].to(torch.int8)})), "int8"),
        (damaged(lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})), "scales .* are missing"),
        (damaged(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.int8)})), "stored as int8"),
        (damaged(lambda t: t.pop("model.embed_tokens.weight")), r"lacks 1 tensor \(model.embed_tokens.weight\)"),
        (truncate, "not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda f: edit_config(f, model_type="mamba"), "model_type 'mamba' is not supported"),
        (lambda f: edit_config(f, rope_interleave=False), "rope_interleave"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), "'gptq' are not supported"),
    ],
)
def test_a_damaged_folder_gives_one_clear_line(make_model: Make, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    save_model(make_model(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(make_model: Make, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path, max_shard_bytes=20000)
    sorted(tmp_path.glob("model-*"))[1].unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-"):
        load_model(tmp_path)


def test_known_leftovers_of_old_files_are_ignored(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert_same(model, load_model(tmp_path))


def test_every_tensor_keeps_its_own_type_unless_one_is_asked_for(make_model: Make, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "source")
    edit(tmp_path / "source", lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if n.endswith("_proj.weight")}))
    edit(tmp_path / "source", lambda tensors: tensors.update({n: tensors[n].bfloat16() for n in ("model.embed_tokens.weight",)}))
    wanted = load_file(tmp_path / "source" / "model.safetensors")
    save_model(load_model(tmp_path / "source"), tmp_path / "copy")
    got = load_file(tmp_path / "copy" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: tensor.dtype for name, tensor in wanted.items()}
    assert all(tensor.equal(wanted[name]) for name, tensor in got.items())
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["torch_dtype"] == "float16"
    whole = load_model(tmp_path / "source", dtype=torch.float32).state_dict()
    assert all(whole[name].equal(wanted[name].float()) for name in whole.keys() & wanted.keys())


def test_tensors_without_elements_are_parts_that_are_not_there(make_model: Make, tmp_path: Path) -> None:
    model = make_model(n_shared_experts=None)
    save_model(model, tmp_path)
    empty = {f"model.layers.1.mlp.shared_experts.{part}_proj.weight": torch.empty(0, 32) for part in ("gate", "up", "down")}
    edit(tmp_path, lambda tensors: tensors.update(empty))
    assert_same(load_model(tmp_path), model)


def test_weights_are_never_overwritten(make_model: Make, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    with pytest.raises(UserError, match="already holds weights"):
        save_model(make_model(), tmp_path)


def test_own_settings_are_not_passed_off_as_deepseek(make_model: Make, tmp_path: Path) -> None:
    save_model(make_model(qk_norm=True), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["base_model_type"]) == ("shoal", "deepseek_v3")
    loaded = load_model(tmp_path)
    assert loaded.config.model_type == "deepseek_v3"
    assert loaded.config.qk_norm
