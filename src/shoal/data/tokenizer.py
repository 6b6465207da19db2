"""Text to token ids and back: a byte-level BPE in the files that transformers, vLLM and llama.cpp open."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..config import UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁end｜>",
)
"""The first ids of every tokenizer trained here. Only the first three vanish from decoded text: what stands between
`<think>` and `</think>`, or in a tool call, is the reader's business, as with DeepSeek's own files."""

# How text falls into words, across which BPE never merges: the letters of a contraction; a word with the one character
# before it; a single digit; punctuation with the line ends after it; line ends with the space before them; other space.
# This is close to DeepSeek-V3's rule, but digits stand alone: runs of them would fill a small vocabulary and make
# arithmetic harder. It is exactly the rule that llama.cpp calls `qwen2`. Rules that llama.cpp does not know can save 6% of
# the tokens of Python code (by joining a line end with the indentation after it), but it would then read other ids than ours.
WORDS = (
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPACE = "▁"
"""Stands for a space in the tokens of SentencePiece (Llama 2); bytes are spelt `<0xNN>` there."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")

SAMPLE_CHARACTERS = 16_000_000
DOCUMENT_CHARACTERS = 100_000
LEAST_SHARE = 1 / 64

# Names under which a lone `tokenizer.json` may hold these tokens when no `tokenizer_config.json` says so.
KNOWN_BOS = (BOS, "<|begin_of_text|>", "<s>")
KNOWN_EOS = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>")


class Tokenizer:
    """A `tokenizer.json` with the settings that stand beside it.

    `json` is the text of `tokenizer.json`, `config` the content of `tokenizer_config.json`, `chat_template` the Jinja
    source that turns a conversation into text, None for a base model. Safe to use from several threads.
    """

    def __init__(self, json: str, config: dict[str, Any], chat_template: str | None = None) -> None:
        self.json = json
        self.config = config
        self.chat_template = chat_template

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a `tokenizer.json`, or a folder that holds one. Raises `UserError` if there is none or it is not usable."""
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"there is no tokenizer at {file}: give a tokenizer.json or a folder that holds one")
        try:
            text = file.read_text(encoding="utf-8")
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{file} is not a tokenizer.json that can be read: {reason}") from error
        if backend.truncation or backend.padding:  # left there by whoever used it last: transformers, too, forgets them
            text = json.dumps(json.loads(text) | {"truncation": None, "padding": None}, indent=2, ensure_ascii=False) + "\n"
        config = _read_json(file.parent / "tokenizer_config.json")
        if not config:
            known = [next((name for name in names if backend.token_to_id(name) is not None), None) for names in (KNOWN_BOS, KNOWN_EOS)]
            config = _config(*known)
        return cls(text, config, _chat_template(file.parent, config))

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and, if there is a chat template, `chat_template.jinja`.

        `model_max_length` is the number of tokens a model with this tokenizer can read, for programs that cut their input.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(self.config)
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if self.chat_template is not None:
            config.pop("chat_template", None)
            _write(folder / "chat_template.jinja", self.chat_template)
        _write(folder / "tokenizer.json", self.json)
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers with equal `tokenizer.json`."""
        return hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; may be less than was asked for if the training text was short."""
        return max(self._with_special.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text; None if this tokenizer has none (Qwen)."""
        return self._special_id("bos_token")

    @cached_property
    def eos_id(self) -> int:
        """Id of the token that ends a text."""
        token = self._special_id("eos_token")
        if token is None:
            raise UserError("the tokenizer names no end-of-text token: add eos_token to its tokenizer_config.json")
        return token

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a prompt begins with the begin-of-text token: what `add_bos_token` of `tokenizer_config.json` says, else what the
        post-processor of `tokenizer.json` does, as llama.cpp has it. Some name such a token and add none (SmolLM2)."""
        if self.bos_id is None:
            return False
        asked = self.config.get("add_bos_token")
        return asked if isinstance(asked, bool) else self._with_special.encode("").ids[:1] == [self.bos_id]

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`, with the begin-of-text token in front if `bos` and the tokenizer `adds_bos`.

        That is the rule for a prompt. A whole document (in training, or where its likelihood is measured) begins with `bos_id` wherever
        there is one, since something must stand before its first token: so does lm-evaluation-harness.

        With `special`, strings like `<｜User｜>` in the text become their special tokens (for chat templates); without, they
        are ordinary text, so that a document or a user cannot forge one. Raises `UserError` for text that is not Unicode.
        """
        backend = self._with_special if special else self._plain
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # a lone surrogate, which UTF-8 cannot hold
            raise UserError("the text is not valid Unicode: it holds half of a surrogate pair") from error
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text without any special token, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids above the vocabulary nothing.

        With `skip_special`, tokens marked special in `tokenizer.json` (begin, end, padding) are left out.
        """
        return self._with_special.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """What one token writes, which need not be whole characters; nothing for ids above the vocabulary.

        Joined they are the text, but for the space before its first word, which decoding drops where words begin with `SPACE`.
        """
        piece = self._with_special.id_to_token(token)
        if piece is None:
            return b""
        if SPACE in self._decoder:
            byte = _BYTE.fullmatch(piece) if "ByteFallback" in self._decoder else None
            return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()
        if "ByteLevel" in self._decoder and all(character in _BYTES for character in piece) and token not in self._added:
            return bytes(_BYTES[character] for character in piece)
        return self.decode([token], skip_special=False).encode()

    @cached_property
    def writes_bytes(self) -> bool:
        """Whether decoding a text is nothing but joining what `written` gives for its tokens."""
        return (json.loads(self.json).get("decoder") or {}).get("type") == "ByteLevel"

    def written(self, token: int) -> bytes:
        """What one token adds to a decoded text: its bytes; nothing where it is marked special."""
        known = self._written.get(token)
        if known is None:
            known = self._written[token] = b"" if token in self._hidden else self.token_bytes(token)
        return known

    def token_id(self, content: str) -> int | None:
        """Id of the added token with this text; None if there is none."""
        token = self._with_special.token_to_id(content)
        return token if token in self._added else None

    @cached_property
    def control_texts(self) -> frozenset[str]:
        """What spells a control token: text that only a chat template may turn into one."""
        return frozenset(token["content"] for token in json.loads(self.json).get("added_tokens", []) if _is_control(token))

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(token["id"] for token in json.loads(self.json).get("added_tokens", []))

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(token["id"] for token in json.loads(self.json).get("added_tokens", []) if token["special"])

    @cached_property
    def _written(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _decoder(self) -> str:
        """The steps from tokens to text, as JSON."""
        return json.dumps(json.loads(self.json).get("decoder"), ensure_ascii=False)

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.json)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The backend that reads the strings of control tokens as ordinary text."""
        content = json.loads(self.json)
        for token in content.get("added_tokens", []):
            token["special"] = _is_control(token)
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    def _special_id(self, key: str) -> int | None:
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return self._with_special.token_to_id(token) if token else None


