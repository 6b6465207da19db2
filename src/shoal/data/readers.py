"""One file, or one split of a Hugging Face dataset, as a stream of documents."""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from ..config import UserError

Document = tuple[str, int]
"""A text, and how many bytes of the file on disk have been read by now (0 for a dataset), to show progress."""

COMPRESSED = (".gz", ".zst")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
LONGEST_PIECE = 65536
PACKED_PIECE = 4096
"""Bytes that are unpacked at once: of logs and the like each becomes thousands."""
COLUMN_OPTIONS = "--corpus.text-column (shoal train) or --text-column (shoal eval, shoal quantize)"


def existing(name: str) -> Path:
    """The file or folder of that name. Raises `UserError` where there is none, and for a pipe, whose content is gone once it is read."""
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path given as data")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, but data is read more than once: put it into a file")
    return path


def data_suffix(path: Path) -> str:
    """The suffix that tells the format: `.jsonl` for `a.jsonl.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def read_file(path: Path, column: str, piece: int = LONGEST_PIECE) -> Iterator[Document]:
    """The documents of one file: its rows (Parquet, JSON Lines; the text is in `column`), or its text in pieces.

    Text is cut at the first empty line after `piece` characters, or else after the line that makes it twice as long (no line counts
    as longer than that, or than 64 KiB); the pieces together are the file, with its line ends as they are. Raises `UserError`, naming
    file and place, for what cannot be read.
    """
    suffix = data_suffix(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, column)
        elif suffix in JSON_SUFFIXES:
            yield from _read_json_lines(path, column)
        else:
            yield from _read_text(path, piece)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_dataset(name: str, config: str | None, split: str, column: str) -> Iterator[Document]:
    """The rows of a Hugging Face dataset, streamed: nothing is stored but what the caller keeps."""
    datasets = import_optional("datasets", f"read hf:{name}")
    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
        for number, row in enumerate(rows, 1):
            text = _text_of(row, column, f"hf:{name}, {split} row {number}")
            if text:
                yield text, 0
    except UserError:
        raise
    except Exception as error:  # network, login, format: whatever the library raises
        raise UserError(f"cannot read hf:{name}: {_first_line(error)}") from error


def dataset_splits(name: str, config: str | None) -> list[str]:
    """Names of the splits of a Hugging Face dataset."""
    datasets = import_optional("datasets", f"read hf:{name}")
    try:
        return list(datasets.get_dataset_split_names(name, config))
    except Exception as error:  # as above
        raise UserError(f"cannot open hf:{name}: {_first_line(error)}") from error


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import a module of the `data` extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"to {purpose}, the package {package} is needed: pip install {package}") from error


def _read_text(path: Path, piece: int) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines: list[str] = []
    size = offset = 0
    number = 1
    with _open(path) as (raw, content):
        while True:
            line = content.readline(min(LONGEST_PIECE, 2 * piece))  # bounded: a file may be one endless line
            try:
                text = decoder.decode(line, final=not line)
            except UnicodeDecodeError as error:
                place = offset + len(line) - len(error.object) + error.start
                raise _not_utf8(path, number, place) from error
            if not line:
                break
            lines.append(text if offset else text.removeprefix("\ufeff"))
            size += len(text)
            offset += len(line)
            number += line.endswith(b"\n")
            if (size >= piece and not text.strip()) or size >= 2 * piece:
                yield "".join(lines), raw.tell()
                lines, size = [], 0
    if size:
        yield "".join(lines), path.stat().st_size


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON Lines or Parquet file, each with its place for messages. Raises `UserError` for what cannot be read."""
    suffix = data_suffix(path)
    if suffix not in (*JSON_SUFFIXES, ".parquet"):
        raise UserError(f"{path} is neither JSON Lines nor Parquet: name it .jsonl or .parquet, or convert it")
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
        else:
            for place, row, _ in _json_rows(path):
                yield place, row
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _read_json_lines(path: Path, column: str) -> Iterator[Document]:
    for place, row, read in _json_rows(path):
        text = _text_of(row, column, place)
        if text:
            yield text, read


def _json_rows(path: Path) -> Iterator[tuple[str, Any, int]]:
    """Place, value and bytes read by then of every line that is not empty."""
    offset = 0
    with _open(path) as (raw, content):
        for number, line in enumerate(content, 1):
            place = f"{path}:{number}"
            try:
                row = line.decode() if offset else line.decode().removeprefix("\ufeff")
                value = json.loads(row) if row.strip() else None
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, offset + error.start) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON ({error}): one JSON object per line is expected") from error
            offset += len(line)
            if row.strip():
                yield place, value, raw.tell()


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    arrow = import_optional("pyarrow", f"read {path}")
    parquet = import_optional("pyarrow.parquet", f"read {path}")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: _without_nulls(value) for name, value in row.items()}
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} after row {number}: {_first_line(error)}") from error


def _without_nulls(value: Any) -> Any:
    """A value without the fields that Parquet gives it because other rows have them."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    arrow = import_optional("pyarrow", f"read {path}")
    parquet = import_optional("pyarrow.parquet", f"read {path}")
    size, row = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _missing_column(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    text = _text_of({column: value}, column, f"{path}, row {row}")
                    if text:
                        yield text, size * row // file.metadata.num_rows
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} after row {row}: {_first_line(error)}") from error


def _text_of(row: Any, column: str, place: str) -> str:
    """The text of one row; "" where it is null."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is not an object with named fields: one like {{{json.dumps(column)}: ...}} is expected")
    if column not in row:
        raise _missing_column(place, column, list(row))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place}: {column!r} is not text but {type(text).__name__}: choose another by {COLUMN_OPTIONS}")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the text is not valid Unicode, it holds half of a surrogate pair: mend it or leave it out") from error
    return text or ""


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file on disk, and its content without compression."""
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw) as content:
                yield raw, content  # type: ignore[misc]
        elif path.suffix.lower() == ".zst":
            zstandard = import_optional("zstandard", f"read {path}")
            try:
                yield raw, io.BufferedReader(_ZstdFrames(raw, zstandard), 1 << 20)
            except zstandard.ZstdError as error:
                raise UserError(f"cannot read {path}: {error}") from error
        else:
            yield raw, raw


class _ZstdFrames(io.RawIOBase):
    """The content of a file of Zstandard frames. The package's own reader takes a file that was cut short for a whole one."""

    def __init__(self, raw: BinaryIO, zstandard: ModuleType) -> None:
        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame and self._frame.eof else b""
            packed = packed or self._raw.read(PACKED_PIECE)
            if not packed:
                if self._frame and not self._frame.eof:
                    raise EOFError("it ends before its last Zstandard frame does")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(packed))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _not_utf8(path: Path, line: int, offset: int) -> UserError:
    return UserError(f"{path} is not UTF-8 text: bad byte at offset {offset}, line {line}: convert it or leave it out")


def _missing_column(place: str, column: str, available: list[str]) -> UserError:
    return UserError(f"{place} has no column {column!r} but {', '.join(available) or 'none'}: choose one by {COLUMN_OPTIONS}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
