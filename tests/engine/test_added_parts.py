"""Models with tables of n-grams and other additions: saved, loaded and generated from like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import packed
from small_models import COMMON, KINDS

from shoal.config import EngineOptions, ModelConfig, SamplingOptions, UserError
from shoal.config.huggingface import export_obstacles
from shoal.engine import Engine, Runner, TorchRunner
from shoal.engine.native import NativeRunner
from shoal.engine.weights import load_weights
from shoal.formats.gguf_layout import gguf_obstacles
from shoal.formats.huggingface import load_model, read_config, save_model
from shoal.kernels.selection import BACKEND
from shoal.model import Transformer, init_weights
from shoal.runtime import Machine

ADDITIONS: dict[str, Any] = {"ngram_order": 4, "ngram_rows": 200, "embedding_skip": True, "value_embedding": True, "convolution": 3}
PROMPTS = [[7], [5, 9, 11], [3 * i % 61 + 2 for i in range(70)], [3 * i % 61 + 2 for i in range(33)]]
GREEDY = SamplingOptions(max_tokens=20, temperature=0, ignore_eos=True)


REPEATS: dict[str, Any] = {"repeat_window": 40, "num_nextn_predict_layers": 0, "logit_softcap": None}


def make(kind: str, **changes: Any) -> Transformer:
    if kind == "repeats":
        kind, changes = "llama", REPEATS | changes
    model = Transformer(ModelConfig(**{**COMMON, **KINDS[kind], **ADDITIONS, **changes}))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("ngrams", "embedding_skip", "value_embedding", "convolution")):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def whole_passes(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        output = model(torch.tensor([ids]))
        ids.append(int(model.logits(output.hidden[0, -1], None if output.keys is None else output.keys[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["v3", "llama", "repeats", "native v3", "native llama", "native repeats"])
@pytest.mark.parametrize(
    "options", [{}, {"step_tokens": 12}, {"speculate": "on", "draft_tokens": 2}, {"cache_tokens": 128}], ids=lambda o: str(o) or "plain"
)
def test_the_engine_says_what_whole_passes_say(kind: str, options: dict[str, Any]) -> None:
    runner: Runner
    if kind.startswith("native"):
        if BACKEND.cpu is None:
            pytest.skip(BACKEND.reason)
        model = make(kind.removeprefix("native "), ngram_order=0, embedding_skip=False, convolution=0)
        runner = NativeRunner(model.config, packed(model), 2)
    else:
        model = make(kind)
        runner = TorchRunner(model, Machine(torch.device("cpu"), "fp32", 1, 1.0, "test"))
    engine = Engine(runner, None, EngineOptions(**{"max_running": 4, "speculate": "off", "step_tokens": 40, **options}))
    wanted = [whole_passes(model, prompt, 20) for prompt in PROMPTS]
    for turn in ("first", "again, from the prefix cache"):
        assert [result.ids for result in engine.generate(PROMPTS, GREEDY)] == wanted, turn


@pytest.mark.parametrize("kind", ["v3", "llama"])
def test_saved_and_loaded_it_is_the_same_under_a_model_type_of_its_own(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    save_model(model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["model_type"] == "shoal"
    assert read_config(tmp_path / "model").additions == model.config.additions
    again = load_model(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name


def test_what_cannot_hold_it_refuses_it(tmp_path: Path) -> None:
    model = make("v3")
    assert any("ngram_order" in reason for reason in export_obstacles(model.config))
    save_model(model, tmp_path / "model")
    assert any("ngram_order" in reason for reason in gguf_obstacles(model.config))
    with pytest.raises(UserError, match=r"ngram_order is 4.*plain torch only"):
        load_weights(tmp_path / "model", 4)