def _is_control(token: dict[str, Any]) -> bool:
    """Whether an added token is more than text. DeepSeek marks <｜User｜> and the like as not special; added tokens of another form (runs
    of spaces, in GPT-NeoX) are ordinary text."""
    return bool(token["special"]) or (token["content"][:1], token["content"][-1:]) == ("<", ">")


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (1508.07909) of at most `vocab_size` tokens, learned from a sample of `texts`.

    Ids: `SPECIAL_TOKENS`, the 256 bytes, then merges in the order they were learned, so that any text can be encoded. The same
    texts give the same tokenizer. Raises `UserError` if `vocab_size` cannot even hold the bytes.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise UserError(f"model.vocab_size is {vocab_size}: the special tokens and the 256 bytes alone need {least}")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(texts), trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS, PAD)
    return Tokenizer(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", _config(BOS, EOS) | {"add_bos_token": True, "pad_token": PAD}
    )


def _sample(texts: Iterable[str]) -> list[str]:
    """Documents from all over `texts`, together at most `SAMPLE_CHARACTERS` long (unless one alone is longer).

    Each document draws a number; those that drew less than the share are kept, and the share halves whenever they are too many.
    A corpus of more than about a gigabyte is not read to its end.
    """
    draws = random.Random(0)
    share, size = 1.0, 0
    kept: list[tuple[float, str]] = []
    for text in texts:
        draw = draws.random()
        if draw >= share:
            continue
        kept.append((draw, text[:DOCUMENT_CHARACTERS]))
        size += len(kept[-1][1])
        while size > SAMPLE_CHARACTERS and len(kept) > 1:
            share /= 2
            kept = [item for item in kept if item[0] < share] or kept[:1]
            size = sum(len(sampled) for _, sampled in kept)
        if share < LEAST_SHARE:
            break
    return [text for _, text in kept]


def _config(bos: str | None, eos: str | None) -> dict[str, Any]:
    """What `tokenizer_config.json` says so that transformers takes `tokenizer.json` as it is."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not valid UTF-8 (byte {error.start}): copy or download it again") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each {name, template}
        template = next((entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise UserError(f"the chat template in {folder / 'tokenizer_config.json'} is not text: copy or download it again")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: copy or download it again")
    return content


def _write(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as out:  # the same bytes on every system
        out.write(text)
