"""Which documents a run reads, and which of them it holds out for validation."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

from ..config import CorpusConfig, UserError
from . import readers

HELD_OUT_CHARACTERS = 262144
"""Validation text that a small corpus gives up, though no more than about a tenth of it, even where `val_fraction` asks for less."""
STDLIB_HELD_OUT = 0.05
SAMPLED = 65536
"""Bytes at the beginning, in the middle and at the end of a file that tell it from others of its name, size and time."""
# Tests would be a third of the library; the others are tables that programs wrote (code pages, documentation, build flags).
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}

ROW_SUFFIXES = {".jsonl", ".ndjson", ".parquet"}
SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "test"}
SPLIT_SUFFIXES = {*ROW_SUFFIXES, ".json", ".txt"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".sh"}

Split = Literal["train", "val", "shared", "end"]
"""Where documents go. `shared`: some of them are held out for validation; `end`: the last of them are."""


class Document(NamedTuple):
    """One text of a corpus. `progress` is the share of the corpus on disk that has been read by now, 0 where that is unknown."""

    text: str
    held_out: bool
    progress: float


@dataclass(frozen=True)
class Source:
    """One file, or one split of a dataset. `version` changes when the content does; `size` is in bytes on disk."""

    name: str
    version: str
    size: int
    split: Split
    read: Callable[[], Iterator[readers.Document]]


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation, read anew, in the same order, each time they are asked for.

    Where sources are `shared`, those documents are held out whose hash is lowest, so that the choice does not depend on
    their order and equal documents stay together. They are a share of `val_fraction`, of a small corpus more
    (`HELD_OUT_CHARACTERS`), without documents that are too much of it; so is the `end` of a text file.
    """

    name: str
    sources: tuple[Source, ...]
    column: str
    val_fraction: float
    left_out: tuple[str, ...] = ()
    """Files of the folders, and of those given one by one, that are not read."""

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal names, sizes, times of change and samples of all files, names of datasets, and settings that matter."""
        settings = (self.column, self.val_fraction if any(source.split in ("shared", "end") for source in self.sources) else None)
        versions = [(source.name, source.version, source.split) for source in self.sources]
        return hashlib.sha256(repr((settings, versions)).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line: what is read, where the validation text comes from, and what is left out."""
        notes: dict[Split, str] = {
            "train": "for training",
            "val": "for validation",
            "shared": "with some documents held out for validation",
            "end": "with its end held out for validation",
        }
        names = {split: [source.name for source in self.sources if source.split == split] for split in notes}
        parts = [f"{_first_of(names[split])} {note}" for split, note in notes.items() if names[split]]
        if self.left_out:
            parts.append(f"left out: {_first_of(self.left_out)}")
        return f"{self.name}: {'; '.join(parts)}"

    def train_documents(self) -> Iterator[str]:
        return (document.text for document in self.documents("train") if not document.held_out)

    def val_documents(self) -> Iterator[str]:
        return (document.text for document in self.documents("val") if document.held_out)

    def documents(self, split: Literal["train", "val"] | None = None) -> Iterator[Document]:
        """Every document that is not blank, in one pass; with `split`, only of the sources that hold some of that split.

        Raises `UserError` for anything that cannot be read, and where nothing can be held out.
        """
        sources = [source for source in self.sources if split in (None, source.split) or source.split in ("shared", "end")]
        total = sum(source.size for source in sources) or 1
        before = 0
        for source in sources:
            for index, (text, position) in enumerate(_not_blank(source)):
                yield Document(text, self._is_held_out(source, index, text), (before + position) / total)
            before += source.size

    def texts_to_score(self) -> Iterator[str]:
        """What `shoal eval` reads: the `val` sources where there are any, otherwise every document of every source."""
        marked = [source for source in self.sources if source.split == "val"]
        for source in marked or self.sources:
            for text, _ in _not_blank(source):
                yield text

    def _is_held_out(self, source: Source, index: int, text: str) -> bool:
        if source.split == "shared":
            return self._is_chosen(_digest(text))
        if source.split == "end":
            return index >= self._ends[source]
        return source.split == "val"

    @cached_property
    def _ends(self) -> dict[Source, int]:
        """Of each source with split `end`, the index of the first document that is held out."""
        ends = {}
        for source in self.sources:
            if source.split != "end":
                continue
            sizes = [len(text) for text, _ in _not_blank(source)]
            if len(sizes) < 2:
                raise UserError(f"{source.name} is too short to hold part of it out: give more text, or train and val files")
            wanted, held, index = self._held_out_characters(sum(sizes)), 0, len(sizes)
            while held < wanted and index > 1:
                index -= 1
                held += sizes[index]
            ends[source] = index
        return ends

    @cached_property
    def _is_chosen(self) -> Callable[[int], bool]:
        """Whether the documents of `shared` sources that have this digest are held out.

        Reads only until the share that was asked for has given enough; a corpus that ends before is small enough to count out.
        """
        share = int(self.val_fraction * 2**64)
        sizes: dict[int, int] = {}
        held = 0
        for source in self.sources:
            for text, _ in _not_blank(source) if source.split == "shared" else ():
                digest = _digest(text)
                sizes[digest] = sizes.get(digest, 0) + len(text)
                held += len(text) if digest < share else 0
                if held >= HELD_OUT_CHARACTERS:
                    return lambda digest: digest < share
        if len(sizes) == 1:
            raise UserError(f"{self.name} holds only one document, so none can be held out: give more, or train and val files")
        total = sum(sizes.values())
        wanted, held = self._held_out_characters(total), 0
        most = 2 * max(self.val_fraction, 0.1) * total  # a document may be most of the corpus
        chosen: set[int] = set()
        for digest in sorted(sizes):
            if held < wanted and held + sizes[digest] <= most and len(chosen) < len(sizes) - 1:
                chosen.add(digest)
                held += sizes[digest]
        return (chosen or {min(sizes, key=lambda digest: (sizes[digest], digest))}).__contains__

    def _held_out_characters(self, total: int) -> float:
        return max(self.val_fraction * total, min(HELD_OUT_CHARACTERS, total / 10))


