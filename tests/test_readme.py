"""The commands of the README work as written, on a small run in place of the demo."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.config import UserError
from shoal.formats.export import chat_template
from shoal.formats.locate import locate_model

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip()]
SHOAL = [command[1:] for command in COMMANDS if command[0] == "shoal"]


@pytest.fixture
def folder(tmp_path: Path, trained: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the models and data of the README exist."""
    shutil.copytree(trained, tmp_path / "runs" / "demo")
    shutil.copytree(trained, tmp_path / "runs" / "chat")
    (locate_model(tmp_path / "runs" / "chat") / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    shutil.copy(workshop / "text.txt", tmp_path / "PATH")
    for name, row in ROWS.items():
        lines = [json.dumps(row).replace("red?", f"red {i}?") for i in range(4)]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def f(\n/quit\n")))
    return tmp_path


ROWS = {
    "CHATS.jsonl": {"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "fish"}]},
    "PAIRS.jsonl": {"prompt": "red?", "chosen": "fish", "rejected": "reef"},
    "PROBLEMS.jsonl": {"prompt": "red?", "answer": "fish"},
}
FEW = {
    "sft": ["--overwrite", "--steps", "1"],
    "dpo": ["--steps", "1"],
    "grpo": ["--steps", "1", "--prompts", "2", "--group", "2", "--max-tokens", "4", "--eval-problems", "1"],
    "eval": ["--problems", "2", "--max-tokens", "8"],
}
"""What keeps a command of the README short."""


def small(command: list[str], recipe: Path, cache: Path) -> list[str]:
    """A training command of the README at the size of a test: same options, a tiny model, a few steps."""
    if command[0] in FEW and (command[0] != "eval" or "--tasks" in command):
        return command + FEW[command[0]]
    if command[0] != "train" or "--resume" in command:
        return command
    if "--flops" in command:
        at = command.index("--flops") + 1
        return [*command[:at], "1e9", *command[at + 1 :], "--corpus.cache", str(cache)]
    if "--params" in command:
        return [*command, "--steps", "2", "--corpus.cache", str(cache)]
    sizes = {"--minutes": "0.02", "--steps": "2"}
    if "--minutes" in command:
        return [*(sizes.get(before, word) for before, word in zip(["", *command], command, strict=False)), "--corpus.cache", str(cache)]
    rest = command[2:] if command[1] == "demo" else command[1:]
    rest = [sizes.get(before, word) for before, word in zip(["", *rest], rest, strict=False)]
    if "--data" not in rest:
        rest += ["--data", "PATH"]
    return ["train", str(recipe), *rest, "--corpus.cache", str(cache)]


@pytest.mark.parametrize("command", [c for c in SHOAL if c[0] not in ("bench", "serve", "recipe")], ids=" ".join)
def test_command_works(command: list[str], folder: Path, workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(small(command, workshop / "recipe.toml", workshop / "cache")) == 0, capsys.readouterr().err


def test_benchmark_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark takes minutes: only its options are tried, up to where it would begin to measure."""
    benches = [command for command in SHOAL if command[0] == "bench"]
    assert benches
    started = []

    def begin(options: object) -> None:
        started.append(options)
        raise UserError("far enough")

    for name in {command[1] for command in benches}:
        monkeypatch.setattr(f"shoal.bench.{name}.run_bench", begin)
    assert all(main(command) == 2 for command in benches)
    assert len(started) == len(benches)


def test_server_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where it would begin to listen."""
    servers = [command for command in SHOAL if command[0] == "serve"]
    assert servers

    def refuse(command: object) -> None:
        raise UserError("far enough")

    monkeypatch.setattr("shoal.serve.command.listen", refuse)
    assert all(main(command) == 2 for command in servers)


def test_make_demo_trains(folder: Path, workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command of the Makefile, on other text and for a second."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^demo:.*\n\t\$\(BIN\)/(.*)$", makefile, re.MULTILINE)
    command = shlex.split(line)
    command[command.index("--minutes") + 1] = "0.02"
    more = ["--data", str(workshop / "text.txt"), "--corpus.cache", str(workshop / "cache"), "--model.vocab-size", "512"]
    assert main([*command[1:], *more]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "MTP 1" in printed.err + printed.out
    assert locate_model(folder / "runs" / "demo").exists()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {command[1] for command in COMMANDS if command[0] == "make"} <= targets
