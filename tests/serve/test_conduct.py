"""How the server behaves towards everyone: limits, keys, hang-ups, shutting down."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from served import Serve, Served, serving, tiny

from shoal.config import EngineOptions, ServeCommand, UserError, serve_options
from shoal.data import Tokenizer
from shoal.data.chat_template import encode_chat
from shoal.engine import Loaded
from shoal.serve.blocks import Block
from shoal.serve.command import listen
from shoal.serve.dialect import Dialect
from shoal.serve.grammar_trial import Trial
from shoal.serve.messages import CountBody, _block, as_chat
from shoal.serve.sse import JSON

LONG = {"prompt": "the red", "max_tokens": 400, "ignore_eos": True}


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    """Status, content (JSON where it is some) and headers; `body` may be raw bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            status, raw, head = response.status, response.read(), {name.lower(): value for name, value in response.headers.items()}
    except urllib.error.HTTPError as error:
        status, raw, head = error.code, error.read(), {name.lower(): value for name, value in error.headers.items()}
    try:
        return status, json.loads(raw), head
    except ValueError:
        return status, raw.decode(errors="replace"), head


def start_request(served: Served, body: dict[str, Any]) -> socket.socket:
    """A POST whose answer is left unread."""
    address = served.url.removeprefix("http://").split(":")
    sock = socket.create_connection((address[0], int(address[1])))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def until(condition: Any, seconds: float = 5) -> bool:
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.005)
    return bool(condition())


def test_tokens_there_and_back(base: Served) -> None:
    status, found, _ = ask(f"{base.url}/tokenize", {"prompt": "the été 😀"})
    assert status == 200
    assert found["count"] == len(found["tokens"])
    _, text, _ = ask(f"{base.url}/detokenize", {"tokens": found["tokens"][1:]})
    assert text["prompt"] == "the été 😀"
    assert ask(f"{base.url}/detokenize", {"tokens": [-1]})[0] == 400
    assert ask(f"{base.url}/tokenize", {"messages": []})[0] == 400


