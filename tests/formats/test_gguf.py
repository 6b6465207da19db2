"""GGUF files: llama.cpp reads the same ids and computes the same logits; what it would compute otherwise is refused."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.config import ModelConfig, UserError
from shoal.data import Tokenizer, train_tokenizer
from shoal.formats.gguf import GgufType, export_gguf
from shoal.formats.gguf_layout import gguf_obstacles
from shoal.formats.gguf_tokenizer import pre_tokenizer_name
from shoal.formats.huggingface import save_model
from shoal.model import Transformer

gguf = pytest.importorskip("gguf")

VOCABULARY = 320
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
V3 = {"q_lora_rank": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
V2 = {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
LLAMA = {"model_type": "llama", "n_routed_experts": None, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "v3 with groups and MTP": {**V3, "num_nextn_predict_layers": 1},
    "v3 without query compression, two MTP layers": {"num_nextn_predict_layers": 2, "qk_nope_head_dim": 16, "v_head_dim": 32},
    "v2 with yarn": {**V2, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "v3 with yarn": {**V3, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "v3 dense throughout, with MTP": {"n_routed_experts": None, "num_nextn_predict_layers": 1},
    "llama": {**LLAMA, "head_dim": 16},
    "llama with scaled rope and tied embedding": {**LLAMA, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama with yarn": {**LLAMA, "rope_scaling": YARN},
    "qwen2": {**LLAMA, "attention_bias": True},
    "qwen2 with yarn": {**LLAMA, "attention_bias": True, "rope_scaling": YARN},
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_tokenizer(["the red fish swims over the reef, étés 12345\n\n  def f(x):\n\treturn x's\n"] * 3, VOCABULARY - 6)


@pytest.fixture
def exported(make_model: Callable[..., Transformer], words: Tokenizer, tmp_path: Path) -> Callable[..., tuple[Transformer, Path]]:
    """A small model and its GGUF file."""

    def export(dtype: GgufType, **changes: Any) -> tuple[Transformer, Path]:
        model = make_model(**{"vocab_size": VOCABULARY, "max_position_embeddings": 128, **changes})
        folder = tmp_path / f"hf-{len(list(tmp_path.iterdir()))}"
        save_model(model, folder)
        out = tmp_path / "model.gguf"
        export_gguf(folder, words, out, dtype)
        return model, out

    return export


def opened(path: Path, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    settings = {"n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0, "flash_attn": False}
    return llama_cpp.Llama(str(path), **{**settings, **options})


def logits_of(llama: Any, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)])


@pytest.fixture
def ids() -> list[int]:
    return torch.randint(VOCABULARY - 6, (70,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same_logits(kind: str, exported: Any, ids: list[int]) -> None:
    model, path = exported("f32", **KINDS[kind])
    with torch.inference_mode():
        wanted = model.logits(model(torch.tensor([ids])).hidden)[0]
    torch.testing.assert_close(logits_of(opened(path), ids), wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.004), ("q8_0", 0.05), ("q4_0", 0.7)])
@pytest.mark.parametrize("kind", ["v3 without query compression, two MTP layers", "llama"])
def test_smaller_numbers_stay_close(kind: str, dtype: GgufType, tolerance: float, exported: Any, ids: list[int]) -> None:
    # Few experts are near a tie in this model, but one that is changes a token's logits by much: hence the median.
    model, path = exported(dtype, **KINDS[kind])
    with torch.inference_mode():
        wanted = model.logits(model(torch.tensor([ids])).hidden)[0]
    error = (logits_of(opened(path), ids) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.median() < tolerance


def test_llama_cpp_drafts_with_the_mtp_layer(exported: Any, ids: list[int]) -> None:
    model, path = exported("f32", **KINDS["v3 with groups and MTP"])
    llama_cpp = pytest.importorskip("llama_cpp")
    with torch.inference_mode():
        out = model(torch.tensor([ids[:-1]]), mtp_ids=[torch.tensor([ids[1:]])])
        wanted = model.logits(out.mtp_hidden[0])[0]
    params = llama_cpp.llama_model_default_params()
    params.load_mtp = True
    loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.ctx_type, settings.type_k, settings.type_v, settings.flash_attn_type = 256, 1, 0, 0, 0
    context = llama_cpp.llama_init_from_model(loaded, settings)
    count = len(ids) - 1
    batch = llama_cpp.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    hidden = np.ascontiguousarray(out.hidden[0].numpy())
    batch.embd = hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    for i, token in enumerate(ids[1:]):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (VOCABULARY,)).copy() for i in range(count)]
    llama_cpp.llama_free(context)
    torch.testing.assert_close(torch.tensor(np.stack(rows)), wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "text",
    [
        "the red fish, été 😀 swims's it'S 'Re",
        "\n\n  def f(x):\n\treturn x  + 12345 \n",
        " ",
        "日本語のテキスト…!!\r\n\r\n",
        "a\u00a0b \u2003c",
    ],
)
def test_llama_cpp_reads_the_same_ids(text: str, exported: Any, words: Tokenizer) -> None:
    _, path = exported("f16", **LLAMA)
    llama = opened(path, vocab_only=True)
    assert llama.tokenize(text.encode(), add_bos=True, special=False) == words.encode(text, bos=True)
    chat = f"<｜User｜>{text}<｜Assistant｜><think>"
    assert llama.tokenize(chat.encode(), add_bos=False, special=True) == words.encode(chat, special=True)
    assert llama.detokenize(words.encode(text)).decode() == text
    assert (llama.token_bos(), llama.token_eos()) == (words.bos_id, words.eos_id)
    assert "<｜Assistant｜>" in llama.metadata["tokenizer.chat_template"]


@pytest.mark.parametrize("asked", [True, False])
def test_llama_cpp_adds_begin_of_text_where_we_do(asked: bool, exported: Any, words: Tokenizer, tmp_path: Path) -> None:
    exported("f16", **LLAMA)
    tokenizer = Tokenizer(words.json, words.config | {"add_bos_token": asked})
    export_gguf(tmp_path / "hf-0", tokenizer, tmp_path / "model.gguf", "f16")
    llama = opened(tmp_path / "model.gguf", vocab_only=True)
    assert llama.tokenize(b"the red fish", add_bos=True, special=False) == tokenizer.encode("the red fish", bos=True)
    assert (tokenizer.encode("the red fish", bos=True)[0] == words.bos_id) == asked


def test_other_peoples_base_models_get_no_chat_template(exported: Any, words: Tokenizer, tmp_path: Path) -> None:
    exported("f16", **LLAMA)
    export_gguf(tmp_path / "hf-0", Tokenizer(words.json.replace("<｜User｜>", "<user>"), words.config), tmp_path / "model.gguf", "f16")
    assert "tokenizer.chat_template" not in gguf.GGUFReader(tmp_path / "model.gguf").fields


def test_templates_with_names_are_in_the_file(exported: Any, words: Tokenizer, tmp_path: Path) -> None:
    exported("f16", **LLAMA)
    export_gguf(tmp_path / "hf-0", Tokenizer(words.json, words.config, "D", {"tool_use": "T"}), tmp_path / "model.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    templates = {name: field.contents() for name, field in fields.items() if "chat_template" in name}
    assert templates == {
        "tokenizer.chat_template": "D",
        "tokenizer.chat_template.tool_use": "T",
        "tokenizer.chat_templates": ["tool_use"],
    }


@pytest.mark.parametrize("rule", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_llama_cpp_would_find_elsewhere_are_refused(rule: str, exported: Any, words: Tokenizer, tmp_path: Path) -> None:
    exported("f16", **LLAMA)
    content = json.loads(words.json)
    content["added_tokens"][5][rule] = True
    with pytest.raises(UserError, match="'<think>' depends on what stands beside it"):
        export_gguf(tmp_path / "hf-0", Tokenizer(json.dumps(content), words.config), tmp_path / "model.gguf", "f16")


def test_every_weight_is_in_the_file(exported: Any) -> None:
    model, path = exported("q4_0", **{**V3, "num_nextn_predict_layers": 1})
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert sum(int(np.prod(tensor.shape)) for tensor in held.values()) == sum(
        tensor.numel() for tensor in (*model.parameters(), *model.buffers())
    )
    assert [name for name in held if "nextn" in name] == [
        f"blk.2.nextn.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "shared_head_norm")
    ]
    # rows of 32 are blocks, rows of 16 are none
    assert held["blk.1.ffn_gate_exps.weight"].tensor_type.name == "Q4_0"
    assert held["blk.1.ffn_down_exps.weight"].tensor_type.name == "F16"
    assert held["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"


REFUSED: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "logit_softcap": {"logit_softcap": 15.0},
    "rms_norm_eps": {"rms_norm_eps": 1e-5},
    "V2-Lite": {"num_hidden_layers": 27, "q_lora_rank": 16},
    "one like V2-Lite": {"num_hidden_layers": 48, "vocab_size": 128256, "q_lora_rank": 16},
    "heads are 96 wide": {**LLAMA, "hidden_size": 64, "attention_bias": True, "head_dim": 24},
    "does not apply to qwen2": {**LLAMA, "attention_bias": True, "rope_scaling": LLAMA3},
    "factor 0.5": {"rope_scaling": {**YARN, "factor": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "routed_scaling_factor": {"routed_scaling_factor": 0.0},
    "best two": {**V2, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "mscale": {"rope_scaling": YARN},
    "llama3": {"rope_scaling": LLAMA3},
    "n_shared_experts": {"n_shared_experts": 0},
    "moe_layer_freq": {"moe_layer_freq": 2},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(reason: str) -> None:
    assert any(reason in obstacle for obstacle in gguf_obstacles(ModelConfig(**REFUSED[reason])))
    assert not gguf_obstacles(ModelConfig())
    assert not gguf_obstacles(ModelConfig(num_hidden_layers=48, q_lora_rank=16))
    assert not gguf_obstacles(ModelConfig(num_hidden_layers=48, vocab_size=128256))


def test_refusal_leaves_no_file(exported: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qk_norm"):
        exported("f16", qk_norm=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf-0"]


def test_only_gguf_files_are_replaced(exported: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("my notes")
    with pytest.raises(UserError, match="is no GGUF file"):
        exported("f16", **LLAMA)
    assert (tmp_path / "model.gguf").read_text() == "my notes"
    (tmp_path / "model.gguf").write_bytes(b"GGUF old")
    with pytest.raises(UserError, match="beyond 65504"):
        exported("f16", initializer_range=1e6, **LLAMA)
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF old"
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name]


def test_full_disk_is_noticed_before_writing(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="are free there"):
        exported("f16", **LLAMA)
    assert not (tmp_path / "model.gguf").exists()


QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def splits(*patterns: str, behavior: str = "Isolated", invert: bool = False, use_regex: bool = False) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert} for pattern in patterns
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex})
    return {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def official_rules() -> Iterator[tuple[str, dict[str, Any]]]:
    """Word rules as the official tokenizer.json files have them."""
    yield "qwen2", splits(QWEN2)
    yield "qwen2", splits(QWEN2, behavior="Removed", invert=True)  # what lies between the words, which is nothing
    yield "llama-bpe", splits(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    v3 = (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
        "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    )
    yield "deepseek-v3", splits(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", v3)
    yield "gpt-2", {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}


@pytest.mark.parametrize(("name", "content"), list(official_rules()))
def test_known_word_rules(name: str, content: dict[str, Any], words: Tokenizer) -> None:
    assert pre_tokenizer_name(content) == name
    assert pre_tokenizer_name(json.loads(words.json)) == "qwen2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (splits(r"\w+"), "no name"),
        (splits(QWEN2, behavior="Removed"), "splits followed by bytes"),
        (splits(QWEN2, behavior="MergedWithNext"), "splits followed by bytes"),
        (splits(r"\p{N}{1,3}", QWEN2, behavior="Removed", invert=True), "splits followed by bytes"),
        (splits(QWEN2, use_regex=True), "a second time"),
        ({"model": {"type": "Unigram"}}, "byte-level BPE"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}}, "splits followed by bytes"),
        ({**splits("x"), "normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ],
)
def test_other_tokenizers_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pre_tokenizer_name(content)
