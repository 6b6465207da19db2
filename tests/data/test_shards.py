"""Shards: documents come back exactly, are tokenized once, and nothing half-written is ever used."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shoal.config import CorpusConfig, UserError
from shoal.data import PreparedData, Tokenizer, TokenShards, open_corpus, prepare, shards, train_tokenizer
from shoal.data.cache import build_once
from shoal.data.progress import show_progress

TEXTS = [f"Document {number}: " + "some words, <｜User｜> and été\n" * (number % 9) for number in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in (("train.jsonl", TEXTS[:50]), ("val.jsonl", TEXTS[50:])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def prepare_folder(data: Path, tokenizer: Tokenizer | None = None, vocab_size: int = 300, cache: str = "cache") -> PreparedData:
    config = CorpusConfig(cache=str(data.parent / cache))
    return prepare(open_corpus((str(data),), config), tokenizer, vocab_size, config, progress=False)


def texts_of(prepared: PreparedData, split: TokenShards) -> list[str]:
    texts = []
    for index in range(split.num_documents):
        ids = split.document(index)
        assert (ids[0], ids[-1]) == (prepared.tokenizer.bos_id, prepared.tokenizer.eos_id)
        assert all(ids[1:-1] > 15), "a special token inside a document"
        texts.append(prepared.tokenizer.decode(ids))
    return texts


def test_a_long_document_in_pieces_is_the_document(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare_folder(data, cache="whole")
    monkeypatch.setattr(shards, "LONG", 60)
    pieces = prepare_folder(data, tokenizer=whole.tokenizer, cache="pieces")
    assert texts_of(pieces, pieces.train) == TEXTS[:50]
    assert pieces.train.num_tokens <= 1.02 * whole.train.num_tokens
    assert list(pieces.train.document_bytes) == list(whole.train.document_bytes)


def test_documents_come_back_exactly(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 500)
    prepared = prepare_folder(data)
    assert texts_of(prepared, prepared.train) == TEXTS[:50]
    assert texts_of(prepared, prepared.val) == TEXTS[50:]
    for split, texts in ((prepared.train, TEXTS[:50]), (prepared.val, TEXTS[50:])):
        assert isinstance(split.tokens, np.memmap)
        assert split.tokens.dtype == np.uint16
        assert split.num_tokens == split.documents[-1] == len(split.tokens)
        assert list(split.document_bytes) == [len(text.encode()) for text in texts]
        assert split.num_bytes == sum(split.document_bytes)


def test_second_call_reads_neither_text_nor_tokenizer_anew(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_folder(data)
    monkeypatch.setattr(shards, "_train", None)
    monkeypatch.setattr(shards, "_tokenize", None)
    second = prepare_folder(data)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train.tokens, first.train.tokens)
    third = prepare_folder(data, tokenizer=first.tokenizer)
    assert third.fingerprint == first.fingerprint, "the trained tokenizer, given by hand, finds the same shards"


def test_fingerprint_is_of_the_content(data: Path) -> None:
    first = prepare_folder(data)
    copy = data.parent / "copy"
    shutil.copytree(data, copy, copy_function=shutil.copy)
    os.utime(copy / "train.jsonl", (1, 1))
    assert prepare_folder(copy, cache="other").fingerprint == first.fingerprint
    with (copy / "val.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert prepare_folder(copy, tokenizer=first.tokenizer).fingerprint != first.fingerprint
    assert prepare_folder(data, vocab_size=290).fingerprint != first.fingerprint


def test_large_vocabulary_and_tokenizer_without_begin_token(data: Path) -> None:
    class Large(Tokenizer):
        vocab_size = 70_000  # type: ignore[assignment]

    trained = train_tokenizer(TEXTS, 300)
    prepared = prepare_folder(data, Large(trained.json, trained.config | {"bos_token": None}))
    assert prepared.train.tokens.dtype == np.uint32
    assert prepared.train.document(0).tolist() == [*trained.encode(TEXTS[0]), 1]


def test_error_leaves_nothing_and_the_next_call_starts_over(data: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    good = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(good + "broken\n")
    with pytest.raises(UserError, match=r"train\.jsonl:51 is not JSON"):
        prepare_folder(data, tokenizer)
    assert [file.suffix for file in (data.parent / "cache" / "shards").iterdir()] in ([".lock"], [])
    with pytest.raises(UserError, match=r"train\.jsonl:51 is not JSON"):
        prepare_folder(data)
    (data / "train.jsonl").write_text(good)
    assert prepare_folder(data).train.num_documents == 50


@pytest.mark.parametrize(("blank", "purpose"), [("train", "training"), ("val", "validation")])
def test_split_without_text(data: Path, blank: str, purpose: str) -> None:
    (data / f"{blank}.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(UserError, match=f"no text for {purpose}"):
        prepare_folder(data)


def test_blank_data(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(UserError, match="blank holds no text for training"):
        prepare_folder(tmp_path / "blank.jsonl")


def test_damaged_and_unwritable_cache(data: Path) -> None:
    prepare_folder(data)
    [tokens] = (data.parent / "cache").rglob("train.tokens")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged"):
        prepare_folder(data)
    tokens.unlink()
    with pytest.raises(UserError, match="damaged"):
        prepare_folder(data)
    (tokens.parent / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        prepare_folder(data)
    (data.parent / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"set corpus\.cache"):
        prepare_folder(data, cache="file")


def test_progress_goes_to_stderr_in_lines(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = CorpusConfig(cache=str(data.parent / "cache"))
    prepare(open_corpus((str(data),), config), None, 300, config, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("trained a tokenizer of 300 tokens")
    assert err.splitlines()[1].startswith("tokenized data: ")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with show_progress("tokenizing plays") as report:
        for step in range(4):
            time.sleep(0.11)
            report(step / 4, f"{step} MB")
    screen = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "tokenizing plays" in screen
    assert "3 MB" in screen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_process_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = tmp_path / "result"

    def die(partial: Path) -> None:
        (partial / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        build_once(folder, die)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not folder.exists()
    build_once(folder, lambda partial: (partial / "whole").write_text("whole"))
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_one_builds_while_the_others_wait(tmp_path: Path) -> None:
    built = []

    def build(partial: Path) -> None:
        built.append(partial)
        time.sleep(0.05)
        (partial / "file").write_text("done")

    threads = [threading.Thread(target=build_once, args=(tmp_path / "result", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (tmp_path / "result" / "file").read_text() == "done"
