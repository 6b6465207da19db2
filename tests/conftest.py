"""A tiny corpus, a tiny model's recipe, and one trained run that all tests of commands share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from shoal.cli import main

# How long an example takes says more about the machine than about the code.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

TINY = """
steps = 12
sequence_length = 32
batch_size = 4
eval_tokens = 512
eval_every_minutes = 0
precision = "fp32"
device = "cpu"
threads = 1

[model]
vocab_size = 512
hidden_size = 32
num_hidden_layers = 2
intermediate_size = 48
num_attention_heads = 2
max_position_embeddings = 64
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
num_nextn_predict_layers = 1

[checkpoint]
every_steps = 4
every_minutes = 0
"""

WORDS = ["red", "green", "blue", "été", "fish", "swims", "over", "under", "the", "a", "reef", "😀", "def", "return", "x = 1"]


def paragraphs(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=40)) + ".\n\n" for _ in range(count))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Commands set the number of threads; the next test must not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text.txt` (to train on), `recipe.toml` (of a tiny model) and `cache` (tokenized data)."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "text.txt").write_text(paragraphs(120, 0), encoding="utf-8")
    (folder / "recipe.toml").write_text(TINY, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def train_args(workshop: Path) -> Callable[..., list[str]]:
    """Arguments of `shoal train` for the tiny model."""

    def make(out: Path, *more: str) -> list[str]:
        places = ["--data", str(workshop / "text.txt"), "--corpus.cache", str(workshop / "cache"), "--out", str(out)]
        return ["train", str(workshop / "recipe.toml"), *places, *more]

    return make


@pytest.fixture(scope="session")
def trained(workshop: Path, train_args: Callable[..., list[str]]) -> Path:
    """The folder of a finished run; only to be read."""
    threads = torch.get_num_threads()
    assert main(train_args(workshop / "run", "--json")) == 0
    torch.set_num_threads(threads)
    return workshop / "run"
