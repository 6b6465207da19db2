"""A run from its settings to its folder."""

from __future__ import annotations

import errno
import itertools
import json
import math
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.atomic import TEMPORARY
from shoal.cli import main
from shoal.config import CheckpointConfig, ModelConfig, TrainConfig, UserError
from shoal.config.recipes import load_recipe
from shoal.data import Batches, Tokenizer, open_corpus, prepare, train_tokenizer
from shoal.formats import checkpoints
from shoal.formats.checkpoints import checkpoint_step, complete_checkpoints
from shoal.formats.huggingface import load_model
from shoal.formats.locate import locate_model
from shoal.model import Transformer, init_weights
from shoal.plan.budget import training_flops_per_token
from shoal.plan.cost import optimizer_flops
from shoal.runtime import Machine, start
from shoal.train import Trained, find_run, passes, train, trainer
from shoal.train.likelihood import held_out
from shoal.train.state import Counters, TrainState

SUMMARY = {
    "val_bpb", "xz_bpb", "val_loss", "val_tokens", "val_bytes", "tokens", "steps", "skipped", "train_flops", "seconds",
    "counting_seconds", "counted_ngrams", "tokens_per_second", "peak_share", "max_vio", "params_total", "params_active", "params_mtp",
    "precision", "peak_memory", "samples",
}  # fmt: skip

Args = Callable[..., list[str]]


@pytest.fixture
def config(workshop: Path, tmp_path: Path) -> TrainConfig:
    """Settings of a run in `tmp_path / "run"`."""
    recipe = load_recipe(str(workshop / "recipe.toml"))
    corpus = replace(recipe.corpus, cache=str(workshop / "cache"))
    return replace(recipe, data=(str(workshop / "text.txt"),), out=str(tmp_path / "run"), corpus=corpus)


def rows_of(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps and of evaluations; strictly JSON, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "val_bpb" in row]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_of_a_finished_run(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()} - {".lock"}  # some versions of filelock remove it
    assert names == {"run.json", "config.toml", "metrics.jsonl", "best.json", "checkpoints", "summary.json", "report", "report.html"}
    steps, evaluations = rows_of(trained)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in evaluations] == [4, 8, 12]
    assert [checkpoint_step(path) for path in complete_checkpoints(trained)] == [8, 12]
    config = load_recipe(str(trained / "config.toml"))
    assert config.model.vocab_size == load_model(complete_checkpoints(trained)[-1]).config.vocab_size
    best = json.loads((trained / "best.json").read_text())
    assert best == {"step": min(evaluations, key=lambda row: row["val_bpb"])["step"], "val_bpb": min(row["val_bpb"] for row in evaluations)}


def test_a_run_means_its_best_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr("shoal.train.trainer.evaluate", lambda *_: next(scores))
    run = train(replace(config, steps=12, checkpoint=replace(config.checkpoint, every_steps=3, keep_last=1))).folder
    assert json.loads((run / "best.json").read_text()) == {"step": 6, "val_bpb": 1.0}
    assert checkpoint_step(locate_model(run)) == 6


def test_a_run_says_what_it_reads(config: TrainConfig, workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, steps=1))
    assert capsys.readouterr().err.startswith(f"reading {workshop.name}: text.txt with its end held out for validation\n")


def test_a_run_that_has_diverged_is_an_error(train_args: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["--optimizer.muon-lr", "1e38", "--optimizer.embed-lr", "1e38", "--optimizer.clip", "0"]
    assert main(train_args(tmp_path / "wild", "--steps", "12", *wild)) == 2
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]


def test_the_summary_agrees_with_the_rows(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    steps, _ = rows_of(trained)
    assert (summary["tokens"], summary["steps"], summary["skipped"]) == (12 * 4 * 32, 12, 0)
    assert summary["train_flops"] == steps[-1]["flops"]
    assert summary["val_loss"] / summary["val_bpb"] == pytest.approx(0.6931472 * summary["val_bytes"] / summary["val_tokens"])
    assert 0 < summary["xz_bpb"] < 8
    assert summary["params_total"] > summary["params_active"]
    assert summary["max_vio"] == steps[-1]["max_vio"], "of the last tenth"
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5, "it learns"


def test_a_row_holds_the_figures_of_its_step(trained: Path) -> None:
    steps, _ = rows_of(trained)
    for before, row in pairwise(steps):
        assert row["tokens"] - before["tokens"] == 4 * 32
        assert row["flops"] > before["flops"]
        assert row["seconds"] >= before["seconds"]
    for row in steps:
        assert len(row["max_vio_layers"]) == len(row["entropy_layers"]) == 2, "one MoE layer, and that of the MTP module"
        assert row["max_vio"] == pytest.approx(sum(row["max_vio_layers"]) / 2)
        assert ("expert_load" in row) == (row["step"] % 10 == 1)
        assert row["mtp_loss"] > 0
        assert row["peak_share"] == pytest.approx(steps[0]["peak_share"] * row["tflops"] / steps[0]["tflops"])
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in steps[0]["expert_load"])


