"""Other people's tokenizers: what transformers makes of the same text, and no control token that nobody meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.foreign import KINDS, foreign

from shoal.config import UserError
from shoal.data import Tokenizer
from shoal.data.chat_template import encode_chat, encode_turns, render_chat

NFKC = foreign("unigram", normalizer='{"type": "NFKC"}')
TOKENIZERS = {**{kind: foreign(kind) for kind in KINDS}, "unigram with NFKC": NFKC}
SENTENCEPIECE = [name for name in TOKENIZERS if name != "wordpiece"]
BOS, EOS = 1, 2
WRITTEN = st.lists(st.sampled_from(["</s>", "<s>", "＜/s＞", "<", "/s>", "yes", " ", "\n", "漢", "\ue000"]), max_size=8).map("".join)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content }}{{ eos_token }}[assistant]\n"
    "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% endif %}{% endfor %}"
)


def controls(ids: list[int]) -> list[int]:
    return [token for token in ids if token in (BOS, EOS)]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=WRITTEN, before=WRITTEN)
def test_text_holds_no_control_token(name: str, text: str, before: str) -> None:
    tokenizer = TOKENIZERS[name]
    behind = tokenizer.encode(before)
    assert not controls(tokenizer.encode(text))
    assert not controls(tokenizer.encode(text, behind=[*behind, BOS]) + tokenizer.encode(text, behind=behind))
    assert not controls(tokenizer.encode_batch([text])[0])
    assert tokenizer.encode(text, special=True).count(EOS) == text.count("</s>")


@pytest.mark.parametrize("name", SENTENCEPIECE)
@given(content=WRITTEN)
def test_a_message_holds_no_control_token(name: str, content: str) -> None:
    speaker = Tokenizer(TOKENIZERS[name].json, TOKENIZERS[name].config, TEMPLATE)
    talk = [{"role": "user", "content": content}]
    ids, text = encode_chat(speaker, talk), render_chat(speaker, talk)
    assert controls(ids) == [BOS, EOS]
    if "＜" not in text and name != "prepend":  # NFKC has no way back, and Llama 2's writes a space behind every control token
        assert speaker.decode(ids, skip_special=False).removeprefix("<s>").lstrip() == text.removeprefix("<s>").lstrip()


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_text_that_spells_a_control_token_is_not_lost(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode("yes</s>my <s> <unk>lord 漢")) == "yes</s>my <s> <unk>lord 漢"


@pytest.mark.parametrize("name", SENTENCEPIECE)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["yes", "my lord", " ", "fish", "漢", "[user]"]), min_size=1, max_size=4).map("".join),
        min_size=2,
        max_size=4,
    )
)
def test_what_is_learnt_are_the_tokens_that_transformers_gives(name: str, texts: list[str], theirs: dict[str, Any]) -> None:
    """Where no token lies across the beginning of an answer: behind a line end, none does here."""
    speaker = Tokenizer(TOKENIZERS[name].json, TOKENIZERS[name].config, TEMPLATE)
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    pieces = encode_turns(speaker, talk)
    assert [token for ids, _ in pieces for token in ids] == theirs[name].apply_chat_template(talk, return_dict=False)
    written = [speaker.decode([*speaker.encode("\n"), *ids]) for ids, is_written in pieces if is_written]
    assert written == ["\n" + text for text in texts[1::2]]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """transformers' tokenizers of the same files."""
    transformers = pytest.importorskip("transformers")
    opened = {}
    for name, tokenizer in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("theirs")
        Tokenizer(tokenizer.json, tokenizer.config, TEMPLATE).save(folder)
        opened[name] = transformers.AutoTokenizer.from_pretrained(folder)
    return opened


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_text_goes_on_without_a_space_of_its_own(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for before, text in (("a king\n", "yes my lord"), ("yes\n", " my</s>lord"), ("fish\n", "漢\n")):
        behind = tokenizer.encode(before)
        assert behind + tokenizer.encode(text, behind=behind) == tokenizer.encode(before + text)


def test_the_one_tokenizer_without_a_space_is_read_as_ever() -> None:
    wordpiece = TOKENIZERS["wordpiece"]
    assert wordpiece.encode("my lord", behind=wordpiece.encode("yes")) == wordpiece.encode("my lord")


def test_tokens_that_only_an_older_file_names_are_known(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    foreign("prepend").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    named = {"eos_token": {"content": "<s>", "lstrip": False, "rstrip": False}, "pad_token": "<unk>", "bos_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    for more in ({}, {"added_tokens_decoder": {"1": {"content": "<s>"}}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
        assert ours.special_texts.get("eos_token") == theirs.eos_token == (None if more else "<s>")
        assert (ours.bos_id, ours.special_texts.get("pad_token")) == (theirs.bos_token_id, theirs.pad_token)
    (tmp_path / "special_tokens_map.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"special_tokens_map\.json is not JSON"):
        Tokenizer.load(tmp_path)


def test_a_file_on_which_the_library_panics_is_one_clear_line(tmp_path: Path) -> None:
    content = json.loads(foreign("prepend").json)
    content["model"]["continuing_subword_prefix"] = "##"  # shorter than the tokens to which it would have been added
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