def open_corpus(data: tuple[str, ...], config: CorpusConfig) -> Corpus:
    """Find what `data` names: files, folders and `hf:NAME[:CONFIG]` datasets, or for () the Python standard library's source.

    A folder, or the files given one by one taken together, that hold both `train` (or `training`) and `val` (or `valid`, `validation`;
    else `test`), which is a folder or the first word of a file's name, use those and nothing else. A folder with Parquet or JSON Lines
    files uses only them, else its text files. Text is cut into documents, the finer the less there is of it. Reads no content yet.
    Raises `UserError` for what is missing, empty or a pipe.
    """
    if not data:
        return _standard_library(config)
    paths = [readers.existing(item) for item in data if not item.startswith("hf:")]
    files = [path for path in paths if not path.is_dir()]
    for path in files:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty: give a file with text")
    given = {path: path.name for path in files}
    groups = [(given, given)]
    for folder in filter(Path.is_dir, paths):
        found = _files_below(folder)
        groups.append((found, _data_files(folder, found)))
    sources: list[Source] = []
    left_out: list[str] = []
    for found, together in groups:
        chosen = file_sources(together, config)
        sources += chosen
        names = {source.name for source in chosen}
        left_out += [name for name in found.values() if name not in names]
    for item in data:
        if item.startswith("hf:"):
            sources += _dataset_sources(item, config)
    name = _name_of(data[0]) + (f"+{len(data) - 1}" if len(data) > 1 else "")
    return Corpus(name, tuple(sources), config.text_column, config.val_fraction, tuple(left_out))