def test_speed_and_bits_per_byte_are_worked_out_from_the_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: 2.0 * next(ticks)))  # a step is from one look to the next
    monkeypatch.setattr(trainer, "start", lambda *asked: replace(start(*asked), peak_flops=1e9))
    config = replace(config, steps=2, eval_tokens=16, corpus=replace(config.corpus, val_fraction=0.3))
    result = train(config)
    steps, _ = rows_of(result.folder)
    resolved = load_recipe(str(result.folder / "config.toml"))
    flops = training_flops_per_token(resolved).total * 128 + optimizer_flops(resolved.model, resolved.optimizer)
    data = prepare(open_corpus(config.data, config.corpus), None, config.model.vocab_size, config.corpus, progress=False)
    for row in steps:
        assert row["bpb"] == pytest.approx(row["loss"] / math.log(2) * data.train.num_tokens / data.train.num_bytes)
        assert (row["flops"], row["tokens_per_second"]) == (pytest.approx(row["step"] * flops), 64)
        assert (row["tflops"], row["peak_share"]) == (pytest.approx(flops / 2e12), pytest.approx(flops / 2e9))
    assert (result.summary["tokens_per_second"], result.summary["peak_share"]) == (64, pytest.approx(flops / 2e9))
    asked = held_out(data, 64 * 16)
    assert 1 == len(held_out(data, 16)) < len(asked)
    assert result.summary["val_bytes"] == sum(size for _, size in asked)


def test_saving_and_evaluating_are_due_by_the_minute() -> None:
    due = replace(TrainConfig(eval_every_minutes=3), checkpoint=CheckpointConfig(every_minutes=2))
    for seconds, save, evaluation in ((129, False, False), (131, True, False), (189, True, False), (191, True, True)):
        at = Counters(step=1, seconds=seconds, last_save=10, last_eval=10)
        state: Any = SimpleNamespace(config=due, counters=at, _saving_took=1)
        assert (TrainState.save_is_due(state), TrainState.evaluation_is_due(state)) == (save, evaluation)


def test_what_takes_long_to_save_is_saved_seldom() -> None:
    at = Counters(step=1, seconds=200, last_save=10)
    state: Any = SimpleNamespace(config=TrainConfig(checkpoint=CheckpointConfig(every_minutes=2)), counters=at, _saving_took=8.0)
    assert not TrainState.save_is_due(state)
    at.seconds = 211
    assert TrainState.save_is_due(state)


def test_the_same_seed_gives_the_same_losses(config: TrainConfig, tmp_path: Path, trained: Path) -> None:
    train(replace(config, steps=12, checkpoint=replace(config.checkpoint, every_steps=0)))
    assert [row["loss"] for row in rows_of(tmp_path / "run")[0]] == [row["loss"] for row in rows_of(trained)[0]]


