"""Whatever bytes come in: a refusal, never a failure of the server, and it goes on serving."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from served import Serve, Served, process, write_model
from test_conduct import ask

from shoal.data import Tokenizer
from shoal.serve.messages import MessagesBody
from shoal.serve.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, Message, TokenizeBody
from shoal.serve.responses import ResponsesBody

POSTS = ("chat/completions", "completions", "embeddings", "messages", "messages/count_tokens", "responses")
PATHS = (*(f"/v1/{name}" for name in POSTS), "/tokenize", "/detokenize")
FIELDS = ("model", "messages", "prompt", "input", "max_tokens", "tools", "stop", "system", "tokens", "n", "logit_bias", "stream")
KEYS = st.sampled_from(["messages", "prompt", "input", "content", "role", "text"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=6,
)
BROKEN = {
    "deep list": b"[" * 90_000,
    "deep object": b'{"a":' * 15_000,
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a character": b'{"input": "\xc3"}',
    "half a surrogate pair": b'{"input": "\\ud800", "prompt": 1}',
    "huge": b"{" + b" " * 300_000,
}
PICTURE = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    with serve(chat_template="v3.1", max_body_mb=0.2) as running:
        yield running
        assert running.is_idle()


def refused(served: Served, path: str, body: bytes) -> None:
    status, answer, _ = ask(served.url + path, body)
    assert 400 <= status < 500, answer
    assert answer["error"]["message"]


def complaints(kind: type[Body], fields: dict[str, Any]) -> int:
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64).filter(lambda body: not body.strip().startswith((b"{", b"n", b"t", b"f"))))
def test_random_bytes(served: Served, path: str, body: bytes) -> None:
    refused(served, path, body)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_random_values_in_known_fields(served: Served, path: str, body: dict[str, Any]) -> None:
    status, answer, _ = ask(served.url + path, json.dumps({"max_tokens": 1, "max_output_tokens": 1} | body).encode())
    assert status < 500, answer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_bodies_that_break_parsers(served: Served, path: str, body: bytes) -> None:
    refused(served, path, body)


@pytest.mark.parametrize(
    "kind", [ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, Message, MessagesBody, ResponsesBody, TokenizeBody]
)
@pytest.mark.parametrize("wrong", [0, "x", [], {}, [0, "x"], {"role": "nobody"}], ids=str)
def test_of_many_wrong_values_few_are_told(kind: type[Body], wrong: Any) -> None:
    """Telling all of them once took seconds, in which nobody else was served, and gigabytes."""
    many = [wrong] * 1000
    for field in kind.model_fields:
        for value in (many, [0] * 1000 + many, [many], [{"content": many}], dict.fromkeys(map(str, range(1000)), wrong)):
            assert complaints(kind, {field: value}) < 20


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("messages", {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": 5}]}]}),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": ["a"]}},
        ),
        ("completions", {"prompt": "x", "guided_regex": "\ud800"}),
        ("completions", {"prompt": "x", "guided_choice": ["\ud800"]}),
    ],
)
def test_values_of_odd_types_within_known_fields(served: Served, path: str, body: dict[str, Any]) -> None:
    refused(served, f"/v1/{path}", json.dumps(body | {"max_tokens": 4}).encode())


@pytest.mark.parametrize(
    ("path", "field", "part"),
    [
        ("chat/completions", "messages", {"type": "image_url", "image_url": {"url": PICTURE}}),
        ("chat/completions", "messages", {"type": "image_url", "image_url": 7}),
        ("responses", "input", {"type": "input_image", "image_url": PICTURE}),
        ("messages", "messages", {"type": "image", "source": {"type": "base64", "data": "%"}}),
    ],
)
def test_pictures_are_refused_by_name(served: Served, path: str, field: str, part: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 1, field: [{"role": "user", "content": [part]}]}
    status, answer, _ = ask(f"{served.url}/v1/{path}", body)
    assert status == 400
    assert "image" in answer["error"]["message"]


@pytest.mark.parametrize(("path", "field", "status"), [("chat/completions", "messages", 200), ("responses", "input", 400)])
def test_only_in_chats_a_part_need_not_say_that_it_is_text(served: Served, path: str, field: str, status: int) -> None:
    body = {"model": "tiny", "max_tokens": 1, "max_output_tokens": 1, field: [{"role": "user", "content": [{"text": "the"}]}]}
    assert ask(f"{served.url}/v1/{path}", body)[0] == status


@pytest.mark.slow
def test_schemathesis_finds_no_failure_of_the_server(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", tokenizer, max_position_embeddings=256)
    with process(folder, "--chat-template", "v3.1") as (url, server):
        command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--max-examples", "60", "--continue-on-failure", "--request-timeout", "30", "--generation-deterministic"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
        assert result.returncode == 0, result.stdout
        assert ask(f"{url}/v1/completions", {"prompt": "the", "max_tokens": 1})[0] == 200
        server.terminate()
        assert server.wait(30) == 0
