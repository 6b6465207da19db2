"""Fine-tuning: what is learnt, what stays, what is written."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.small_models import make_model

from shoal.cli import main
from shoal.config import SFTCommand, TuneOptions
from shoal.data import Tokenizer
from shoal.evaluate import default_window
from shoal.formats.huggingface import load_model, read_config
from shoal.formats.locate import locate_model
from shoal.post.packing import Text
from shoal.post.sft import Plan, held_out_loss, split
from shoal.post.tuning import Tuner, with_chat_template
from shoal.runtime import Machine

OPTIONS = ["--steps", "12", "--batch-tokens", "512", "--lr", "0.003", "--threads", "1", "--precision", "fp32", "--json"]


def tuned(model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    assert main(["sft", str(model), "--data", str(data), "--out", str(out), *OPTIONS, *more]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that are not what they were."""
    one, other = (load_model(locate_model(path)).state_dict() for path in (before, after))
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_everything_is_trained_the_loss_falls_and_the_template_is_saved(
    trained: Path, conversations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tuned(trained, conversations_file, tmp_path / "run", capsys)
    assert summary["val_loss"] < summary["val_loss_before"] - 0.1
    names = changed(trained, tmp_path / "run")
    for part in ("lm_head", "embed_tokens", "self_attn.q_proj", "mlp.experts.up_proj", "e_score_correction_bias", "eh_proj", "shared_head"):
        assert any(part in name for name in names), part
    assert any(name.startswith("model.layers.2.mlp.experts") for name in names), "the MTP module learns"
    template = Tokenizer.load(locate_model(tmp_path / "run")).chat_template
    assert template is not None
    assert "generation" in template


def test_what_is_said_of_sampling_stays(
    trained: Path, conversations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), str(tmp_path / "source")]) == 0
    written = {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(written))
    tuned(tmp_path / "source", conversations_file, tmp_path / "run", capsys, "--steps", "1")
    found = locate_model(tmp_path / "run")
    assert written.items() <= json.loads((found / "generation_config.json").read_text()).items()
    assert json.loads((found / "config.json").read_text())["eos_token_id"] == [1, 7]


def test_adapters_leave_embedding_and_head_and_are_merged(
    trained: Path, conversations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tuned(trained, conversations_file, tmp_path / "run", capsys, "--lora-rank", "4", "--lr", "0.02")
    assert summary["val_loss"] < summary["val_loss_before"]
    names = changed(trained, tmp_path / "run")
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)
    assert any("experts.down_proj" in name for name in names)


def test_esft_trains_experts_alone(trained: Path, conversations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(trained, conversations_file, tmp_path / "run", capsys, "--esft-share", "0.5")
    names = changed(trained, tmp_path / "run")
    assert names
    assert all(".mlp.experts." in name for name in names)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 200), st.sampled_from([0.5, 1.0, 2.0, 2.5]))
def test_every_conversation_is_seen_as_often_as_epochs_say(lengths: list[int], most: int, epochs: float) -> None:
    texts = [Text(np.full(length + 1, i), np.ones(length + 1, bool)) for i, length in enumerate(lengths)]
    plan = Plan(texts, SFTCommand("m", data=("x",), batch_tokens=most, epochs=epochs))
    batches = list(plan.batches())
    assert len(batches) == plan.steps
    for batch in batches:
        assert len(batch) == 1 or sum(text.length for text in batch) <= most
        assert len({text.ids[0] for text in batch}) == len(batch)
    counts = Counter(int(text.ids[0]) for batch in batches for text in batch)
    assert counts.total() == max(1, round(epochs * len(texts)))
    assert {counts[i] for i in range(len(texts))} <= {int(epochs), math.ceil(epochs)}
    stopped = Plan(texts, SFTCommand("m", data=("x",), batch_tokens=most, steps=3))
    assert len(list(stopped.batches())) == stopped.steps == 3