def _standard_library(config: CorpusConfig) -> Corpus:
    """The library's modules as this Python installed them; which are held out depends on their names alone."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_LEFT_OUT)
        for file in sorted(Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")):
            name = file.relative_to(root).as_posix()
            share = max(STDLIB_HELD_OUT, config.val_fraction)
            split: Split = "val" if _digest(name) < share * 2**64 else "train"
            sources.append(_file_source(file, name, split, partial(_read_module, file)))
    if not sources:
        raise UserError(f"this Python has no source of its standard library in {root}: name a file or folder with --data")
    return Corpus("python-stdlib", tuple(sources), config.text_column, config.val_fraction)


def _read_module(file: Path) -> Iterator[readers.Document]:
    with tokenize.open(file) as source:  # minds the encoding that the module declares
        yield source.read(), file.stat().st_size


def _files_below(folder: Path) -> dict[Path, str]:
    """The files of a folder that are neither empty nor hidden, each with its name below it."""
    files: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(place)) in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add(real)
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return {file: file.relative_to(folder).as_posix() for file in sorted(files) if file.is_file() and file.stat().st_size}


def _data_files(folder: Path, found: dict[Path, str]) -> dict[Path, str]:
    """Those of the files found in a folder that are data: rows if there are any, else text."""
    for suffixes in (ROW_SUFFIXES, TEXT_SUFFIXES):
        data = {file: name for file, name in found.items() if readers.data_suffix(file) in suffixes}
        if data:
            return data
    raise UserError(f"{folder} holds no text, JSON Lines or Parquet file that is not empty: give another folder")


def file_sources(files: dict[Path, str], config: CorpusConfig) -> list[Source]:
    """Sources of files that belong together; the values are their names below the folder that holds them."""
    labels = {file: _label(name) for file, name in files.items()}
    val = "val" if "val" in labels.values() else "test"
    splits: dict[Path, Split]
    if {"train", val} <= set(labels.values()):
        splits = {file: "train" for file in files if labels[file] == "train"}
        splits |= {file: "val" for file in files if labels[file] == val}
    elif len(files) == 1 and _is_text(next(iter(files))):
        splits = dict.fromkeys(files, "end")
    else:
        splits = dict.fromkeys(files, "shared")
    size = sum(file.stat().st_size for file, split in splits.items() if split != "val")
    fine = max(1024, min(readers.LONGEST_PIECE, size // 64))  # a little text is to be more than one or two documents
    sources = []
    for file, split in splits.items():
        piece = readers.LONGEST_PIECE if split == "val" else fine
        sources.append(_file_source(file, files[file], split, partial(readers.read_file, file, config.text_column, piece)))
    return sources


def _file_source(file: Path, name: str, split: Split, read: Callable[[], Iterator[readers.Document]]) -> Source:
    status = file.stat()
    return Source(name, f"{status.st_size}:{status.st_mtime_ns}:{_sampled(file, status.st_size):08x}", status.st_size, split, read)


def _sampled(file: Path, size: int) -> int:
    """A checksum of parts of a file: out of an archive, files of other content may have the same name, size and time."""
    checksum = 0
    with file.open("rb") as content:
        for place in (0, size // 2, size - SAMPLED):
            content.seek(max(place, 0))
            checksum = zlib.crc32(content.read(SAMPLED), checksum)
    return checksum


def _label(name: str) -> str | None:
    """`train`, `val` or `test`, by a folder of that name or a data file whose name begins with that word: `trains.txt` is about trains.

    Only data files: `train.py` and `test_model.py` are a program and not a split.
    """
    *words, file = Path(name.lower()).parts
    if readers.data_suffix(Path(file)) in SPLIT_SUFFIXES:
        words += re.findall(r"^[^\W\d_]+", file)
    return next((label for word in words if word in SPLIT_WORDS for label in ("train", "val", "test") if word.startswith(label)), None)


def _dataset_sources(item: str, config: CorpusConfig) -> list[Source]:
    name, _, subset = item.removeprefix("hf:").partition(":")
    splits = readers.dataset_splits(name, subset or None)
    train = "train" if "train" in splits else splits[0]
    val = next((split for split in ("validation", "valid", "val", "dev", "test") if split in splits and split != train), None)
    chosen: list[tuple[str, Split]] = [(train, "train"), (val, "val")] if val else [(train, "shared")]
    return [
        Source(f"{item} {split}", "", 0, kind, partial(readers.read_dataset, name, subset or None, split, config.text_column))
        for split, kind in chosen
    ]


def _name_of(item: str) -> str:
    """A short name: of a folder or dataset its own, of a file its stem, unless that says too little."""
    if item.startswith("hf:"):
        name = item.removeprefix("hf:").partition(":")[0].rpartition("/")[2]
    else:
        path = Path(item).expanduser().resolve()
        name = path.name if path.is_dir() else path.name.partition(".")[0]
        if not path.is_dir() and name.lower() in ("input", "data", "text", "corpus", "train", "val", "test"):
            name = path.parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _not_blank(source: Source) -> Iterator[readers.Document]:
    return ((text, position) for text, position in source.read() if text and not text.isspace())


def _is_text(file: Path) -> bool:
    return readers.data_suffix(file) not in {*ROW_SUFFIXES, *readers.JSON_SUFFIXES}


def _digest(text: str) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
