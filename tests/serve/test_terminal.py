"""`shoal chat` with its input from a pipe."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main
from shoal.config import UserError
from shoal.data import Tokenizer
from shoal.data.chat_template import encode_chat, render_chat
from shoal.formats.checkpoints import complete_checkpoints
from shoal.serve.terminal import HELP

Say = Callable[..., str]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a chat with these bytes as standard input; what it printed."""

    def run(model: Path, text: bytes, *more: str) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        assert main(["chat", str(model), "--threads", "1", "--precision", "fp32", "--max-tokens", "6", "--temperature", "0", *more]) == 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err

    return run


@pytest.fixture
def chat_model(trained: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "chat"
    shutil.copytree(complete_checkpoints(trained)[-1], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_base_model_continues_each_line_by_itself(trained: Path, say: Say) -> None:
    once = say(trained, b"the red\n").split("> ")[1]
    answers = say(trained, b"the red\n\nthe red\n/reset\nthe red").split("> ")
    assert answers[1] == answers[3] == answers[5]
    assert once.strip() == answers[1].strip() != ""


def test_quit_and_end_of_input_leave(trained: Path, say: Say) -> None:
    assert say(trained, b"").count("> ") == 1
    assert say(trained, b"/quit\nthe red\n").count("> ") == 1
    assert HELP in say(trained, b"/what\n").split("> ")[1]


def test_bad_bytes_and_overlong_lines_do_not_end_the_conversation(trained: Path, say: Say) -> None:
    out = say(trained, b"\xff\xfe red\n" + b"red " * 300 + b"\nthe red\n")
    assert "/reset starts over" in out
    assert out.count("> ") == 4


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model was given to read."""
    written: list[str] = []

    def note(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
        written.append(render_chat(tokenizer, messages))
        return encode_chat(tokenizer, messages)

    monkeypatch.setattr("shoal.serve.terminal.encode_chat", note)
    return written


def test_a_chat_model_hears_the_whole_conversation_until_reset(chat_model: Path, say: Say, prompts: list[str]) -> None:
    say(chat_model, "red é\nblue\n/reset\ngreen\n".encode(), "--system", "Be kind.")
    bos = "<｜begin▁of▁sentence｜>[system]Be kind."
    assert prompts[0] == f"{bos}[user]red é[assistant]"
    assert prompts[1].startswith(f"{bos}[user]red é[assistant]")
    assert prompts[1].endswith("[user]blue[assistant]")
    assert prompts[2] == f"{bos}[user]green[assistant]"


def test_long_texts_and_commands(chat_model: Path, say: Say, prompts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    typed = f'one \\\ntwo\n"""three\n/four\n"""\n/reset\n/system Be brief.\nfive\n/save {file}\n/save\n/save {tmp_path}\n/stats\n'
    out = say(chat_model, typed.encode(), "--max-tokens", "1")
    assert "[user]one \ntwo[assistant]" in prompts[0]
    assert prompts[1].endswith("[user]three\n/four[assistant]")
    assert "[system]Be brief." in prompts[2]
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert prompts[2].endswith("".join(f"[{m['role']}]{m['content']}" for m in saved[:-1]) + "[assistant]")
    assert "/save needs" in out
    assert "cannot write" in out
    assert "tokens/s" in out


def test_a_text_may_begin_with_a_path(chat_model: Path, say: Say, prompts: list[str]) -> None:
    out = say(chat_model, b"/home/me/x.py explain this\n/home/me/x.py\n/what is this\n/what\n")
    assert [prompt.rpartition("[user]")[2] for prompt in prompts] == [
        f"{text}[assistant]" for text in ("/home/me/x.py explain this", "/home/me/x.py", "/what is this")
    ]
    assert out.count(HELP) == 2


def test_a_base_model_has_no_system_prompt_to_set(trained: Path, say: Say) -> None:
    assert "base model" in say(trained, b"/system Be kind.\n")


def test_thoughts_stand_apart(chat_model: Path, say: Say) -> None:
    (chat_model / "chat_template.jinja").write_text(TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}")
    assert "<think>\n" in say(chat_model, b"red\n").split("> ", 1)[1]


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{{ nothing('%Y') }}"])
def test_a_template_that_fails_is_one_clear_error(chat_model: Path, template: str) -> None:
    (chat_model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="template"):
        render_chat(Tokenizer.load(chat_model), [{"role": "user", "content": "red"}])


def test_a_template_cannot_reach_into_python(chat_model: Path) -> None:
    (chat_model / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="template"):
        render_chat(Tokenizer.load(chat_model), [])
