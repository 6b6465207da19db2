"""Text to token ids and back: a byte-level BPE in the files that transformers, vLLM and llama.cpp open."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
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
UNKNOWN = "\U0010ffff"
"""A character that no vocabulary holds."""

SAMPLE_CHARACTERS = 16_000_000
DOCUMENT_CHARACTERS = 100_000
LEAST_SHARE = 1 / 64

DEFAULT, NAMED_TEMPLATES = "default", "additional_chat_templates"
"""What transformers calls the chat template without a name, and the folder of those that have one."""

# Names under which a lone `tokenizer.json` may hold these tokens when no `tokenizer_config.json` says so.
KNOWN_BOS = (BOS, "<|begin_of_text|>", "<s>")
KNOWN_EOS = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>")


class Tokenizer:
    """A `tokenizer.json` with the settings that stand beside it.

    `json` is the text of `tokenizer.json`, `config` the content of `tokenizer_config.json`, `chat_template` the Jinja
    source that turns a conversation into text, None for a base model, and `named_templates` others for which some models have one
    (`tool_use`, `rag`). Safe to use from several threads.
    """

    def __init__(
        self, json: str, config: dict[str, Any], chat_template: str | None = None, named_templates: Mapping[str, str] | None = None
    ) -> None:
        self.json = json
        self.config = config
        self.chat_template = chat_template
        self.named_templates = named_templates or {}

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
        except BaseException as error:  # tokenizers raises plain Exception, or PanicException, which is none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{file} is not a tokenizer.json that can be read: {reason}") from error
        if backend.truncation or backend.padding:  # left there by whoever used it last: transformers, too, forgets them
            text = json.dumps(json.loads(text) | {"truncation": None, "padding": None}, indent=2, ensure_ascii=False) + "\n"
        config = _read_json(file.parent / "tokenizer_config.json")
        if not config:
            known = [next((name for name in names if backend.token_to_id(name) is not None), None) for names in (KNOWN_BOS, KNOWN_EOS)]
            config = _config(*known)
        if "added_tokens_decoder" not in config:  # older folders name their tokens in a file of its own
            config |= _special_texts(_read_json(file.parent / "special_tokens_map.json"))
        templates = _chat_templates(file.parent, config)
        return cls(text, config, templates.pop(DEFAULT, None), templates)

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and the chat templates: `chat_template.jinja`, and those with names in a folder.

        `model_max_length` is the number of tokens a model with this tokenizer can read, for programs that cut their input.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(self.config)
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        config.pop("chat_template", None)
        if self.chat_template is not None:
            _write(folder / "chat_template.jinja", self.chat_template)
        for name, template in self.named_templates.items():
            (folder / NAMED_TEMPLATES).mkdir(exist_ok=True)
            _write(folder / NAMED_TEMPLATES / f"{name}.jinja", template)
        _write(folder / "tokenizer.json", self.json)
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def template(self, tools: bool) -> str | None:
        """The chat template of a conversation with or without tools, as transformers chooses it; None for a base model."""
        return self.named_templates.get("tool_use", self.chat_template) if tools else self.chat_template

    @cached_property
    def special_texts(self) -> dict[str, str]:
        """`bos_token`, `pad_token` and what else of this kind the files name -> its text."""
        return _special_texts(self.config)

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

    def encode(self, text: str, bos: bool = False, special: bool = False, behind: Sequence[int] = ()) -> list[int]:
        """Token ids of `text`, with the begin-of-text token in front if `bos` and the tokenizer `adds_bos`.

        That is the rule for a prompt. A whole document (in training, or where its likelihood is measured) begins with `bos_id` wherever
        there is one, since something must stand before its first token: so does lm-evaluation-harness.

        With `special`, strings like `<｜User｜>` in the text become their special tokens (for chat templates); without, they
        are ordinary text, so that a document or a user cannot forge one. Raises `UserError` for text that is not Unicode.

        `behind` are the tokens that the text continues: where it does not begin there, it gets no space before its first word, which
        SentencePiece's tokenizers put before a text.
        """
        backend, bare = self._with_special if special else self._plain, self._bare_behind(behind)
        wants_spans = bare is not None or bool(self._spellings)
        # A batch, because that leaves the interpreter to other threads meanwhile; the fast one knows no spans.
        encode = backend.encode_batch if wants_spans else backend.encode_batch_fast
        try:
            [encoding] = encode([text], add_special_tokens=False)
        except TypeError as error:  # a lone surrogate, which UTF-8 cannot hold
            raise UserError("the text is not valid Unicode: it holds half of a surrogate pair") from error
        ids = encoding.ids
        if wants_spans:
            spans = encoding.offsets
            if bare is not None:  # up to the first added token
                first = next((i for i, token in enumerate(ids) if token in self._dividers), len(ids))
                begun = bare.encode(text[: spans[first][0]] if first < len(ids) else text, add_special_tokens=False)
                ids, spans = begun.ids + ids[first:], begun.offsets + spans[first:]
            ids = self._spelt_out(ids, [text[begin:end] for begin, end in spans] if special else None)
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else ids

    @property
    def first_id(self) -> int:
        """The token that documents begin with: begin-of-text, or where there is none the end of the document before."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def document(self, text: str) -> list[int]:
        """The tokens of a whole document, as models learn it: `first_id`, the text, end-of-text."""
        return [self.first_id, *self.encode(text), self.eos_id]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text without any special token, on all cores."""
        return [self._spelt_out(encoding.ids) for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def begins_text(self, behind: Sequence[int]) -> bool:
        """Whether what stands behind these tokens is read as the beginning of a text: behind none, or behind an added one."""
        return not behind or behind[-1] in self._dividers

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
    def _unknown(self) -> frozenset[int]:
        """The tokens of a character that the vocabulary lacks."""
        try:
            return frozenset(token.id for token in self._plain.model.tokenize(UNKNOWN))
        except Exception:  # tokenizers' own, from a model that has no token for it
            return frozenset()

    @cached_property
    def _dividers(self) -> frozenset[int]:
        """The tokens before and behind which text is read by itself: those added to the model's, but for what is a part of text."""
        return self._added - self._unknown

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
        return _plain_backend(json.loads(self.json))

    @cached_property
    def _bare(self) -> tokenizers.Tokenizer | None:
        """`_plain`, but it puts no space before a text; None where that one does not either."""
        content, bare = json.loads(self.json), json.loads(self.json, object_hook=_without_first_space)
        steps = ("normalizer", "pre_tokenizer")
        return _plain_backend(bare) if [content.get(step) for step in steps] != [bare.get(step) for step in steps] else None

    @cached_property
    def _spaces_everywhere(self) -> bool:
        """Whether the space before a text is put behind every added token as well, and not at the very beginning alone."""
        return '"first"' not in json.dumps(json.loads(self.json).get("pre_tokenizer"))

    def _bare_behind(self, ids: Sequence[int]) -> tokenizers.Tokenizer | None:
        """The backend for text that goes on behind `ids` without the space that a text would begin with; None where it gets that."""
        return None if not ids or (self._spaces_everywhere and self.begins_text(ids)) else self._bare

    def _spelt_out(self, ids: list[int], sources: Sequence[str] | None = None) -> list[int]:
        """`ids`, in which a control token is spelt out unless it comes of its own text. `sources`: what text each comes of; without,
        there is to be no control token."""
        if not self._spellings:
            return ids
        written: list[int] = []
        for i, token in enumerate(ids):
            # A normalizer may turn other characters into the text of a control token: that one is forged as well.
            is_meant = sources is not None and sources[i].strip() in self.control_texts
            written += [token] if is_meant else self._spellings.get(token, [token])
        return written

    @cached_property
    def _spellings(self) -> dict[int, list[int]]:
        """Control tokens that the model itself makes of their text, and the tokens of its characters, one by one.

        The vocabulary of a Unigram model holds control tokens as it holds words; BPE has no merges that lead to them. Tokens that stand for
        what the vocabulary lacks (`<unk>`, bytes) come of such text rightly.
        """
        tokenize, spellings = self._plain.model.tokenize, {}
        for text in self.control_texts:
            ids = [token.id for token in tokenize(text)]
            if len(text) > 1 and ids == [self.token_id(text)] and ids[0] not in self._unknown and not _BYTE.fullmatch(text):
                spellings[ids[0]] = [token.id for character in text for token in tokenize(character)]
        return spellings

    def _special_id(self, key: str) -> int | None:
        text = self.special_texts.get(key)
        return self._with_special.token_to_id(text) if text else None


