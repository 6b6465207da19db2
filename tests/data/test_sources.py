"""Sources: every format gives the same documents, held-out text is never trained on, and every mistake is named."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import CorpusConfig, UserError
from shoal.data import Corpus, open_corpus, readers, sources
from shoal.data.conversations import read_conversations

TEXTS = [f"document {number}\n" + "été \r\n漢字 \U0001f600 \x00" * (number % 7) for number in range(40)]


def jsonl(texts: list[str], column: str = "text") -> bytes:
    return b"".join(json.dumps({"id": number, column: text}).encode() + b"\n" for number, text in enumerate(texts))


def corpus_of(*paths: Path, **settings: Any) -> Corpus:
    return open_corpus(tuple(map(str, paths)), CorpusConfig(**settings))


def everything(corpus: Corpus) -> list[str]:
    train, val = list(corpus.train_documents()), list(corpus.val_documents())
    assert train
    assert val
    assert not set(train) & set(val)
    assert [document.text for document in corpus.documents() if document.held_out] == val
    return train + val


def read(path: Path, **settings: Any) -> list[str]:
    return [text for text, _ in readers.read_file(path, settings.get("text_column", "text"), settings.get("piece", 1024))]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as some tools write them
        content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    path.write_bytes(content)
    return path


# --- formats


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, b"\xef\xbb\xbf" + jsonl(TEXTS) + b'\n{"text": null}\n{"text": ""}\n')
    assert read(file) == TEXTS
    assert sorted(everything(corpus_of(file))) == sorted(TEXTS)


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": [*TEXTS, None], "n": range(41)}), tmp_path / "a.parquet", row_group_size=7)
    assert read(tmp_path / "a.parquet", text_column="body") == TEXTS
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text' but body, n"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'n' is not text but int"):
        read(tmp_path / "a.parquet", text_column="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"cannot read .*b\.parquet"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_text_comes_in_pieces_that_make_up_the_file(tmp_path: Path, suffix: str) -> None:
    text = "\n\n".join(f"Paragraph {number}:\r\n" + "word 漢 " * 40 for number in range(300))
    file = write(tmp_path / f"a{suffix}", b"\xef\xbb\xbf" + text.encode())
    pieces = read(file, piece=1024)
    assert "".join(pieces) == text
    assert all(1024 <= len(piece) <= 2048 and piece.endswith("\n\n") for piece in pieces[:-1])
    corpus = corpus_of(file)
    assert everything(corpus) == read(file, piece=max(1024, file.stat().st_size // 64))
    assert 0.08 < sum(map(len, corpus.val_documents())) / len(text) < 0.15


def test_what_packs_well_unpacks_in_pieces(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "the same again " * 20})] * 20_000  # 6 MB, of which Zstandard makes less than a kilobyte
    file = write(tmp_path / "a.jsonl.zst", "\n".join(rows).encode())
    assert file.stat().st_size < 4096
    assert read(file) == ["the same again " * 20] * 20_000


@given(text=st.text(st.sampled_from("a漢\U0001f600\r\n"), max_size=300), piece=st.integers(1, 40))
def test_pieces_of_any_text_make_up_the_file(tmp_path_factory: pytest.TempPathFactory, text: str, piece: int) -> None:
    file = write(tmp_path_factory.mktemp("text") / "a.txt", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "LONGEST_PIECE", 5)  # reads end within characters
        assert "".join(read(file, piece=piece)) == text
    assert all(len(text) < 4 * piece for text in read(file, piece=piece))


@pytest.mark.parametrize("size", [60_000, 100_000, 130_000, 200_000])
@pytest.mark.parametrize("between", [" ", "\r"])
def test_text_without_line_ends_gives_about_a_tenth_for_validation(tmp_path: Path, size: int, between: str) -> None:
    text = between.join(map(str, range(size // 4)))[:size]
    corpus = corpus_of(write(tmp_path / "a.txt", text.encode()))
    assert "".join(everything(corpus)) == text
    assert 0.08 < sum(map(len, corpus.val_documents())) / size < 0.15


def test_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": TEXTS[:30], "validation": TEXTS[30:], "test": ["never read"]}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, streaming) == ("org/Some Set", "small", True)
        return ({"body": text} for text in rows[split])

    fake = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda name, config: list(rows))
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    corpus = open_corpus(("hf:org/Some Set:small",), CorpusConfig(text_column="body"))
    assert (list(corpus.train_documents()), list(corpus.val_documents())) == (TEXTS[:30], TEXTS[30:])
    assert corpus.name == "Some-Set"
    with pytest.raises(UserError, match=r"hf:org/Some Set, train row 1 has no column 'text' but body"):
        next(open_corpus(("hf:org/Some Set:small",), CorpusConfig()).train_documents())

    del rows["validation"], rows["test"]
    corpus = open_corpus(("hf:org/Some Set:small",), CorpusConfig(text_column="body"))
    assert sorted(everything(corpus)) == sorted(TEXTS[:30])


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_corpus(("hf:any",), CorpusConfig())
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(UserError, match="pip install zstandard"):
        read(tmp_path / "a.txt.zst")


def test_standard_library() -> None:
    corpus = open_corpus((), CorpusConfig())
    assert corpus.name == "python-stdlib"
    names = {source.name: source for source in corpus.sources}
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages", "encodings"))
    total = sum(source.size for source in corpus.sources)
    assert total > 5e6
    assert 0.01 < sum(source.size for source in corpus.sources if source.split == "val") / total < 0.1
    assert len(list(corpus.val_documents())) > 10
    assert corpus.fingerprint == open_corpus((), CorpusConfig()).fingerprint


# --- splits


@pytest.mark.parametrize(
    ("train", "val", "ignored"),
    [
        ("train.jsonl", "val.jsonl.gz", "test.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/validation-00000-of-00001.jsonl", "README.md"),
        ("Train.txt", "valid.txt", "LICENSE"),
        ("train/a.txt", "test/b.txt", "notes.txt"),
        ("training_set.jsonl", "test.jsonl", "other.jsonl"),
    ],
)
def test_named_splits_are_used(tmp_path: Path, train: str, val: str, ignored: str) -> None:
    contents = {train: "for training", val: "for validation", ignored: "for neither"}
    for name, text in contents.items():
        write(tmp_path / name, jsonl([text]) if ".jsonl" in name else text.encode())
    corpus = corpus_of(tmp_path)
    assert (list(corpus.train_documents()), list(corpus.val_documents())) == (["for training"], ["for validation"])
    assert corpus.describe().endswith(f": {train} for training; {val} for validation; left out: {ignored}")
    one_by_one = corpus_of(*(tmp_path / name for name in (val, train)))
    if "/" not in train:
        assert list(one_by_one.train_documents()) == ["for training"]


PROSE = "".join(f"Line {number} of a text.\n" + "\n" * (number % 5 == 0) for number in range(1_700))
"""About 40 KB."""


@pytest.mark.parametrize("files", [2, 3])
def test_little_text_in_several_files_gives_many_documents_and_about_a_tenth_of_them_for_validation(tmp_path: Path, files: int) -> None:
    for number in range(files):
        write(tmp_path / f"{number}.txt", PROSE.replace("Line", f"{number}:").encode())
    corpus = corpus_of(tmp_path)
    documents = everything(corpus)
    assert len(documents) > 30
    assert 0.08 < sum(map(len, corpus.val_documents())) / sum(map(len, documents)) < 0.15


def test_little_text_for_training_gives_many_documents_and_text_for_validation_stays_whole(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", PROSE.encode())
    write(tmp_path / "val.txt", PROSE[::-1].encode())
    corpus = corpus_of(tmp_path)
    assert len(list(corpus.train_documents())) > 30
    assert list(corpus.val_documents()) == [PROSE[::-1]]


def test_much_text_is_cut_as_ever(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.txt", (name + PROSE * 64).encode())
    assert sum(source.size for source in corpus_of(tmp_path).sources) > 64 * readers.LONGEST_PIECE
    whole = [piece for name in "ab" for piece in read(tmp_path / f"{name}.txt", piece=readers.LONGEST_PIECE)]
    assert [document.text for document in corpus_of(tmp_path).documents()] == whole


def test_a_program_is_no_split(tmp_path: Path) -> None:
    for name in ("train.py", "val.py", "test_train.py", "model.py", ".hidden/secret.py", "picture.png"):
        write(tmp_path / name, f"# {name}\n".encode())
    write(tmp_path / "empty.py", b"")
    assert sorted(everything(corpus_of(tmp_path))) == sorted(f"# {name}\n" for name in ("train.py", "val.py", "test_train.py", "model.py"))


def test_words_that_begin_like_those_of_splits_are_none(tmp_path: Path) -> None:
    texts = {"trains.txt": "on rails\n", "values.txt": "of numbers\n", "other.txt": "of neither\n"}
    for name, text in texts.items():
        write(tmp_path / name, text.encode())
    corpus = corpus_of(tmp_path)
    assert sorted(everything(corpus)) == sorted(texts.values())
    assert corpus.describe().endswith(": other.txt, trains.txt, values.txt with some documents held out for validation")


def test_rows_are_preferred_to_text_in_a_folder(tmp_path: Path) -> None:
    for name in ("README.md", *(f"part-{number}.csv" for number in range(5))):
        write(tmp_path / name, b"about the data")
    write(tmp_path / "part-0.jsonl", jsonl(TEXTS))
    corpus = corpus_of(tmp_path)
    assert "about the data" not in everything(corpus)
    assert corpus.describe().endswith(
        "part-0.jsonl with some documents held out for validation; left out: README.md, part-0.csv, part-1.csv and 3 more"
    )


@given(st.randoms(use_true_random=False), st.integers(2, 60))
def test_choice_of_documents_does_not_depend_on_their_order(tmp_path_factory: pytest.TempPathFactory, shuffler: Any, count: int) -> None:
    folder = tmp_path_factory.mktemp("order")
    texts = [f"text {number} " * (1 + number % 5) for number in range(count)]
    first = corpus_of(write(folder / "a.jsonl", jsonl(texts)))
    shuffler.shuffle(texts)
    second = corpus_of(write(folder / "b.jsonl", jsonl(texts)))
    everything(first)
    assert sorted(first.val_documents()) == sorted(second.val_documents())


@given(st.lists(st.integers(1, 300), min_size=2, max_size=60), st.floats(0.01, 0.9))
def test_documents_that_are_much_of_the_corpus_are_trained_on(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], fraction: float
) -> None:
    texts = [f"{number:02}" + "x" * length for number, length in enumerate(lengths)]
    corpus = corpus_of(write(tmp_path_factory.mktemp("rows") / "a.jsonl", jsonl(texts)), val_fraction=fraction)
    everything(corpus)
    held, total = sum(map(len, corpus.val_documents())), sum(map(len, texts))
    assert held <= max(2 * max(fraction, 0.1) * total, min(map(len, texts)))


def test_of_a_long_and_a_short_row_the_short_one_is_held_out(tmp_path: Path) -> None:
    for number in range(8):  # whichever hash is lower
        texts = [f"{number}" * 200_000, f"{number}" * 1_000]
        assert list(corpus_of(write(tmp_path / f"{number}.jsonl", jsonl(texts))).val_documents()) == texts[1:]


def test_share_of_a_large_corpus_is_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HELD_OUT_CHARACTERS", 2_000)
    texts = [f"{number:0100}" for number in range(5_000)]
    corpus = corpus_of(write(tmp_path / "a.jsonl", jsonl(texts)), val_fraction=0.02)
    everything(corpus)
    assert 60 < len(list(corpus.val_documents())) < 140
    share = int(0.02 * 2**64)
    assert (corpus._is_chosen(share - 1), corpus._is_chosen(share)) == (True, False), "the share, not one that a prefix happened to need"


def test_equal_documents_stay_together(tmp_path: Path) -> None:
    everything(corpus_of(write(tmp_path / "a.jsonl", jsonl(["same", "other"] * 20))))


def test_several_data_are_joined_each_with_its_own_splits(tmp_path: Path) -> None:
    write(tmp_path / "one/train.jsonl", jsonl(["one train"]))
    write(tmp_path / "one/val.jsonl", jsonl(["one val"]))
    write(tmp_path / "two.jsonl", jsonl(TEXTS))
    corpus = corpus_of(tmp_path / "one", tmp_path / "two.jsonl")
    assert sorted(everything(corpus)) == sorted(["one train", "one val", *TEXTS])
    assert corpus.name == "one+1"
    progress = [document.progress for document in corpus.documents()]
    assert progress == sorted(progress)
    assert progress[-1] == 1


def test_fingerprint_follows_content_and_settings_that_matter(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    original = corpus_of(file)
    assert corpus_of(file).fingerprint == original.fingerprint
    assert corpus_of(file, val_fraction=0.2).fingerprint != original.fingerprint
    assert corpus_of(file, text_column="id").fingerprint != original.fingerprint
    write(file, jsonl(TEXTS[:-1]))
    assert corpus_of(file).fingerprint != original.fingerprint


def test_files_of_the_same_name_size_and_time_are_told_apart_by_their_content(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one/book.txt", b"apple " * 9999), write(tmp_path / "other/book.txt", b"zebra " * 9999)
    for file in (one, other):
        os.utime(file, ns=(0, 0))
    assert corpus_of(one).fingerprint != corpus_of(other).fingerprint


@pytest.mark.parametrize(
    ("path", "name"),
    [("plays/input.txt", "plays"), ("plays/hamlet.txt.gz", "hamlet"), ("My plays/data.jsonl", "My-plays"), ("plays/", "plays")],
)
def test_names(tmp_path: Path, path: str, name: str) -> None:
    if path.endswith("/"):
        write(tmp_path / path / "a.txt", b"text")
    else:
        write(tmp_path / path, b"text")
    assert corpus_of(tmp_path / path).name == name
    file = Path(path).name if "." in path else "a.txt"
    assert corpus_of(tmp_path / path).describe().startswith(f"{name}: {file} with ")


# --- mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"fine\nnot \xff fine", r"a\.txt is not UTF-8 text: bad byte at offset 9, line 2"),
        ("a.txt", b"line\n" * 30_000 + b"cut \xe6\xbc", r"a\.txt is not UTF-8 text: bad byte at offset 150004, line 30001"),
        ("a.txt", b"short", r"a\.txt is too short to hold part of it out"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', r"bad byte at offset 27, line 2"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": fine}\n', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl:1 has no column 'text' but body, id"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1 is not an object"),
        ("a.jsonl", b'{"text": ["x"]}\n', r"a\.jsonl:1: 'text' is not text but list"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"a\.jsonl:1: .*surrogate"),
        ("a.jsonl", b'{"text": "alone"}\n', r"only one document"),
        ("a.txt.gz", b"no gzip", r"cannot read .*a\.txt\.gz"),
        ("a.txt.gz", gzip.compress(b"cut short " * 1000)[:-9], r"cannot read .*a\.txt\.gz"),
        ("a.txt.zst", b"no zstandard", r"cannot read .*a\.txt\.zst"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(corpus_of(tmp_path / name).documents())
    assert "\n" not in str(error.value)


def test_zstandard_file_that_was_cut_short(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress("".join(map(str, range(100_000))).encode())
    (tmp_path / "a.txt.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="ends before its last Zstandard frame"):
        read(tmp_path / "a.txt.zst")


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        corpus_of(tmp_path / "nowhere")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="holds no text, JSON Lines or Parquet file"):
        corpus_of(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_called_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for opened in (lambda: corpus_of(tmp_path / "pipe"), lambda: next(read_conversations([str(tmp_path / "pipe")]))):
        with pytest.raises(UserError, match="pipe is a pipe or a device, but data is read more than once: put it into a file"):
            opened()


def test_folders_that_are_linked_to_are_read_once(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    for place in (elsewhere / "deep", folder / ".hidden"):
        place.mkdir(parents=True)
    (elsewhere / "deep" / "a.txt").write_text("one\n")
    (folder / ".hidden" / "b.txt").write_text("two\n")
    (elsewhere / "deep" / "round").symlink_to(elsewhere)
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    assert [source.name for source in corpus_of(folder).sources] == ["again/deep/a.txt"]