def test_a_model_that_would_be_discarded_is_refused(chat_model: Path, conversations_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(chat_model.rglob("*"))
    for model in (chat_model, next((chat_model / "checkpoints").iterdir())):
        assert main(["sft", str(model), "--data", str(conversations_file), "--out", str(chat_model), "--overwrite", "--steps", "1"]) == 2
        assert "choose another --out" in capsys.readouterr().err
    assert sorted(chat_model.rglob("*")) == before


def test_what_cannot_be_resumed_is_not_offered_to_be(
    chat_model: Path, conversations_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", str(chat_model), "--data", str(conversations_file), "--out", str(chat_model), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "already holds a run: --overwrite discards it" in error
    assert "--resume" not in error


def test_text_is_scored_in_the_window_of_pretraining(trained: Path, chat_model: Path) -> None:
    before, after = (locate_model(path) for path in (trained, chat_model))
    assert default_window(before, read_config(before)) == default_window(after, read_config(after)) == 32


def test_preview_counts_what_it_shows(trained: Path, conversations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "three.jsonl").write_text("".join(conversations_file.read_text().splitlines(keepends=True)[:3]))
    assert main(["sft", str(trained), "--data", str(tmp_path / "three.jsonl"), "--preview", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["conversations"] == 3


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(steps: int, warmup: float, final: float) -> None:
    tuner = Tuner(torch.nn.Linear(1, 1), TuneOptions(lr=2.0, warmup=warmup, final=final), steps)
    rates = [tuner.rate(step) for step in range(1, steps + 1)]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(2.0)
    assert min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if warmup < 0.5:
        assert rates[-1] <= 2.0 * (final + 2 / steps) + 1e-9


def test_preview_marks_what_is_learnt(trained: Path, conversations_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(trained), "--data", str(conversations_file), "--preview", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    learnt = "".join(eval(line.split("[", 1)[1][:-1]) for line in lines if line.endswith("]"))
    assert learnt == "over the reef 0<｜end▁of▁sentence｜>"
    assert any("<｜User｜>" in line and not line.endswith("]") for line in lines)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "nothing to learn"),
        (["--data", "nowhere.jsonl"], "does not exist"),
        (["--data", "DATA", "--max-length", "2"], "no conversation fits"),
        (["--data", "DATA", "--esft-share", "0.5", "--lora-rank", "2"], "contradict"),
        (["--data", "DATA", "--esft-share", "0.5", "--weight-decay", "0.1"], "leaves most experts"),
        (["--data", "DATA", "--chat-template", "nowhere.jinja"], "no chat template"),
        (["--data", "DATA", "--lora-rank", "100000"], "more than the width of the model"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], says: str, trained: Path, conversations_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(conversations_file) if arg == "DATA" else arg for arg in more]
    assert main(["sft", str(trained), *args]) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1]


def test_a_tuned_model_keeps_its_templates_unless_it_is_given_one() -> None:
    own = Tokenizer("{}", {}, "D", {"tool_use": "T"})
    assert with_chat_template(own, None).template(tools=True) == "T"
    assert with_chat_template(own, "r1").template(tools=True) == with_chat_template(own, "r1").template(tools=False) != "D"


def made_up_texts() -> list[Text]:
    """Of different lengths, of which different parts are learnt."""
    draw = np.random.default_rng(0)
    return [Text(draw.integers(0, 64, 5 + i), draw.random(5 + i) < 0.2 + 0.1 * (i % 6)) for i in range(20)]


def test_what_is_held_out_is_not_trained_on() -> None:
    texts = made_up_texts()
    training, held_out = split(texts, SFTCommand("m", val_fraction=0.25))
    assert (len(training), len(held_out)) == (15, 5)
    assert {id(text) for text in training + held_out} == {id(text) for text in texts}


def test_the_held_out_loss_is_the_mean_over_learnt_tokens() -> None:
    model, texts = make_model("v3"), made_up_texts()
    nats: list[float] = []
    for text in texts:
        ids = torch.from_numpy(text.ids)
        with torch.no_grad():
            logprobs = model.logits(model(ids[None, :-1]).hidden)[0].log_softmax(-1)
        nats += [-float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids)) if text.learnt[i]]
    command = SFTCommand("m", tune=TuneOptions(micro_tokens=64))
    found = held_out_loss(model, Machine(torch.device("cpu"), "fp32", 1, 1.0, ""), texts, command)
    assert found == pytest.approx(np.mean(nats), rel=1e-5)
