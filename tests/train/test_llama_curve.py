"""The dense baseline learns what transformers' Llama learns under torch's AdamW, step by step from the same weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from shoal.config.recipes import load_recipe
from shoal.data import Batches, open_corpus, prepare
from shoal.formats.huggingface import save_model
from shoal.model import Transformer, init_weights
from shoal.train import train
from shoal.train.trainer import fit_tokenizer

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

STEPS = 40
RATE = 0.01
LLAMA = ModelConfig(
    model_type="llama", vocab_size=512, hidden_size=32, num_hidden_layers=2, intermediate_size=80, num_attention_heads=4,
    max_position_embeddings=64, n_routed_experts=None, init="fan_in",
)  # fmt: skip


def learning_rate(step: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero, as transformers' `get_cosine_schedule_with_warmup` has it."""
    if step < warmup:
        return RATE * step / warmup
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True, "init": "normal"}], ids=["mha", "gqa-tied"]
)
def test_the_training_curve_is_that_of_transformers(changes: dict[str, Any], workshop: Path, tmp_path: Path) -> None:
    tiny = load_recipe(str(workshop / "recipe.toml"))
    config: TrainConfig = replace(
        tiny,
        data=(str(workshop / "text.txt"),),
        corpus=replace(tiny.corpus, cache=str(workshop / "cache")),
        out=str(tmp_path / "run"),
        steps=STEPS,
        model=replace(LLAMA, **changes),
        optimizer=OptimizerConfig(name="adamw", adam_lr=RATE, embed_lr=RATE, head_lr=RATE, adam_eps=1e-8),
        schedule=ScheduleConfig(name="cosine", warmup=0.1),
    )
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [row["loss"] for row in rows if "loss" in row]

    data = prepare(open_corpus(config.data, config.corpus), None, 512, config.corpus, progress=False)
    batches = Batches(data.train, config.sequence_length, config.batch_size, config.seed)
    start = Transformer(fit_tokenizer(config.model, data.tokenizer))
    init_weights(start, config.seed)
    save_model(start, tmp_path / "start")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    assert type(peer).__name__ == "LlamaForCausalLM"
    embedding = peer.model.embed_tokens.weight
    groups = [
        {"params": [embedding], "weight_decay": 0.01},
        {"params": [p for p in peer.parameters() if p.ndim == 2 and p is not embedding], "weight_decay": 0.1},
        {"params": [p for p in peer.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    theirs = []
    for step in range(STEPS):
        batch = batches.next()
        logits = peer(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 4)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())

    assert len(ours) == STEPS
    assert ours[-1] < ours[0] - 1
    assert ours == pytest.approx(theirs, abs=1e-4)
