"""The verbs on good input: what they print, and that the last line is JSON where that was asked for."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import __version__
from shoal.cli import VERBS, finish, main

FAST = ["--threads", "1", "--precision", "fp32", "--device", "cpu"]
ROOT = Path(shoal.__file__).parent


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_usage_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["help"]):
        assert main(args) == 0
        out = capsys.readouterr().out
        assert all(f"shoal {verb}" in out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shoal {__version__}\n"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("bench", "recipe")])
def test_every_verb_explains_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert f"usage: shoal {verb}" in out
    # What is said of an option is said of --x, so --no-x never stands alone.
    assert not re.search(r"│ --(?:[\w.]+\.)?no-", out)


@pytest.mark.parametrize("file", sorted([*(ROOT / "config").glob("*.py"), ROOT / "plan" / "options.py"]), ids=lambda file: str(file.stem))
def test_every_option_says_what_it_is_for(file: Path) -> None:
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    for node in classes:
        for field, behind in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            kind = ast.unparse(field.annotation)
            section = kind.endswith(("Config", "Assumptions")) or "name=''" in kind or "Suppress" in kind or kind == "Model"
            explained = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
            assert section or explained or field.target.id == "out", f"{node.name}.{field.target.id} has no help"


def test_bench_names_its_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "train" in capsys.readouterr().out


def test_figures_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    finish({"ratio": math.nan, "interval": (0.0, math.inf), "rows": [{"bpb": -math.inf, "é": 1}]}, as_json=True)
    line = capsys.readouterr().out
    assert json.loads(line) == {"ratio": None, "interval": [0.0, None], "rows": [{"bpb": None, "é": 1}]}
    assert "NaN" not in line


def test_recipe_names_its_demonstrations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--help"]) == 0
    assert "reasoning" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["recipe", "reasoning", "--help"])
    assert "--openness" in capsys.readouterr().out
    assert main(["recipe", "unknown"]) == 2


def test_train_ends_with_its_summary(train_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An option of the command line counts more than the recipe.
    assert main(train_args(tmp_path / "run", "--json", "--steps", "3", "--prompts", "the red", "fish", "--tensorboard")) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1, "nothing but the JSON object on stdout"
    summary = json.loads(out)
    assert summary["steps"] == 3
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [sample["prompt"] for sample in summary["samples"]] == ["the red", "fish"]
    assert all(sample["text"] for sample in summary["samples"])
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_train_tells_people_what_to_do_next(train_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train_args(tmp_path / "run", "--steps", "2", "--prompts", "the red")) == 0
    out = capsys.readouterr().out
    assert "held-out text:" in out
    assert "'the red' continues:" in out
    assert f"shoal chat {tmp_path / 'run'}" in out
    assert f"shoal export {tmp_path / 'run'} OUT" in out
    assert str(tmp_path / "run" / "report.html") in out


def test_what_to_do_next_can_be_done(train_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, prompt = tmp_path / "my run", 'it\'s "red"'
    assert main(train_args(run, "--steps", "2", "--prompts", prompt, "--model.value-embedding")) == 0
    out = capsys.readouterr().out
    assert shlex.split(out.split("continue: ")[1].splitlines()[0]) == ["shoal", "generate", str(run), prompt]
    assert "shoal export" not in out, "it would be refused"
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "only Shoal knows how to read this model (model.value_embedding is True)" in out


def test_a_missing_plot_library_costs_the_report_and_nothing_else(
    train_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(train_args(tmp_path / "run", "--steps", "2")) == 0
    captured = capsys.readouterr()
    assert "no report: " in captured.err
    assert "held-out text:" in captured.out
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_prompt_that_is_too_long_costs_its_sample_and_nothing_else(
    train_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_args(tmp_path / "run", "--json", "--steps", "2", "--prompts", "red " * 300, "fish")) == 0
    captured = capsys.readouterr()
    assert [sample["prompt"] for sample in json.loads(captured.out)["samples"]] == ["fish"]
    assert "no sample: " in captured.err
    assert (tmp_path / "run" / "report.html").exists()


def test_generate_streams_the_text_that_json_holds(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", str(trained), "the red", *FAST, "--max-tokens", "12", "--seed", "3"]
    assert main(args) == 0
    streamed = capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    result = last_line(capsys)
    assert streamed == f"the red{result['text']}\n"
    figures = {"text", "tokens", "prompt_tokens", "finish_reason", "tokens_per_second", "drafted_tokens", "acceptance"}
    assert result.keys() == figures
    assert 0 < result["tokens"] <= 12


def test_generate_is_the_same_for_the_same_seed_and_at_temperature_zero(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*more: str) -> str:
        assert main(["generate", str(trained), "the red", *FAST, "--max-tokens", "20", "--json", *more]) == 0
        return str(last_line(capsys)["text"])

    assert text("--seed", "3") == text("--seed", "3") != text("--seed", "4")
    assert text("--temperature", "0") == text("--temperature", "0", "--seed", "9")


def test_generate_reads_its_prompt_from_standard_input(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("été\n".encode()), encoding="ascii"))
    assert main(["generate", str(trained), "-", *FAST, "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("été\n")


def test_generate_writes_what_it_can_where_a_terminal_knows_few_characters(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["generate", str(trained), "été", *FAST, "--max-tokens", "3"]) == 0
    sys.stdout.flush()
    assert written.getvalue().startswith(b"?t?")


def test_a_run_a_checkpoint_and_its_parent_folder_are_one_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads((trained / "best.json").read_text())["step"]
    texts = set()
    for model in (trained, trained / "checkpoints", trained / "checkpoints" / f"step_{best:07d}"):
        assert main(["generate", str(model), "the red", *FAST, "--max-tokens", "9", "--temperature", "0", "--json"]) == 0
        texts.add(last_line(capsys)["text"])
    assert len(texts) == 1


def test_doctor_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["shoal"] == __version__
    assert result["threads"] >= 1
    assert result["matmul_flops"] > 0
    assert result["kernels"] in "\n".join(lines[:-1])
    assert set(result["packages"]) >= {"matplotlib", "pyarrow", "transformers"}


@pytest.fixture
def unread() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_output_into_a_closed_pipe_is_silent(trained: Path, unread: int) -> None:
    command = [sys.executable, "-m", "shoal", "generate", str(trained), "the", *FAST, "--max-tokens", "5"]
    result = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_run_whose_progress_nobody_reads_any_more_goes_on_to_its_end(train_args: Any, unread: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal", *train_args(tmp_path / "run", "--steps", "2")]
    assert subprocess.run(command, stdout=unread, stderr=unread, timeout=120).returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert subprocess.run(command, stdout=unread, stderr=unread, timeout=120).returncode == 2, "the folder is taken now"


def test_a_prompt_that_is_too_long_is_not_written_first(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(trained), "the red fish " * 2000, *FAST]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "shorten it" in captured.err
