"""A corpus tokenized once, into files that are mapped into memory and never read whole."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config import CorpusConfig, UserError
from .cache import build_once
from .progress import Report, show_progress
from .sources import Corpus, Document
from .tokenizer import Tokenizer, train_tokenizer

FORMAT = 2
"""Part of the name of everything kept: raise it when the files, the choice of documents or the training of tokenizers change."""
BATCH_CHARACTERS = 2_000_000
LONG, AT_ONCE = 500_000, 4
"""Characters of a text that is encoded in pieces, and pieces that are encoded at once."""


@dataclass(frozen=True)
class TokenShards:
    """The documents of one split, one after the other, each as BOS, its text, EOS.

    `tokens` uint16 or uint32 [num_tokens]; `documents` int64 [num_documents + 1], where each begins, and the end of the last;
    `document_bytes` int64 [num_documents], the length of each text in UTF-8, for bits per byte. All are mapped from disk.
    """

    tokens: NDArray[Any]
    documents: NDArray[np.int64]
    document_bytes: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_bytes)

    @property
    def num_bytes(self) -> int:
        return int(self.document_bytes.sum())

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document, with its BOS and EOS."""
        return self.tokens[self.documents[index] : self.documents[index + 1]]


@dataclass(frozen=True)
class PreparedData:
    """What batches are made of. `fingerprint` is equal for equal tokenizer, documents and split, wherever the files lie."""

    tokenizer: Tokenizer
    train: TokenShards
    val: TokenShards
    fingerprint: str


def prepare(
    corpus: Corpus, tokenizer: Tokenizer | None, vocab_size: int, corpus_config: CorpusConfig, progress: bool = True
) -> PreparedData:
    """Tokenize `corpus`, or find it tokenized below `corpus_config.cache`; without a `tokenizer`, train one of `vocab_size` first.

    Several processes may call this at once: one does the work, the others wait for it. What is written appears under its name
    only when it is complete. `progress` shows a bar, or lines, on stderr. Raises `UserError` for data that cannot be read or
    is empty, and where the cache cannot be written.
    """
    cache = Path(corpus_config.cache).expanduser()
    try:
        if tokenizer is None:
            folder = cache / "tokenizers" / _name(corpus, str(vocab_size))
            build_once(folder, lambda partial: _train(corpus, vocab_size, progress).save(partial))
            tokenizer = Tokenizer.load(folder)
        trained = tokenizer
        folder = cache / "shards" / _name(corpus, tokenizer.fingerprint)
        build_once(folder, lambda partial: _tokenize(corpus, trained, partial, progress))
        return _load(folder, tokenizer)
    except OSError as error:
        raise UserError(f"cannot keep tokenized data in {cache}: {error}: set corpus.cache to a folder with room") from error


def _name(corpus: Corpus, key: str) -> str:
    return f"{corpus.name}-{hashlib.sha256(f'{FORMAT} {corpus.fingerprint} {key}'.encode()).hexdigest()[:16]}"


def _train(corpus: Corpus, vocab_size: int, progress: bool) -> Tokenizer:
    start = time.perf_counter()
    with show_progress(f"training a tokenizer on {corpus.name}", progress) as report:
        tokenizer = train_tokenizer(_reported(corpus, report), vocab_size)
    if progress:
        print(f"trained a tokenizer of {tokenizer.vocab_size} tokens in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return tokenizer


def _reported(corpus: Corpus, report: Report) -> Iterator[str]:
    characters = 0
    for document in corpus.documents("train"):
        if not document.held_out:
            characters += len(document.text)
            report(document.progress, f"{characters / 1e6:.1f} MB read")
            yield document.text


def _tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: bool) -> None:
    """Write both splits and `meta.json` into `folder`, in one pass over the corpus."""
    start = time.perf_counter()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with (
        _Writer(folder, "train", tokenizer, dtype) as train,
        _Writer(folder, "val", tokenizer, dtype) as val,
        show_progress(f"tokenizing {corpus.name}", progress) as report,
    ):
        for documents in _batches(corpus.documents()):
            whole = iter(tokenizer.encode_batch([document.text for document in documents if len(document.text) <= LONG]))
            for document in documents:
                ids = next(whole) if len(document.text) <= LONG else _encode_long(tokenizer, document.text)
                (val if document.held_out else train).add(ids, len(document.text.encode()))
            tokens, size = train.num_tokens + val.num_tokens, train.num_bytes + val.num_bytes
            report(documents[-1].progress, f"{size / 1e6:.1f} MB, {tokens / 1e6:.2f}M tokens")
    for writer, purpose in ((train, "training"), (val, "validation")):
        if not writer.num_tokens:
            raise UserError(f"{corpus.name} holds no text for {purpose}: give other data")
    fingerprint = hashlib.sha256(f"{tokenizer.fingerprint} {train.digest} {val.digest}".encode()).hexdigest()[:16]
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype.name, "fingerprint": fingerprint}) + "\n")
    if progress:
        print(
            f"tokenized {corpus.name}: {size / 1e6:.1f} MB, {train.num_tokens / 1e6:.2f}M tokens for training and "
            f"{val.num_tokens / 1e6:.2f}M for validation, {size / tokens:.2f} bytes per token, in {time.perf_counter() - start:.1f} s",
            file=sys.stderr,
        )