def _is_control(token: dict[str, Any]) -> bool:
    """Whether an added token is more than text. DeepSeek marks <｜User｜> and the like as not special; added tokens of another form (runs
    of spaces, in GPT-NeoX) are ordinary text."""
    return bool(token["special"]) or (token["content"][:1], token["content"][-1:]) == ("<", ">")


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like -> text. In the files it stands as such, or in an object."""
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain_backend(content: dict[str, Any]) -> tokenizers.Tokenizer:
    """Of the content of a `tokenizer.json`, with the strings of control tokens as ordinary text."""
    for token in content.get("added_tokens", []):
        token["special"] = _is_control(token)
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    return backend


def _without_first_space(step: dict[str, Any]) -> dict[str, Any]:
    """A step of a `tokenizer.json` as it would be if no space were put before a text."""
    changes: dict[str, dict[str, Any]] = {
        "Prepend": {"prepend": ""},
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    return step | changes.get(str(step.get("type")), {})


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


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. Files come before what stands in `tokenizer_config.json`: a text, or a list of several."""
    files = {file.stem: file for file in sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = folder / "chat_template.jinja"
    if files:
        return {name: _read_template(file) for name, file in files.items()}
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    else:
        named = {DEFAULT: given}
    templates = {name: template for name, template in named.items() if isinstance(name, str) and template is not None}
    if not all(isinstance(template, str) and Path(name).name == name for name, template in templates.items()):
        raise UserError(f"the chat template in {folder / 'tokenizer_config.json'} is not text: copy or download it again")
    return templates


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid UTF-8 (byte {error.start}): copy or download it again") from None


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
