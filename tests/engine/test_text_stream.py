"""Streamed text: no half characters, and together exactly the whole."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.foreign import KINDS, foreign

from shoal.data import Tokenizer, train_tokenizer
from shoal.engine import TextStream


def byte_level() -> Tokenizer:
    return train_tokenizer(["the fish été 😀 naïve 你好世界 " * 20], 400)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space is part of the word after it, unknown characters are spelt in bytes, the first space is dropped."""
    words = ["▁", "▁the", "▁fish", "s", "h", "é", "a"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.push(token) for token in ids), text.finish()]


@settings(max_examples=150)
@given(st.text(max_size=30))
@example("\ufffd" * 9)
@example("😀" * 5 + "\ufffd")
@example("e\u0301\U000e0001\U0010ffff")
def test_any_text_comes_out_whole_and_in_whole_characters(text: str) -> None:
    tokenizer = TOKENIZERS["byte level"]
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150)
@given(st.sampled_from(sorted(TOKENIZERS)), st.data())
def test_whatever_a_model_says_comes_out_as_if_decoded_at_once(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    if name == "sentencepiece":
        # A lone byte of a character spoils all bytes next to it there, so only whole characters make sense.
        spelt = {"é": [0xC3, 0xA9], "😀": [0xF0, 0x9F, 0x98, 0x80]}
        bytes_of = [[3 + byte for byte in spelt[c]] for c in data.draw(st.lists(st.sampled_from(sorted(spelt)), max_size=4))]
        words = data.draw(st.lists(st.integers(259, tokenizer.vocab_size - 1), max_size=6))
        ids = [token for group in data.draw(st.permutations([*bytes_of, *([word] for word in words)])) for token in group]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_appears_with_its_last_byte_and_words_keep_their_spaces() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [json.loads(tokenizer.json)["model"]["vocab"][name] for name in ("▁the", "<0xC3>", "<0xA9>", "▁fish", "</s>", "▁fish")]
    assert stream(tokenizer, ids) == ["the", "", "é", " fish", "", " fish", ""]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["▁the", "▁fish", "▁", "s", "é", "<0xC3> <0xA9>", "<0xF0> <0x9F> <0x98> <0x80>", "<0x0A>"]), max_size=8))
def test_bytes_of_tokens_join_to_the_text(names: list[str]) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    vocabulary = json.loads(tokenizer.json)["model"]["vocab"]
    ids = [vocabulary[piece] for name in names for piece in name.split(" ")]
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == "".join(stream(tokenizer, ids))
    assert (tokenizer.token_bytes(vocabulary["<0xC3>"]), tokenizer.token_bytes(vocabulary["▁"])) == (b"\xc3", b" ")


def test_half_a_character_at_the_end_is_not_lost() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a\U0010ffff")
    pieces = stream(tokenizer, ids[:-1])
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces) == tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_that_are_not_text_give_nothing(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert stream(tokenizer, [tokenizer.eos_id, tokenizer.eos_id]) == ["", "", ""]
    assert stream(tokenizer, []) == [""]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["the red fish", "yes 漢", "a king\n", "yes my "])
@pytest.mark.parametrize("text", ["swims over", " swims", "漢 fish", "\nyes"])
def test_text_goes_on_behind_a_prompt_as_transformers_decodes_it(kind: str, prompt: str, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = foreign(kind)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.json))
    before, after = tokenizer.encode(prompt), tokenizer.encode(text)
    stream = TextStream(tokenizer, before)
    continued = "".join(map(stream.push, after)) + stream.finish()
    asked, whole = (theirs.decode(ids, skip_special_tokens=True) for ids in (before, before + after))
    assert continued == whole.removeprefix(asked)
    if kind != "wordpiece" and not text.startswith(" "):
        assert (asked, continued) == (prompt, f" {text}"), "what a model writes with the first word's space is shown with it"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_behind_a_control_token_begins_without_a_space(kind: str) -> None:
    tokenizer = foreign(kind)
    stream = TextStream(tokenizer, [*tokenizer.encode("yes"), tokenizer.eos_id])
    assert "".join(map(stream.push, tokenizer.encode("my lord"))) == "my lord"