def _encode_long(tokenizer: Tokenizer, text: str) -> array[int]:
    """The tokens of a long text, which would take 140 bytes for each of its own at once. Cut where tokenizers cut: before a space."""
    ids = array("I")
    pieces, start = [], 0
    while start < len(text):
        end = _cut(text, start)
        pieces.append(text[start:end])
        start = end
        if len(pieces) == AT_ONCE or start >= len(text):
            for encoded in tokenizer.encode_batch(pieces):
                ids.extend(encoded)
            pieces = []
    return ids


def _cut(text: str, start: int) -> int:
    """The end of a piece: the last single space between words, if there is one in its second half."""
    end = at = start + LONG
    if end >= len(text):
        return len(text)
    while (at := text.rfind(" ", start + LONG // 2, at)) > 0:
        if not text[at - 1].isspace() and text[at + 1].isalnum():
            return at
    return end


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents long enough to keep all cores busy."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends the documents of one split to its files."""

    def __init__(self, folder: Path, split: Literal["train", "val"], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self.num_tokens = 0
        self.num_bytes = 0
        self._path = folder / split
        self._head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._tail = [tokenizer.eos_id]
        self._dtype = dtype
        self._documents = array("q", [0])
        self._document_bytes = array("q")
        self._hash = hashlib.sha256()

    def __enter__(self) -> _Writer:
        self._tokens = self._path.with_suffix(".tokens").open("wb")
        return self

    def add(self, ids: Sequence[int], num_bytes: int) -> None:
        data = np.concatenate([np.asarray(part, dtype=self._dtype) for part in (self._head, ids, self._tail)])
        self._tokens.write(data.tobytes())
        self._hash.update(data.tobytes())
        self.num_tokens += len(data)
        self.num_bytes += num_bytes
        self._documents.append(self.num_tokens)
        self._document_bytes.append(num_bytes)

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        np.save(self._path.with_suffix(".documents.npy"), np.array(self._documents, dtype=np.int64))
        np.save(self._path.with_suffix(".bytes.npy"), np.array(self._document_bytes, dtype=np.int64))
        self._hash.update(self._documents)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _load(folder: Path, tokenizer: Tokenizer) -> PreparedData:
    def load(split: str, dtype: str) -> TokenShards:
        documents = np.load(folder / f"{split}.documents.npy", mmap_mode="r")
        document_bytes = np.load(folder / f"{split}.bytes.npy", mmap_mode="r")
        tokens = np.memmap(folder / f"{split}.tokens", dtype=dtype, mode="r", shape=(int(documents[-1]),))
        return TokenShards(tokens, documents, document_bytes)

    try:
        meta = json.loads((folder / "meta.json").read_text())
        return PreparedData(tokenizer, load("train", meta["dtype"]), load("val", meta["dtype"]), meta["fingerprint"])
    except (ValueError, EOFError, FileNotFoundError, KeyError, TypeError) as error:
        raise UserError(f"the tokenized data in {folder} is damaged ({error}): delete that folder and start again") from error
