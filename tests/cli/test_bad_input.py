"""Whatever is wrong: one line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import cli
from shoal.cli import main
from shoal.formats.checkpoints import complete_checkpoints

FAST = ["--threads", "1", "--precision", "fp32", "--device", "cpu"]
Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must fail; its message. `progress`: lines before it are allowed."""

    def run(*args: str, progress: bool = False) -> str:
        assert main(args) == 2
        captured = capsys.readouterr()
        *before, last = captured.err.splitlines()
        assert last.startswith("shoal: error: ")
        assert progress or not before
        assert "Traceback" not in captured.err
        assert "shoal: error: " not in "".join(before)
        return last.removeprefix("shoal: error: ")

    return run


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["trian"], "no verb 'trian'"),
        (["--verbose"], "no verb '--verbose'"),
        (["train", "--stepz", "3"], "--stepz"),
        (["train", "--model.hidden-sise", "3"], "hidden-sise"),
        (["train", "no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["train", "fulll"], "one of default, demo, or with a budget one of baseline, exportable, full"),
        (["train", "--steps", "3", "--minutes", "4"], "exactly one"),
        (["train", "--steps", "ten"], "--steps is 'ten': it must be a whole number"),
        (["train", "--optimizer.adam_betas", "0.9", "x"], "--optimizer.adam-betas is '0.9 x': it must be a number"),
        (["train", "--steps", "3", "4"], "'4' is one argument too many"),
        (["train", "--hidden", "3"], "there is no option --hidden (is it --model.hidden-size"),
        (["train", "--data"], "--data names nothing"),
        (["train", "--data", "--steps", "3"], "--data names nothing"),
        (["train", "demo", "--flops", "1e10"], "demo has its shape"),
        (["train", "--qat", "int4", "--steps", "3"], "by --start"),
        (["train", "--parallel.pipeline", "2", "--steps", "3"], "add --nproc 2"),
        (["plan", "deepseek-v2-lite", "--devices", "4"], "--devices needs a machine"),
        (["bench", "fp8", "--seeds", "0", "--picture", "losses.png"], "it needs --seeds 1 or more"),
        (["export", "model", "out.gguf"], "add --format gguf"),
        (["export", "model", "out", "--dtype", "q4_0"], "add --format gguf"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--precision", "fp4"], "fp4"),
        (["train", "--batch-size", "-4", "--steps", "3"], "batch_size"),
        (["train", "--threads", "-1"], "threads"),
        (["train", "--seed", "-1"], "seed"),
        (["train", "--model.hidden-size", "-64"], "model.hidden_size"),
        (["train", "--model.vocab-size", "-1"], "model.vocab_size"),
        (["train", "--optimizer.muon-lr", "nan"], "optimizer.muon_lr"),
        (["train", "--eval-tokens", "0"], "eval_tokens"),
        (["train", "default", "--resume", "--overwrite"], "contradict"),
        (["train", "--start", "model", "--steps", "3", "--model.hidden-size=64"], "--model.hidden-size has no say"),
        (["generate"], "MODEL"),
        (["generate", "no/such/model", "hi"], "does not exist"),
        (["generate", "model", "hi", "--temperature", "-1"], "--temperature"),
        (["generate", "model", "hi", "--temperature", "nan"], "--temperature"),
        (["generate", "model", "hi", "--temperature", "hot"], "hot"),
        (["generate", "model", "hi", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "model", "hi", "--seed", "123456789012345678901234567890"], "--seed"),
        (["generate", "model", "hi", "--top-p", "0"], "--top-p"),
        (["generate", "model", "hi", "--stop", ""], "--stop"),
        (["generate", "model", "hi", "--cache", "int3"], "int3"),
        (["generate", "model", "hi", "--draft-tokens", "0"], "--draft-tokens"),
        (["chat", "model", "--step-tokens", "0"], "--step-tokens"),
        (["generate", "model", "\udcff"], "UTF-8"),
        (["chat", "no/such/model"], "does not exist"),
        (["chat", "model", "--temperature", "-1"], "--temperature"),
        (["eval", "no/such/model"], "--data"),
        (["eval", "no/such/model", "--data", "x", "--max-tokens", "0"], "--max-tokens"),
        (["export", "no/such/model", "out"], "does not exist"),
        (["export", "model", "out", "--format", "onnx"], "onnx"),
        (["export", "model"], "OUT"),
        (["doctor", "--loud"], "--loud"),
        (["bench"], "name of a benchmark"),
        (["bench", "train", "--rounds", "0"], "--rounds is 0"),
        (["bench", "train", "--steps", "-1"], "--steps is -1"),
        (["bench", "everything"], "name of a benchmark"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(args: list[str], hint: str, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hint in refuse(*args)
    assert not names_in(tmp_path)


@pytest.mark.parametrize(("known", "missing"), [({}, "RANK"), ({"RANK": "1", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT")])
def test_one_of_many_processes_that_does_not_know_its_place(
    known: dict[str, str],
    missing: str,
    train_args: Callable[..., list[str]],
    refuse: Refuse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (known | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    assert f"one of 2 processes, but {missing} is not set" in refuse(*train_args(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_resume_where_there_is_nothing(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no run under runs/" in refuse("train", "--resume")
    assert "holds no run to resume" in refuse("train", "--resume", "--out", "here")
    assert not names_in(tmp_path)


# Training


@pytest.mark.parametrize("text", ["[model]\nhidden = 3", "steps = 'ten'", "steps", "[[model]]", "[optimizer]\nadam_betas = [0.9]"])
def test_a_recipe_with_a_mistake(text: str, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    assert "mine.toml" in refuse("train", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run"))
    assert names_in(tmp_path) == {"mine.toml"}


@pytest.mark.parametrize("kind", ["missing", "empty", "blank", "short", "binary", "column", "lone file"])
def test_data_that_cannot_be_trained_on(kind: str, refuse: Refuse, workshop: Path, tmp_path: Path) -> None:
    content: dict[str, tuple[str, bytes, str]] = {
        "missing": ("x.txt", b"", "does not exist"),
        "empty": ("x.txt", b"", "is empty"),
        "blank": ("x.txt", b"\n \n\n", ""),
        "short": ("x.txt", b"".join(b"A short text, number %d.\n\n" % i for i in range(200)), "one batch of 100 sequences"),
        "binary": ("x.txt", b"\xff\xfe\x00\x01" * 99, "not UTF-8"),
        "column": ("x.jsonl", b'{"content": "a"}\n{"content": "b"}\n', "no column 'text'"),
        "lone file": ("x.jsonl", b'{"text": "one document"}\n', "one document"),
    }
    name, data, hint = content[kind]
    if kind != "missing":
        (tmp_path / name).write_bytes(data)
    places = ["--data", str(tmp_path / name), "--out", str(tmp_path / "run"), "--corpus.cache", str(tmp_path / "cache")]
    recipe = [str(workshop / "recipe.toml"), "--batch-size", "100", "--sequence-length", "64"]
    assert hint in refuse("train", *recipe, *places, progress=True)
    assert not (tmp_path / "run").exists()
    assert not [path for path in names_in(tmp_path) if path.endswith("tmp")]


def test_places_that_cannot_be_written(refuse: Refuse, train_args: Any, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "choose another --out" in refuse(*train_args(out), progress=True)
    args = train_args(tmp_path / "run")
    args[args.index("--corpus.cache") + 1] = str(tmp_path / "file" / "cache")
    assert "corpus.cache" in refuse(*args, progress=True)
    for out in (tmp_path / "file", tmp_path / "file" / "export"):
        refuse("export", str(trained), str(out))
    assert names_in(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_vocabulary_too_small_for_the_bytes(refuse: Refuse, train_args: Any, tmp_path: Path) -> None:
    assert "vocab_size" in refuse(*train_args(tmp_path / "run", "--model.vocab-size", "100"), progress=True)
    assert not names_in(tmp_path)


# Models


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    shutil.copytree(complete_checkpoints(trained)[-1], tmp_path / "model")
    return tmp_path / "model"


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda model: os.truncate(model / "model.safetensors", 40000), "safetensors"),
    "garbage": (lambda model: (model / "model.safetensors").write_bytes(b"not weights"), "safetensors"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer"),
    "broken tokenizer": (lambda model: (model / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "not json": (lambda model: (model / "config.json").write_text("{"), "not valid JSON"),
    "other model": (lambda model: edit_config(model, model_type="mixtral"), "mixtral"),
    "other shape": (lambda model: edit_config(model, hidden_size=48), "shape"),
    "more layers": (lambda model: edit_config(model, num_hidden_layers=9), "lacks"),
    "unfinished": (lambda model: (model / "COMPLETE").unlink(), "not written to the end"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model(kind: str, refuse: Refuse, model: Path, workshop: Path, tmp_path: Path) -> None:
    damage, hint = DAMAGE[kind]
    damage(model)
    assert hint in refuse("generate", str(model), "the", *FAST)
    assert hint in refuse("export", str(model), str(tmp_path / "out"))
    assert hint in refuse("eval", str(model), "--data", str(workshop / "text.txt"), *FAST)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_resumed_from(refuse: Refuse, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for name in ("model.safetensors", "trainer.pt"):
        file = tmp_path / "run" / "checkpoints" / "step_0000012" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        refuse("train", "--resume", "--out", str(tmp_path / "run"), "--steps", "14", progress=True)
        file.write_bytes(whole)


def test_a_prompt_longer_than_the_context_and_none_at_all(
    refuse: Refuse, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "shorten it" in refuse("generate", str(model), "red " * 300, *FAST)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"red \xff"), encoding="utf-8"))
    assert "standard input is not valid UTF-8" in refuse("generate", str(model), "-", *FAST)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert "prompt is empty" in refuse("generate", str(model), "", *FAST)


@pytest.mark.parametrize("options", ["--window 0", "--window -1", "--window 65", "--overlap 32 --window 32", "--overlap -1"])
def test_windows_that_do_not_fit(options: str, refuse: Refuse, trained: Path, workshop: Path) -> None:
    option = options.split()[0]
    assert option in refuse("eval", str(trained), "--data", str(workshop / "text.txt"), *options.split(), *FAST)


def test_nothing_to_score(refuse: Refuse, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n\n")
    assert "no text" in refuse("eval", str(trained), "--data", str(tmp_path / "blank.txt"), *FAST)
    assert "does not exist" in refuse("eval", str(trained), "--data", str(tmp_path / "gone.txt"), *FAST)
    assert "--threads" in refuse("eval", str(trained), "--data", str(tmp_path / "blank.txt"), "--threads", "-2")


def test_a_missing_column_names_the_option_of_the_command(refuse: Refuse, trained: Path, train_args: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "red"}\n' * 2)
    assert "choose one by --corpus.text-column (shoal train)" in refuse(*train_args(tmp_path / "run", "--data", str(rows)), progress=True)
    assert "or --text-column (shoal eval, shoal quantize)" in refuse("eval", str(trained), "--data", str(rows), *FAST)


def test_a_system_prompt_for_a_base_model(refuse: Refuse, trained: Path) -> None:
    assert "--system" in refuse("chat", str(trained), "--system", "Be kind.", *FAST)


def test_an_export_never_replaces_what_is_not_one(refuse: Refuse, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "not an earlier export" in refuse("export", str(trained), str(out))
    assert names_in(tmp_path) == {"out", "out/thesis.tex"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_said_with_what_to_do(error: Exception, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: list[str]) -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "doctor", fail)
    message = refuse("doctor")
    assert message.startswith("out of memory (")
    assert "--micro-batch-size" in message


def test_other_mistakes_of_torch_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: list[str]) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setitem(cli.VERBS, "doctor", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["doctor"])