@pytest.mark.parametrize("kept", ["weights", "batches"])
def test_another_seed_gives_other_weights_and_other_batches(
    config: TrainConfig, trained: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept == "weights":
        monkeypatch.setattr("shoal.train.state.init_weights", lambda model, _: init_weights(model, 0))
    else:
        monkeypatch.setattr(trainer, "Batches", lambda text, length, rows, _, **place: Batches(text, length, rows, 0, **place))
    other = train(replace(config, steps=1, seed=1))
    assert rows_of(other.folder)[0][0]["loss"] != rows_of(trained)[0][0]["loss"]


def test_micro_batches_change_the_memory_and_not_the_learning(config: TrainConfig, trained: Path) -> None:
    train(replace(config, micro_batch_size=2))
    whole, parts = rows_of(trained)[0], rows_of(Path(str(config.out)))[0]
    assert [row["loss"] for row in parts][:4] == pytest.approx([row["loss"] for row in whole][:4], rel=1e-4)
    assert [row["grad_norm"] for row in parts][:4] == pytest.approx([row["grad_norm"] for row in whole][:4], rel=1e-3)
    assert parts[0]["expert_load"] == whole[0]["expert_load"]


@pytest.mark.parametrize("kind", ["llama", "adamw", "tied", "dense"])
def test_other_models_and_optimizers_learn_too(config: TrainConfig, kind: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "llama": {"model_type": "llama", "num_nextn_predict_layers": 0, "num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0},
        "dense": {"n_routed_experts": None},
        "adamw": {},
    }
    optimizer = replace(config.optimizer, name="adamw" if kind == "adamw" else "muon")
    result = train(replace(config, steps=8, model=replace(config.model, **changes[kind]), optimizer=optimizer))
    steps, _ = rows_of(result.folder)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert ("max_vio" in steps[0]) == (kind in ("adamw", "tied"))
    assert (result.summary["max_vio"] is None) == (kind in ("llama", "dense"))
    # What was written is read back as the same model, dense ones included.
    models = Transformer(load_recipe(str(result.folder / "config.toml")).model), load_model(complete_checkpoints(result.folder)[-1])
    written, saved = ({name: tensor.shape for name, tensor in model.state_dict().items()} for model in models)
    assert written == saved


def test_a_tokenizer_given_from_outside_decides_size_and_special_ids(config: TrainConfig, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["red fish, blue fish"], 300)
    # Its texts begin and end with other tokens than those of the tokenizers trained here.
    tokenizer.config |= {"bos_token": "<think>", "eos_token": "</think>"}
    tokenizer.save(tmp_path / "tokenizer")
    result = train(replace(config, steps=2, corpus=replace(config.corpus, tokenizer=str(tmp_path / "tokenizer"))))
    saved = load_model(complete_checkpoints(result.folder)[-1]).config
    assert (saved.bos_token_id, saved.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id) == (5, 6)
    assert saved.vocab_size % 64 == 0
    assert 0 <= saved.vocab_size - tokenizer.vocab_size < 64
    assert Tokenizer.load(complete_checkpoints(result.folder)[-1]).fingerprint == tokenizer.fingerprint


def test_a_time_budget_ends_with_the_step_that_spends_it(config: TrainConfig) -> None:
    result = train(replace(config, steps=None, minutes=0.01))
    steps, _ = rows_of(result.folder)
    assert result.summary["seconds"] >= 0.6, "a checkpoint may be what spends the rest"
    assert all(row["seconds"] <= 0.6 for row in steps[:-1])
    assert steps[-1]["lr"] < 1


# Steps that cannot be applied


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], list[list[torch.Tensor]]]:
    """Makes the loss of some steps NaN; gives the list of the weights that each step began with."""

    def prepare(steps: set[int]) -> list[list[torch.Tensor]]:
        seen: list[list[torch.Tensor]] = []

        def compute(model: Any, *args: Any) -> Any:
            seen.append([tensor.detach().clone() for tensor in model.state_dict().values()])
            losses = original(model, *args)
            if len(seen) in steps:
                losses.total = losses.total * float("nan")
                losses.main = losses.main * float("nan")
                for stats in losses.routing:
                    stats.entropy = stats.entropy * float("nan")
            return losses

        original = passes.compute_losses
        monkeypatch.setattr(passes, "compute_losses", compute)
        return seen

    return prepare


def test_a_step_without_a_finite_loss_is_counted_and_not_applied(config: TrainConfig, poison: Any) -> None:
    seen = poison({3, 6})
    result = train(replace(config, steps=7))
    for step, moved in ((2, True), (3, False), (4, True), (6, False)):
        same = [torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True)]
        assert all(same) is not moved, f"step {step}"
    steps, _ = rows_of(result.folder)
    assert [row["skipped"] for row in steps] == [0, 0, 1, 1, 1, 2, 2]
    assert [row["loss"] is None for row in steps] == [False, False, True, False, False, True, False]
    assert result.summary["skipped"] == 2
    assert (result.folder / "summary.json").exists()


def test_twenty_such_steps_in_a_row_end_the_run(config: TrainConfig, poison: Any) -> None:
    poison(set(range(6, 100)))
    with pytest.raises(UserError, match="no finite loss for 20 steps in a row"):
        train(replace(config, steps=100))
    steps, _ = rows_of(Path(str(config.out)))
    assert steps[-1]["step"] == 5 + 20
    assert [checkpoint_step(path) for path in complete_checkpoints(Path(str(config.out)))][-1] <= 24


