"""Tokenizers of other kinds than the one Shoal trains, as other people's models have them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from shoal.data import Tokenizer

TEXT = [
    "the red fish swims over the blue reef",
    "yes my lord [user] [assistant] <|user|>",
    "a king and his queen, it's 2024",
    "</s> <s> <unk>",
] * 20
CONTROLS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("prepend", "metaspace", "unigram", "wordpiece")


@cache
def foreign(kind: str, **changes: Any) -> Tokenizer:
    """Of Llama 2's kind (`prepend`: a space before every text, and behind every control token; `metaspace`: before the first text alone),
    of T5's (`unigram`) or of BERT's (`wordpiece`). `changes`: to the content of `tokenizer.json`, as JSON."""
    sentencepiece = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    given: dict[str, Any] = {"special_tokens": CONTROLS + BYTES, "show_progress": False}
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=360, **given)
    else:
        backend = tokenizers.Tokenizer(
            models.Unigram() if kind == "unigram" else models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
        )
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = sentencepiece
        trainer = (trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer)(
            vocab_size=360, **given, **({"unk_token": "<unk>"} if kind == "unigram" else {})
        )
    backend.train_from_iterator(TEXT, trainer)
    if kind == "prepend":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in CONTROLS]
    if kind == "unigram":
        content["model"]["byte_fallback"] = True
    content |= {name: json.loads(change) for name, change in changes.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(json.dumps(content), config | {"clean_up_tokenization_spaces": False})
