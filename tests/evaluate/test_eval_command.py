"""`shoal eval`: what is scored, and that the figure is that of the likelihood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.cli import main
from shoal.config import CorpusConfig, MachineOptions
from shoal.data import open_corpus
from shoal.engine import load
from shoal.formats.checkpoints import complete_checkpoints
from shoal.train import likelihood

FAST = ["--threads", "1", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(model: Path, *more: str) -> dict[str, Any]:
        assert main(["eval", str(model), *FAST, "--json", *more]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    return run


def test_a_file_is_scored_whole_as_its_documents(workshop: Path, trained: Path, evaluate: Any) -> None:
    file = workshop / "text.txt"
    loaded = load(str(trained), MachineOptions("cpu", "fp32", 1))
    tokenizer = loaded.tokenizer
    texts = list(open_corpus((str(file),), CorpusConfig()).texts_to_score())
    documents = [(np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]), len(text.encode())) for text in texts]
    expected = likelihood(loaded.model, loaded.machine, documents, window=32)
    result = evaluate(trained, "--data", str(file))
    assert result == {
        "bpb": expected.bits_per_byte,
        "nats_per_token": expected.nats_per_token,
        "tokens": expected.tokens,
        "bytes": file.stat().st_size,
        "window": 32,
        "overlap": 16,
    }


def test_the_held_out_text_of_a_run_gets_the_figure_of_its_summary(workshop: Path, train_args: Any, tmp_path: Path, evaluate: Any) -> None:
    text = (workshop / "text.txt").read_text().split("\n\n")
    data = tmp_path / "data"
    data.mkdir()
    for name, part in (("train", text[:100]), ("val", text[100:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in part if document))
    args = train_args(tmp_path / "run", "--steps", "3", "--json")
    args[args.index("--data") + 1] = str(data)
    assert main(args) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    result = evaluate(tmp_path / "run", "--data", str(data))
    assert result["bpb"] == pytest.approx(summary["val_bpb"], rel=1e-6)
    assert (result["bytes"], result["tokens"]) == (summary["val_bytes"], summary["val_tokens"])
    assert result == evaluate(tmp_path / "run", "--data", str(data / "val.jsonl"))
    assert result["bytes"] < evaluate(tmp_path / "run", "--data", str(data / "train.jsonl"))["bytes"]


def test_window_overlap_and_limit(workshop: Path, trained: Path, tmp_path: Path, evaluate: Any) -> None:
    data = ["--data", str(workshop / "text.txt")]
    wide = evaluate(trained, *data, "--window", "64", "--overlap", "60")
    narrow = evaluate(trained, *data, "--window", "1")
    assert (wide["tokens"], wide["bytes"]) == (narrow["tokens"], narrow["bytes"])
    assert wide["bpb"] < narrow["bpb"]
    assert (narrow["window"], narrow["overlap"]) == (1, 0)
    assert evaluate(trained, *data, "--max-tokens", "100")["tokens"] < wide["tokens"]
    # Without its run the model is seen in the longest window.
    shutil.copytree(complete_checkpoints(trained)[-1], tmp_path / "alone")
    assert evaluate(tmp_path / "alone", *data)["window"] == 64


def test_another_column_of_a_file(trained: Path, tmp_path: Path, evaluate: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"content": "the red fish"}\n{"content": "été"}\n')
    assert evaluate(trained, "--data", str(tmp_path / "rows.jsonl"), "--text-column", "content")["bytes"] == 12 + 5