# Folders that are there already


def test_a_new_run_does_not_touch_an_earlier_one(train_args: Args, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(trained)
    assert main(train_args(trained)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files_of(trained) == before


def test_a_folder_with_something_else_in_it_is_refused_even_with_overwrite(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not the folder of a run"):
        train(replace(config, overwrite=True))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_overwrite_starts_from_nothing(config: TrainConfig) -> None:
    train(replace(config, steps=5))
    result = train(replace(config, steps=3, overwrite=True))
    assert [row["step"] for row in rows_of(result.folder)[0]] == [1, 2, 3]
    assert [checkpoint_step(path) for path in complete_checkpoints(result.folder)] == [3]
    assert [path.name for path in result.folder.parent.iterdir()] == ["run"]


def test_processes_that_are_started_again_go_on_with_no_run_but_their_own(
    config: TrainConfig, stopped_after: Callable[[int], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(replace(config, steps=4)).folder
    earlier, store = files_of(run), torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():  # the first attempt died before it came to training
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="already holds a run: --resume goes on with it"):
        train(config)
    assert files_of(run) == earlier
    with stopped_after(5):
        train(replace(config, overwrite=True))
    stopped, _ = rows_of(run)
    train(replace(config, overwrite=True))
    steps, _ = rows_of(run)
    assert steps[:5] == stopped, "their times are those of before"
    assert [row["step"] for row in steps] == list(range(1, 13))


def test_a_run_that_goes_on_is_neither_resumed_nor_discarded_by_another(config: TrainConfig) -> None:
    folder = train(replace(config, steps=3)).folder
    before = files_of(folder)
    program = """
import sys
from shoal.train.run_folder import find_run
with find_run(sys.argv[1]).held():
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for again in (replace(config, steps=5, resume=True), replace(config, steps=3, overwrite=True)):
            with pytest.raises(UserError, match="another process is training"):
                train(again)
        assert files_of(folder).items() >= before.items()
        other.kill()  # what a killed process held is free
    assert train(replace(config, steps=5, resume=True)).summary["steps"] == 5


@pytest.mark.parametrize("inside", ["", "checkpoints/step_0000003"])
def test_the_model_to_start_from_is_not_overwritten(config: TrainConfig, inside: str) -> None:
    first = train(replace(config, steps=3)).folder
    before = files_of(first)
    with pytest.raises(UserError, match="choose another --out"):
        train(replace(config, steps=3, start=str(first / inside), overwrite=True))
    assert files_of(first) == before


def test_a_start_needs_nothing_of_the_recipes_shape(config: TrainConfig, tmp_path: Path) -> None:
    """Weights that are there are not initialised, so it does not matter that a recipe's way to do so is not for this model."""
    first = train(replace(config, steps=2)).folder
    other = load_recipe("default")
    second = train(replace(config, steps=1, start=str(first), out=str(tmp_path / "second"), model=other.model))
    assert second.summary["steps"] == 1


def test_prediction_modules_that_files_announce_without_holding_them_are_left_out(config: TrainConfig, tmp_path: Path) -> None:
    """As transformers saves a DeepSeek-V3."""
    first = complete_checkpoints(train(replace(config, steps=1, model=replace(config.model, num_nextn_predict_layers=0))).folder)[-1]
    said = json.loads((first / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (first / "config.json").write_text(json.dumps(said))
    with pytest.warns(UserWarning, match="announces multi-token prediction"):
        second = train(replace(config, steps=1, start=str(first), out=str(tmp_path / "second")))
    assert second.summary["params_mtp"] == 0
    assert find_run(str(second.folder)).settings().model.num_nextn_predict_layers == 0


def test_a_run_that_goes_on_does_not_need_the_model_it_started_from(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = train(replace(config, steps=2)).folder
    started = replace(config, steps=2, start=str(source), out=str(tmp_path / "second"), model=load_recipe("default").model)
    train(started)
    shutil.rmtree(source)
    assert main(["train", "--resume", "--out", str(tmp_path / "second"), "--steps", "3"]) == 0, capsys.readouterr().err
    assert train(replace(started, steps=4, resume=True)).summary["steps"] == 4
    with pytest.raises(UserError, match=r"other settings \(start\)"):
        train(replace(started, steps=5, resume=True, start=str(tmp_path / "other")))


def test_what_the_model_to_start_from_says_of_sampling_stays(config: TrainConfig, tmp_path: Path) -> None:
    first = complete_checkpoints(train(replace(config, steps=1)).folder)[-1]
    said = json.loads((first / "generation_config.json").read_text()) | {"temperature": 0.6}
    (first / "generation_config.json").write_text(json.dumps(said))
    again = replace(config, start=str(first), out=str(tmp_path / "second"))
    for steps, resume in ((1, False), (2, True)):
        found = complete_checkpoints(train(replace(again, steps=steps, resume=resume)).folder)[-1]
        assert json.loads((found / "generation_config.json").read_text()) == said


def counted_model(config: TrainConfig) -> ModelConfig:
    return replace(config.model, count_order=2, num_nextn_predict_layers=0, logit_softcap=None)


def test_too_little_to_count_is_told_of_the_whole_text(config: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"4096 sequences of 32 from each of 2 parts needs 262146"):
        train(replace(config, batch_size=4096, model=counted_model(config)))


def test_counting_that_takes_all_the_time_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = replace(config, steps=None, minutes=1.0, model=counted_model(config))
    ticks = itertools.count()
    monkeypatch.setattr("shoal.train.counting.time.perf_counter", lambda: 61.0 * next(ticks))
    with pytest.raises(UserError, match=r"counting n-grams took 61 s, all of --minutes 1: .* shoal train default"):
        train(counted)
    assert not Path(config.out or "").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
def test_a_full_disk_is_one_line(
    train_args: Args, trained: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may not become as large as this one is: all that can be had of a full disk without being root."""
    size = next(trained.rglob(file)).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
    try:
        assert main(train_args(tmp_path / "run")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert file in error
    assert error.endswith("check the path, its permissions and the free space")
    assert not complete_checkpoints(tmp_path / "run")


def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, failed = checkpoints.save_checkpoint, []

    def full(run: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step == 2:
            failed.append(step)
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
        return write(run, step, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_checkpoint", full)
    bpb = iter((1.0, 2.0))
    monkeypatch.setattr(trainer, "evaluate", lambda *args: next(bpb))
    assert train(replace(config, steps=4, checkpoint=replace(config.checkpoint, every_steps=2))).finished
    assert failed == [2]
    assert "model.safetensors'): the next save tries again" in capsys.readouterr().err
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path / "run")] == [4]
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 4


# Resuming


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--optimizer.muon-lr", "0.5"], "optimizer.muon_lr"),
        (["--model.num-hidden-layers", "3"], "model.num_hidden_layers"),
        (["--batch-size", "8"], "batch_size"),
        (["--seed", "5"], "seed"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    train_args: Args, trained: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    before = files_of(trained)
    assert main(train_args(trained, "--resume", *change)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("shoal: error: this run was started with other settings")
    assert named in error
    assert files_of(trained) == before


def test_other_data_is_refused_and_nothing_is_touched(config: TrainConfig, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(config.data[0], text)
    started = replace(config, data=(str(text),), steps=4)
    result = train(started)
    before = files_of(result.folder)
    text.write_text(text.read_text() + "\n\nOne more paragraph, at the end, with a fish.\n")
    with pytest.raises(UserError, match="the data has changed"):
        train(replace(started, resume=True, steps=6))
    assert files_of(result.folder) == before


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that may be changed."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_command_to_go_on_with_can_be_pasted(
    config: TrainConfig, stopped_after: Callable[[int], AbstractContextManager[None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "my run")
    with stopped_after(2):
        train(replace(config, out=out))
    [command] = re.findall("go on with: (.*)", capsys.readouterr().err)
    assert shlex.split(command) == ["shoal", "train", "--resume", "--out", out]


def test_resume_needs_nothing_but_the_folder(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--out", str(copy), "--steps", "15", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 15
    assert [row["step"] for row in rows_of(copy)[0]] == list(range(1, 16))
    assert load_recipe(str(copy / "config.toml")).steps == 15


@pytest.mark.parametrize(("place", "args"), [({"WORLD_SIZE": "2"}, []), ({}, ["--nproc", "2"])])
def test_processes_that_resume_a_run_leave_out_what_only_one_can_do(
    place: dict[str, str], args: list[str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((copy / "run.json").read_text())
    facts["requested"] |= {"memory_limit": "3G", "recompute": ["attention"], "offload": True, "micro_batch_size": 2}
    (copy / "run.json").write_text(json.dumps(facts))
    asked: list[TrainConfig] = []

    def take(config: TrainConfig, *_: object) -> Trained:
        asked.append(config)
        return Trained(copy, {}, finished=True, reports=False)

    monkeypatch.setattr("shoal.train.train", take)
    monkeypatch.setattr("shoal.cli._start_processes", take)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    for more in ([], ["--recompute", "swiglu"]):
        assert main(["train", "--resume", "--out", str(copy), *args, *more]) == 0
    assert [(run.memory_limit, run.recompute, run.offload) for run in asked] == [(None, (), False), (None, ("swiglu",), False)]
    assert {run.micro_batch_size for run in asked} == {2}


def test_a_run_of_an_earlier_version_goes_on_with_defaults_for_what_it_did_not_know(copy: Path) -> None:
    facts = json.loads((copy / "run.json").read_text())
    del facts["requested"]["schedule"]["extension"]
    (copy / "run.json").write_text(json.dumps(facts))
    assert train(replace(find_run(str(copy)).settings(), resume=True, steps=14)).summary["steps"] == 14


def test_resume_of_a_finished_run_sums_up_again(copy: Path, trained: Path) -> None:
    (copy / "summary.json").unlink()
    (copy / "best.json").unlink()
    train(replace(find_run(str(copy)).settings(), resume=True))
    first, again = (json.loads((run / "summary.json").read_text()) for run in (trained, copy))
    assert {key: again[key] for key in ("val_bpb", "tokens", "steps")} == {key: first[key] for key in ("val_bpb", "tokens", "steps")}
    assert json.loads((copy / "best.json").read_text()) == json.loads((trained / "best.json").read_text())


def test_resume_clears_what_a_killed_save_left(copy: Path) -> None:
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "step_0000012", checkpoints / f"step_0000099{TEMPORARY}")
    shutil.copytree(checkpoints / "step_0000012", checkpoints / "step_0000098")
    (checkpoints / "step_0000098" / "COMPLETE").unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1.0}\n{"step": 14, "lo')
    train(replace(find_run(str(copy)).settings(), resume=True))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_0000008", "step_0000012"]
    assert rows_of(copy)[0][-1]["step"] == 12


def test_resume_without_a_name_takes_the_newest_run_that_pretrains(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "chat").mkdir(parents=True)
    copy.rename(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "chat" / "run.json").write_text('{"requested": {}, "precision": "fp32"}')  # as fine-tuning writes it
    monkeypatch.chdir(tmp_path)
    # another kind of budget takes the place of the first
    assert main(["train", "--resume", "--tokens", str(13 * 128), "--json"]) == 0
    assert json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())["steps"] == 13


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "not json", '{"requested": {"no_setting": 1}, "data_fingerprint": "", "precision": "fp32"}']
)
def test_a_damaged_run_json_is_one_line(copy: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "run.json").write_text(content)
    assert main(["train", "--resume", "--out", str(copy)]) == 2
    assert capsys.readouterr().err.startswith("shoal: error: ")


def test_a_run_in_the_home_folder_is_written_found_and_kept(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --out=~/mine to us."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first = train(replace(config, out="~/mine", steps=1))
    assert first.folder == tmp_path / "mine"
    assert train(replace(config, out="~/mine", steps=2, resume=True)).folder == first.folder
    with pytest.raises(UserError, match="already holds a run"):
        train(replace(config, out="~/mine", steps=1))
    assert train(replace(config, out="~/mine", steps=1, overwrite=True)).folder == first.folder
    assert not (tmp_path / "~").exists()


def test_runs_without_a_name_get_one_from_the_data(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results: list[Trained] = [train(replace(config, out=None, steps=1)) for _ in range(2)]
    name = results[0].folder.name
    assert [result.folder for result in results] == [Path("runs") / name, Path("runs") / f"{name}-2"]


def test_moments_in_a_file_are_for_a_cpu(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Machine(torch.device("cuda"), "bf16", 1, 1e12, "")
    monkeypatch.setattr(trainer, "start", lambda *args: gpu)
    with pytest.raises(UserError, match=r"--offload.*--device cpu"):
        train(replace(config, offload=True))
    assert not Path(config.out).exists()
