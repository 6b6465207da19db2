"""A tiny chat model, and a tokenizer for random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shoal.cli import main
from shoal.data import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Of more tokens than small random models have, whose ids all exist."""
    return train_tokenizer(["red fish swims over the reef\n" * 9], 300)


@pytest.fixture(scope="session")
def conversations_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short conversations of the words that the tiny model has read."""
    file = tmp_path_factory.mktemp("conversations") / "chat.jsonl"
    rows = []
    for i in range(60):
        question = {"role": "user", "content": f"red fish {i % 7}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": f"over the reef {i % 3}"}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def chat_model(trained: Path, conversations_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a fine-tuned model; only to be read."""
    out = tmp_path_factory.mktemp("chat") / "run"
    threads = torch.get_num_threads()
    options = ["--steps", "4", "--batch-tokens", "256", "--lr", "0.003", "--threads", "1", "--precision", "fp32"]
    assert main(["sft", str(trained), "--data", str(conversations_file), "--out", str(out), *options]) == 0
    torch.set_num_threads(threads)
    return out
