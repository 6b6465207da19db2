"""The tokenizer of a GGUF file: a byte-level BPE from `tokenizer.json`, so that llama.cpp reads the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from ..config import UserError


class TokenizerFiles(Protocol):
    """What is needed of a tokenizer: the text of `tokenizer.json`, the content of `tokenizer_config.json`, the chat template, others by
    name, and whether a prompt gets a begin-of-text token."""

    json: str
    config: dict[str, Any]
    chat_template: str | None
    named_templates: Mapping[str, str]

    @property
    def adds_bos(self) -> bool: ...


# llama.cpp knows how text falls into words by name only. A rule is the regular expressions of the pre-tokenizer, one after the other.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELT_OUT = (r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])", r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_RULES: dict[tuple[str, ...], str] = {
    (_CONTRACTIONS + _WORDS % "",): "qwen2",
    (_CONTRACTIONS + _WORDS % "{1,3}",): "llama-bpe",
    _DEEPSEEK_V3: "deepseek-v3",
}
_HARMLESS_NORMALIZERS = ("NFC",)
"""llama.cpp leaves this out as well when it converts a model: composed text is what one meets."""


def add_tokenizer(writer: Any, tokenizer: TokenizerFiles, vocab_size: int, chat_template: str | None) -> None:
    """Put the tokenizer into a `gguf.GGUFWriter`; ids up to `vocab_size` that it lacks become unused tokens.

    `chat_template`, if any, is written where the tokenizer brings none. Raises `UserError` for a tokenizer that llama.cpp would read
    differently.
    """
    import gguf

    content = json.loads(tokenizer.json)
    rule = pre_tokenizer_name(content)
    model = content["model"]
    texts: list[str] = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds: list[int] = [gguf.TokenType.UNUSED] * vocab_size
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    for text, i in [*model["vocab"].items(), *((token["content"], i) for i, token in added.items())]:
        if i >= vocab_size:
            raise UserError(f"the tokenizer has the token {text!r} with id {i}, but the model knows only {vocab_size} tokens")
        texts[i], kinds[i] = text, gguf.TokenType.NORMAL
    for i, token in added.items():
        if any(token.get(rule) for rule in ("lstrip", "rstrip", "single_word")):
            raise UserError(f"the tokenizer's token {token['content']!r} depends on what stands beside it: llama.cpp would read other ids")
        control = token["special"] or (token["content"][:2], token["content"][-2:]) in (("<｜", "｜>"), ("<|", "|>"))
        kinds[i] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    bos, eos, pad = (_id_of(tokenizer.config.get(f"{kind}_token"), texts) for kind in ("bos", "eos", "pad"))
    for i, add in ((bos, writer.add_bos_token_id), (eos, writer.add_eos_token_id), (pad, writer.add_pad_token_id)):
        if i is not None:
            add(i)
    writer.add_add_bos_token(tokenizer.adds_bos)
    template = tokenizer.chat_template if tokenizer.chat_template is not None else chat_template
    named = {"default": template, **tokenizer.named_templates}
    if template is not None:
        writer.add_chat_template([{"name": name, "template": text} for name, text in named.items()])


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """llama.cpp's name of the word rule in a `tokenizer.json`; `UserError` where it has none."""
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    if model.get("type") != "BPE":
        raise UserError(f"the tokenizer is a {model.get('type')} model: only byte-level BPE can be written to GGUF")
    for normalizer in _parts(content.get("normalizer"), "normalizers"):
        if normalizer["type"] not in _HARMLESS_NORMALIZERS:
            raise UserError(f"the tokenizer's normalizer {normalizer['type']} is not one that llama.cpp applies")
    steps = _parts(splitter, "pretokenizers")
    splits, last = steps[:-1], steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or not all(_is_split(step, len(splits)) for step in splits):
        raise UserError("the tokenizer's word rule is not splits followed by bytes: llama.cpp would read other ids")
    patterns = tuple(_regex(step) for step in splits)
    gpt2_words = last.get("use_regex", True)
    if gpt2_words and not patterns:
        return "gpt-2"
    if gpt2_words:
        raise UserError("the tokenizer splits words a second time, by GPT-2's rule: llama.cpp would read other ids")
    if patterns not in _RULES:
        raise UserError(f"llama.cpp has no name for the tokenizer's word rule {'; '.join(patterns)[:80]}: it would read other ids")
    return _RULES[patterns]


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _is_split(step: dict[str, Any], count: int) -> bool:
    """Whether words are what a pattern matches and what lies between, as in llama.cpp; `count`: of splits in all."""
    if step["type"] != "Split":
        return False
    # A rule of a single pattern leaves nothing between, which can then be removed as well.
    return step.get("behavior") == "Isolated" or (step.get("behavior"), step.get("invert"), count) == ("Removed", True, 1)


def _regex(step: dict[str, Any]) -> str:
    """The pattern of a split in one spelling: escapes instead of raw line ends, contractions without upper case."""
    pattern = step["pattern"].get("Regex", step["pattern"].get("String", ""))
    pattern = pattern.replace("\r", "\\r").replace("\n", "\\n")
    for spelling in _SPELT_OUT:
        pattern = pattern.replace(spelling, _CONTRACTIONS)
    return pattern


def _id_of(token: Any, texts: list[str]) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return texts.index(text) if text in texts else None
