"""The tokenizer: exact round trips, no forged special tokens, files that transformers opens."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.data import Tokenizer, train_tokenizer
from shoal.data import tokenizer as module
from shoal.data.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS

CODE = [inspect.getsource(source) for source in (inspect, random, json)]
TRICKY = "<think>\r\nIt's 2024\x00\x07</think> " + BOS + "<｜User｜> été 漢字 \ufeff\u202e\U0001f600" + EOS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CODE, 1024)


@given(st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\r\n", "\r", "\t", "a", "7", "｜", "<", "\x00"])).map("".join))
@example(TRICKY)
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(id >= len(SPECIAL_TOKENS) for id in ids), "ordinary text became a special token"
    assert tokenizer.encode_batch([text]) == [ids]


def test_special_tokens_have_the_first_ids_and_nothing_else_is_special(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("".join(SPECIAL_TOKENS), special=True) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(range(16), skip_special=False) == "".join(SPECIAL_TOKENS)
    assert tokenizer.decode(range(16)) == "".join(SPECIAL_TOKENS).replace(BOS, "").replace(EOS, "").replace(PAD, "")
    assert len(json.loads(tokenizer.json)["added_tokens"]) == len(SPECIAL_TOKENS)


def test_begin_of_text_is_added_once_and_only_when_asked_for(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("hello")
    assert tokenizer.encode("hello", bos=True) == [0, *plain]
    assert 0 not in plain


def test_digits_stand_alone() -> None:
    tokenizer = train_tokenizer(["year 2024, 2024! 2024? x2024\n"] * 50, 400)
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("year")) == 1


def test_vocabulary_is_what_was_asked_for_or_what_the_text_gives(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 1024
    short = train_tokenizer(["abab"], 1024)
    assert short.vocab_size == len(SPECIAL_TOKENS) + 256 + 2
    assert short.decode([short.vocab_size, 5000]) == ""
    assert train_tokenizer([], 272).vocab_size == 272
    with pytest.raises(UserError, match="272"):
        train_tokenizer(CODE, 271)


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(CODE), 1024).json == tokenizer.json


def test_sample_is_bounded_and_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS", 10_000)
    sample = module._sample(f"{number:0100}" for number in range(5_000))
    assert 4_000 <= sum(map(len, sample)) <= 10_000
    quarters = [int(text) // 1_250 for text in sample]
    assert all(quarters.count(quarter) >= 5 for quarter in range(4))
    assert sample == module._sample(f"{number:0100}" for number in range(5_000))


def test_lone_surrogate_is_the_users_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_saved_folder_loads_unchanged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, model_max_length=77)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(path)
        assert loaded.json == tokenizer.json
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.chat_template is None
    assert train_tokenizer(CODE, 1023).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("model_type", [None, "deepseek_v3", "llama"])
def test_transformers_reads_the_same_ids(tokenizer: Tokenizer, tmp_path: Path, model_type: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    saved = Tokenizer(tokenizer.json, tokenizer.config, "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}")
    saved.save(tmp_path, model_max_length=512)
    if model_type:  # the folder of a whole model
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TRICKY, CODE[2][:2000]):
        ids = tokenizer.encode(text, bos=True, special=True)
        assert theirs(text).input_ids == ids
        assert theirs(text, add_special_tokens=False).input_ids == ids[1:]
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special=False)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert (len(theirs), theirs.model_max_length) == (1024, 512)
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == BOS + "<｜User｜>hi"
    assert Tokenizer.load(tmp_path).chat_template == saved.chat_template


def test_foreign_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    lone = Tokenizer.load(tmp_path)
    assert (lone.bos_id, lone.eos_id) == (0, 1), "a lone tokenizer.json with well-known names"

    config = {"bos_token": None, "eos_token": {"content": "<think>"}, "chat_template": [{"name": "default", "template": "T"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    qwen = Tokenizer.load(tmp_path)
    assert (qwen.bos_id, qwen.eos_id, qwen.chat_template) == (None, 5, "T")
    assert qwen.encode("hi", bos=True) == qwen.encode("hi")

    (tmp_path / "chat_template.jinja").write_text("U")
    assert Tokenizer.load(tmp_path).chat_template == "U"

    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not valid UTF-8"):
        Tokenizer.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for templates in ([{"name": "default"}, "T"], [{"template": "T"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"id": 1}, "chat_template": templates}))
        assert Tokenizer.load(tmp_path).chat_template is None
    with pytest.raises(UserError, match="eos_token"):
        _ = Tokenizer.load(tmp_path).eos_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"default": "T"}}))
    with pytest.raises(UserError, match="chat template"):
        Tokenizer.load(tmp_path)

    (tmp_path / "tokenizer_config.json").write_text("{}{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    with pytest.raises(UserError, match="eos_token"):
        _ = Tokenizer.load(tmp_path).eos_id
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize("processed", [True, False])
def test_begin_of_text_is_added_where_the_files_say_so(tokenizer: Tokenizer, tmp_path: Path, processed: bool, asked: bool | None) -> None:
    transformers = pytest.importorskip("transformers")
    content = json.loads(tokenizer.json)
    if not processed:
        content["post_processor"] = None
    config = {key: value for key, value in tokenizer.config.items() if not key.startswith("add_")}
    Tokenizer(json.dumps(content), config if asked is None else config | {"add_bos_token": asked}).save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = tokenizer.encode("hello")
    assert ours.encode("hello", bos=True) == ([0, *plain] if (processed if asked is None else asked) else plain)
    if asked in (None, processed):  # where the two files disagree, transformers 5 reads only tokenizer.json; 4 and llama.cpp do as we do
        assert ours.encode("hello", bos=True) == theirs("hello").input_ids
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).adds_bos == processed, "a lone tokenizer.json"


def test_what_was_cut_and_padded_last_time_is_forgotten(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_str(tokenizer.json)
    backend.enable_truncation(4)
    backend.enable_padding(length=4, pad_id=2, pad_token=PAD)
    (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    texts = ["def f(x): return x + 1", "a"]
    assert loaded.encode_batch(texts) == [tokenizer.encode(text) for text in texts] == [loaded.encode(text) for text in texts]
    assert [loaded.encode(text, special=True) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert (json.loads(loaded.json)["truncation"], json.loads(loaded.json)["padding"]) == (None, None)


def test_ordinary_added_tokens_stay_in_use(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.json)
    content["added_tokens"].append({**content["added_tokens"][5], "id": 1024, "content": "    "})
    with_spaces = Tokenizer(json.dumps(content), tokenizer.config)
    assert with_spaces.encode("a    b")[1] == 1024
    assert with_spaces.vocab_size == 1025
    assert with_spaces.encode("<think>") == tokenizer.encode("<think>")