def test_health_version_and_metrics(base: Served) -> None:
    assert ask(f"{base.url}/health")[:2] == (200, {"status": "ready"})
    assert set(ask(f"{base.url}/version")[1]) == {"version"}
    ask(f"{base.url}/v1/completions", {"prompt": "the", "max_tokens": 3})
    ask(f"{base.url}/nothing/here")
    text = ask(f"{base.url}/metrics")[1]
    for name in ("shoal_time_to_first_token_seconds_count", "shoal_generated_tokens_total", "shoal_mtp_acceptance", "shoal_cache_usage"):
        assert f"\n{name} " in text
    assert 'shoal_expert_tokens_total{expert="0",layer="0"}' in text
    assert 'shoal_requests_total{path="/v1/completions",status="200"}' in text
    assert "nothing" not in text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe\x00random",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "the", "temperature": NaN}',
        b'{"prompt": "the", "max_tokens": 1e400}',
        b'{"prompt": "the", "n": 9999999}',
        b'{"prompt": "the", "response_format": ' + b'{"type":"json_schema","schema":' * 300 + b"{}" + b"}" * 300 + b"}",
        b'{"prompt": "the", "guided_regex": "((((a*)*)*)*"}',
        b'"text"',
        b"null",
    ],
)
def test_nonsense_is_refused(base: Served, body: bytes) -> None:
    status, answer, _ = ask(f"{base.url}/v1/completions", body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]
    assert ask(f"{base.url}/v1/completions", {"prompt": "the", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_body_that_is_not_announced_as_json_is_told_so(base: Served, kind: str) -> None:
    status, answer, _ = ask(f"{base.url}/v1/completions", {"prompt": "the"}, {"Content-Type": kind})
    assert status == 415
    assert "Content-Type: application/json" in answer["error"]["message"]
    assert (
        ask(f"{base.url}/v1/completions", {"prompt": "the", "max_tokens": 1}, {"Content-Type": "application/json; charset=utf-8"})[0] == 200
    )


@pytest.mark.parametrize(("path", "field"), [("completions", "prompt"), ("chat/completions", "messages"), ("responses", "input")])
def test_what_is_too_long_is_named_by_its_field(chat: Served, path: str, field: str) -> None:
    text = "the red fish " * 600
    status, answer, _ = ask(f"{chat.url}/v1/{path}", {field: [{"role": "user", "content": text}] if field == "messages" else text})
    assert status == 400
    assert (answer["error"]["param"], answer["error"]["code"]) == (field, "context_length_exceeded")


@pytest.mark.parametrize("path", ["chat/completions", "messages"])
def test_more_messages_than_fit_into_any_context_are_not_looked_at(chat: Served, path: str) -> None:
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": ""}] * 200_000}
    began = time.perf_counter()
    status, answer, _ = ask(f"{chat.url}/v1/{path}", body)
    assert status == 400
    assert "10000" in answer["error"]["message"]
    assert time.perf_counter() - began < 10  # it had been 20 s and more


def test_unknown_paths_and_methods(base: Served) -> None:
    assert ask(f"{base.url}/v1/nothing")[1]["error"]["type"] == "not_found_error"
    assert ask(f"{base.url}/v1/completions")[0] == 405


def test_large_bodies_are_refused_whether_announced_or_not(serve: Serve) -> None:
    with serve(max_body_mb=0.01) as served:
        assert ask(f"{served.url}/v1/completions", {"prompt": "x" * 20_000})[0] == 413
        address = served.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as sock:
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            sock.sendall(b"4e20\r\n" + b"x" * 20_000 + b"\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_keys(serve: Serve) -> None:
    with serve(api_key=("first-key", "second-key")) as served:
        models = f"{served.url}/v1/models"
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic first-key"}, {"x-api-key": "first"}):
            status, body, head = ask(models, headers=headers)
            assert status == 401
            assert body["error"]["code"] == "invalid_api_key"
            assert head["www-authenticate"] == "Bearer"
        for headers in ({"Authorization": "Bearer first-key"}, {"authorization": "bearer second-key"}, {"x-api-key": "second-key"}):
            assert ask(models, headers=headers)[0] == 200
        assert ask(f"{served.url}/metrics")[0] == 401
        assert ask(f"{served.url}/health")[0] == 200
        assert ask(f"{served.url}/page/")[0] == 200


def test_other_sites_are_let_in_only_where_that_was_asked_for(serve: Serve, base: Served) -> None:
    site = {"Origin": "https://chat.example.com"}
    assert "access-control-allow-origin" not in ask(f"{base.url}/v1/models", headers=site)[2]
    with serve(cors_origin=("https://chat.example.com",), api_key=("first-key",)) as served:
        answer = ask(f"{served.url}/v1/models", headers=site | {"x-api-key": "first-key"})[2]
        assert answer["access-control-allow-origin"] == site["Origin"]
        other = ask(f"{served.url}/v1/models", headers={"Origin": "https://else.example", "x-api-key": "first-key"})[2]
        assert "access-control-allow-origin" not in other


def test_a_full_queue_turns_people_away_and_recovers(serve: Serve) -> None:
    with serve(engine=EngineOptions(max_running=1), max_waiting=1) as served:
        waiting = [start_request(served, LONG) for _ in range(2)]
        assert until(lambda: served.host.in_flight == 2)
        status, body, head = ask(f"{served.url}/v1/completions", LONG)
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        assert int(head["retry-after"]) >= 1
        for sock in waiting:
            sock.close()
        assert served.is_idle()
        assert ask(f"{served.url}/v1/completions", {"prompt": "the", "max_tokens": 1})[0] == 200


def test_who_stops_reading_keeps_no_place_and_no_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(command: ServeCommand) -> socket.socket:
        sock = listen(command)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr("served.listen", narrow)
    monkeypatch.setattr("shoal.serve.command.SEND_SECONDS", 4)
    many = LONG | {"stream": True, "logprobs": 20, "n": 8, "max_tokens": 40}
    with serve(engine=EngineOptions(max_running=8), max_waiting=0) as served, start_request(served, many):
        assert until(lambda: served.host.engine.stats().finished["length"] == 8, 20)
        assert ask(f"{served.url}/v1/completions", {"prompt": "the", "max_tokens": 1})[0] == 200
        if sys.platform == "linux":
            assert until(lambda: not served.server.server_state.connections, 20)


def test_hanging_up_ends_the_work(base: Served) -> None:
    for stream in (False, True):
        before = base.host.engine.stats().finished["abort"]
        sock = start_request(base, LONG | {"stream": stream})
        assert until(lambda: base.pages_in_use() > 0)
        sock.close()
        assert base.is_idle()
        assert base.host.engine.stats().finished["abort"] == before + 1


def test_loading_is_told(serve: Serve, tokenizer: Tokenizer) -> None:
    go = threading.Event()

    def slow() -> Loaded:
        go.wait(10)
        return tiny(tokenizer)

    with serving(slow, wait=False) as served:
        assert ask(f"{served.url}/health")[:2] == (503, {"status": "loading"})
        status, models, _ = ask(f"{served.url}/v1/models")
        assert (status, models["data"][0]["id"], models["data"][0]["shoal"]) == (200, "tiny", {"state": "loading"})
        status, body, head = ask(f"{served.url}/v1/completions", {"prompt": "the"})
        assert (status, body["error"]["code"]) == (503, "loading")
        assert "retry-after" in head
        go.set()
        assert until(lambda: ask(f"{served.url}/health")[0] == 200)


def test_draining_finishes_what_runs_and_takes_nothing_new(serve: Serve) -> None:
    with serve() as served:
        results: list[tuple[int, Any, Any]] = []
        thread = threading.Thread(target=lambda: results.append(ask(f"{served.url}/v1/completions", LONG | {"temperature": 0})))
        thread.start()
        assert until(lambda: served.pages_in_use() > 0)
        served.drain()
        assert until(lambda: ask(f"{served.url}/health")[0] == 503)
        status, body, _ = ask(f"{served.url}/v1/completions", {"prompt": "the"})
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        thread.join()
        assert results[0][0] == 200
        assert results[0][1]["usage"]["completion_tokens"] == 400


def test_after_the_time_of_grace_clients_are_told(serve: Serve) -> None:
    with serve(grace=0.05) as served:
        sock = start_request(served, LONG | {"stream": True})
        plain: list[tuple[int, Any, Any]] = []
        thread = threading.Thread(target=lambda: plain.append(ask(f"{served.url}/v1/completions", LONG)))
        thread.start()
        assert until(lambda: served.host.in_flight == 2 and served.pages_in_use() > 0)
        served.drain()
        received = b""
        while part := sock.recv(65536):
            received += part
            if b"[DONE]" in received:
                break
        assert b"shutting_down" in received
        thread.join()
        assert (plain[0][0], plain[0][1]["error"]["code"]) == (503, "shutting_down")


def test_a_grammar_that_takes_minutes_is_refused_and_stops_nobody(base: Served) -> None:
    endless = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "multipleOf": 999_983}}}
    told: list[tuple[int, Any, Any]] = []
    body = {"prompt": "the", "max_tokens": 1, "response_format": endless}
    thread = threading.Thread(target=lambda: told.append(ask(f"{base.url}/v1/completions", body)))
    thread.start()
    served = 0
    while thread.is_alive():
        assert ask(f"{base.url}/v1/completions", {"prompt": "the", "max_tokens": 2})[0] == 200
        served += 1
    assert served > 10
    status, answer, _ = told[0]
    assert (status, answer["error"]["param"]) == (400, "response_format")
    assert "too complex" in answer["error"]["message"]
    assert ask(f"{base.url}/v1/completions", {"prompt": "the", "max_tokens": 9, "guided_choice": ["yes"]})[1]["choices"][0]["text"] == "yes"


READS = ("v1/chat/completions", "v1/completions", "v1/embeddings", "v1/messages", "v1/messages/count_tokens", "v1/responses", "tokenize")


@pytest.mark.parametrize("path", READS)
def test_nobody_waits_while_a_text_is_read(chat: Served, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    reading, go, encode = threading.Event(), threading.Event(), Tokenizer.encode

    def slow(self: Tokenizer, *args: Any, **options: Any) -> list[int]:
        reading.set()
        assert go.wait(10)
        return encode(self, *args, **options)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    body: dict[str, Any] = {"max_tokens": 1, "max_output_tokens": 1, "input": "the"}
    body |= {"messages": [USER]} if "messages" in path or "chat" in path else {"prompt": "the"} if "responses" not in path else {}
    told: list[int] = []
    thread = threading.Thread(target=lambda: told.append(ask(f"{chat.url}/{path}", body)[0]))
    thread.start()
    assert reading.wait(10)
    assert ask(f"{chat.url}/health")[0] == 200
    assert thread.is_alive()
    go.set()
    thread.join(10)
    assert told == [200]


def test_an_embedding_takes_the_time_it_takes(base: Served) -> None:
    def seconds() -> float:
        text = ask(f"{base.url}/metrics")[1]
        return float(text.split("\nshoal_request_seconds_sum ")[1].split()[0])

    before, began = seconds(), time.perf_counter()
    assert ask(f"{base.url}/v1/embeddings", {"input": "the red"})[0] == 200
    assert 0 < seconds() - before < time.perf_counter() - began


def test_texts_of_one_request_are_read_together(base: Served) -> None:
    texts = [f"the red fish {i}" for i in range(64)]
    for path, body in (("embeddings", {"input": texts}), ("completions", {"prompt": texts, "max_tokens": 0, "echo": True, "logprobs": 0})):
        before = base.host.engine.stats().steps
        assert ask(f"{base.url}/v1/{path}", body)[0] == 200
        assert base.host.engine.stats().steps - before < 32


def test_every_prompt_is_logged_where_that_was_asked_for(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "shoal.serve")
    with serve(log_prompts=True, chat_template="v3.1") as served:
        ask(f"{served.url}/v1/completions", {"prompt": ["red one", "blue two"], "n": 2, "max_tokens": 1})
        ask(f"{served.url}/tokenize", {"prompt": "green three"})
        ask(f"{served.url}/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "white four"}]})
    said = [message for message in caplog.messages if message.startswith("prompt: ")]
    assert [sum(word in line for line in said) for word in ("red one", "blue two", "green three", "white four")] == [1, 1, 1, 1]


USER = {"role": "user", "content": "the"}
DEEP: Any = {"type": "object", "description": "<think>"}
for _ in range(300):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("chat/completions", {"messages": [USER, {"role": "function", "name": "f", "content": "42"}]}, "role"),
        ("chat/completions", {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]}, "tool_calls"),
        ("chat/completions", {"messages": [USER], "modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"messages": [USER], "prompt_logprobs": 1}, "prompt_logprobs"),
        ("chat/completions", {"messages": [USER], "stop": ["a"] * 17}, "16"),
        ("chat/completions", {"messages": [USER], "tools": [{"function": {"name": "f", "parameters": DEEP}}]}, "nested"),
        ("chat/completions", {"messages": [USER], "continue_final_message": True}, "assistant"),
        ("messages", {"messages": [USER], "max_tokens": 1, "stop_sequences": ["a"] * 17}, "16"),
        ("messages", {"messages": [USER], "max_tokens": 1, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ("messages", {"messages": [USER], "max_tokens": 1, "tool_choice": {"type": "any"}}, "no tools"),
        ("responses", {"input": "the", "tool_choice": "required"}, "no tools"),
        ("responses", {"input": "the", "conversation": "conv_1"}, "conversation"),
        ("responses", {"input": "the", "prompt": {"id": "pmpt_1"}}, "instructions"),
        ("responses", {"input": "the", "include": ["message.output_text.logprobs"], "top_logprobs": 3}, "log-probabilities"),
    ],
)
def test_what_would_change_the_answer_is_refused_in_a_line(chat: Served, path: str, body: dict[str, Any], says: str) -> None:
    status, answer, _ = ask(f"{chat.url}/v1/{path}", {"max_tokens": 1} | body)
    assert status == 400
    assert says in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


ASKS = [{"structured_outputs": {"json": {}}}, {"guided_grammar": 'root ::= "a"'}, {"web_search_options": {}}, {"allowed_token_ids": [5]}]
ASKS += [{"bad_words": ["a"]}, {"use_beam_search": True}, {"truncate_prompt_tokens": 1}, {"moderation": {}}]


@pytest.mark.parametrize("asked", ASKS, ids=str)
def test_fields_for_what_is_not_there_are_refused_by_name(chat: Served, asked: dict[str, Any]) -> None:
    body = {"messages": [USER], "prompt": "the", "max_tokens": 1}
    for path in ("chat/completions", "completions"):
        status, answer, _ = ask(f"{chat.url}/v1/{path}", body | asked)
        assert (status, [answer["error"]["param"]]) == (400, list(asked))
        assert ask(f"{chat.url}/v1/{path}", body | dict.fromkeys(asked, None) | {"bad_words": [], "use_beam_search": False})[0] == 200


def test_a_form_that_has_ended_comes_before_min_tokens(base: Served) -> None:
    body = {"prompt": "the", "max_tokens": 30, "min_tokens": 20, "guided_choice": ["yes", "no"]}
    status, answer, _ = ask(f"{base.url}/v1/completions", body)
    assert (status, answer["choices"][0]["text"] in ("yes", "no"), answer["choices"][0]["finish_reason"]) == (200, True, "stop")


def test_the_log_holds_nothing_of_a_tool(chat: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "shoal.serve")
    tool = {"name": "secret_tool", "parameters": {"type": "object", "properties": {"q": {"type": "string", "pattern": "(?=SECRET)x"}}}}
    body = {"messages": [USER], "max_tokens": 1, "tools": [{"type": "function", "function": tool}]}
    assert ask(f"{chat.url}/v1/chat/completions", body)[0] == 200
    assert "held to no schema" in caplog.text
    assert "secret" not in caplog.text.lower()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1.5", "7" * 5000])
def test_numbers_that_json_cannot_hold_are_not_written(chat: Served, number: str) -> None:
    def strict(name: str) -> None:
        raise AssertionError(name)

    block = JSON(_block(Block("tool", f'{{"a": {number}}}'))).body
    assert isinstance(json.loads(bytes(block), parse_constant=strict)["input"]["a"], float)
    if len(number) < 10:
        sent = f'{{"input": "the", "max_output_tokens": 1, "metadata": {{"a": {number}}}}}'.encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{chat.url}/v1/responses", sent, {"Content-Type": "application/json"}), timeout=30
        ) as answer:
            json.loads(answer.read(), parse_constant=strict)


def test_the_tools_of_an_agent_are_tried_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(Trial, "_ask", lambda self, grammar: tried.append(grammar) or "")
    trial = Trial(tokenizer, 400)

    async def twice() -> None:
        for i in [*range(100), *range(100)]:
            await trial.arguments({"title": str(i)}, False)

    asyncio.run(twice())
    trial.close()
    assert len(tried) == len(set(tried)) == 100


@pytest.mark.parametrize("text", ["<｜User｜>", "stop <｜end▁of▁sentence｜> here"])
def test_a_form_that_only_a_control_token_spells_is_one_clear_line(chat: Served, text: str) -> None:
    asked = {"prompt": "the", "max_tokens": 30, "guided_choice": [text]}
    status, answer, _ = ask(f"{chat.url}/v1/completions", asked)
    assert (status, "control token" in answer["error"]["message"]) == (400, True)


def test_a_turn_that_the_client_began_goes_on(chat: Served) -> None:
    """As Anthropic's clients do it: the last message is the beginning of the answer."""
    tokenizer = chat.host.tokenizer
    begun = {"messages": [USER, {"role": "assistant", "content": "The answer <｜User｜> is"}]}
    prompt = encode_chat(tokenizer, [USER]) + tokenizer.encode("The answer <｜User｜> is")
    assert Dialect(tokenizer).prompt(as_chat(CountBody(**begun))) == prompt
    assert ask(f"{chat.url}/v1/messages", begun | {"max_tokens": 2})[1]["usage"]["input_tokens"] == len(prompt)
    status, answer, _ = ask(f"{chat.url}/v1/messages", begun | {"max_tokens": 2, "thinking": {"type": "enabled"}})
    assert (status, "thought" in answer["error"]["message"]) == (400, True)


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst-key-12\r\n\r\n  # comment line\r\n second-key-12\r\n")
    assert serve_options("tiny", api_key_file=str(file)).keys() == ("first-key-12", "second-key-12")
    file.write_text("schlüssel-geheim\n", encoding="utf-8")
    with pytest.raises(UserError, match="ASCII"):
        serve_options("tiny", api_key_file=str(file)).keys()
    with pytest.raises(UserError, match=r"as https://chat\.example\.com$"):
        serve_options("tiny", cors_origin=("https://chat.example.com/",)).validate()
