"""Answers of a given form, from a model that speaks nonsense: what comes out fits only because it must."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest
from served import Serve, Served, serving, tiny

from shoal.data import Tokenizer
from shoal.serve.grammar import AnswerForm, Grammars

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]
ASK: list[Any] = [{"role": "user", "content": "the red fish"}]


@pytest.fixture(scope="module", params=["r1", "v3.1"])
def served(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve(chat_template=request.param, grace=1) as running:
        yield running
        assert running.is_idle()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def end_thought(served: Served) -> dict[str, Any]:
    """A bias that makes the nonsense model end its thought at once, where its template opens one."""
    assert served.host.tokenizer.chat_template is not None
    token = served.host.tokenizer.token_id("</think>")
    return {"logit_bias": {str(token): 30}, "presence_penalty": 2} if "<think>\\n" in served.host.tokenizer.chat_template else {}


def fits(arguments: str) -> None:
    value = json.loads(arguments)
    assert value["city"] in ("Paris", "Rome")
    assert 0 <= value["days"] <= 99


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tool_calls(client: openai.OpenAI, served: Served, choice: Any, stream: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300, "seed": 3}
    options |= {"parallel_tool_calls": False} | end_thought(served)
    if stream:
        calls: dict[int, list[str]] = {}
        finish = None
        for chunk in client.chat.completions.create(**options, stream=True):
            finish = chunk.choices[0].finish_reason or finish
            for part in chunk.choices[0].delta.tool_calls or ():
                assert part.function is not None
                known = calls.setdefault(part.index, [part.function.name or "", ""])
                known[1] += part.function.arguments or ""
        found = list(calls.values())
    else:
        answer = client.chat.completions.create(**options)
        finish = answer.choices[0].finish_reason
        found = [[call.function.name, call.function.arguments] for call in answer.choices[0].message.tool_calls or ()]  # type: ignore[union-attr]
    assert finish == "tool_calls"
    assert len(found) == 1
    name, arguments = found[0]
    if name == "get_weather":
        fits(arguments)
    else:
        assert choice == "required"
        assert json.loads(arguments) == {}


def test_a_named_function_is_called_once(client: openai.OpenAI, served: Served) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 400}
    for seed in range(4):
        answer = client.chat.completions.create(**options, **end_thought(served), seed=seed).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert len(answer.message.tool_calls or ()) == 1


def test_other_choices_of_tools_are_named(client: openai.OpenAI) -> None:
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS}}
    with pytest.raises(openai.BadRequestError, match="of type 'allowed_tools' is not supported"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice=choice)  # type: ignore[call-overload]


def test_a_conversation_with_tools_is_written_as_the_model_knows_it(served: Served) -> None:
    from shoal.serve.dialect import Dialect
    from shoal.serve.protocol import ChatBody

    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris","days":1}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    ids = Dialect(served.host.tokenizer).prompt(ChatBody(messages=messages, tools=TOOLS))  # type: ignore[arg-type]
    text = served.host.tokenizer.decode(ids, skip_special=False)
    assert '{"city":"Paris","days":1}' in text
    assert text.startswith("<｜begin▁of▁sentence｜>")
    assert ids.count(0) == 1  # one begin-of-text
    assert text.endswith(("<｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>", "sun<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"))


@pytest.mark.parametrize("stream", [False, True])
def test_stops_do_not_cut_a_call(chat: Served, stream: bool) -> None:
    """Half of a call's arguments, closed as JSON, would be a command that nobody gave."""
    client = openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0)
    properties = {"path": {"enum": ["/home/me END of it"]}}
    schema = {"type": "object", "properties": properties, "required": ["path"], "additionalProperties": False}
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 300, "parallel_tool_calls": False, "tool_choice": "required"}
    options |= {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}], "stop": ["END", "/"]}
    options |= {"extra_body": {"stop_token_ids": chat.host.tokenizer.encode("/")}}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        calls = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
        arguments, finish = "".join(call.function.arguments for call in calls), chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        arguments, finish = choice.message.tool_calls[0].function.arguments, choice.finish_reason  # type: ignore[index, union-attr]
    assert finish == "tool_calls"
    assert json.loads(arguments) == {"path": "/home/me END of it"}


PLAIN = {"type": "string"}
UNUSUAL = [
    {"type": "object", "propertyNames": PLAIN, "additionalProperties": PLAIN},
    {"type": "array", "uniqueItems": True, "items": PLAIN},
    {"not": PLAIN},
    {"type": "string", "format": "no-such-format"},
    {"type": "string", "pattern": "^(?!a).*$"},
    {"oneOf": [PLAIN, {"type": "string", "maxLength": 3}]},
]


@pytest.mark.parametrize("schema", UNUSUAL)
def test_schemas_of_tools_are_kept_as_far_as_they_can_be(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    """Whoever uses an agent cannot change them; `strict` says that its author means every word."""
    parameters = {"type": "object", "properties": {"a": schema}}
    for strict in (None, False, True):
        function = {"name": "f", "parameters": parameters} | ({} if strict is None else {"strict": strict})
        options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 1, "tools": [{"type": "function", "function": function}]}
        if strict:
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**options)
        else:
            client.chat.completions.create(**options)


@pytest.mark.parametrize("schema", [schema for schema in UNUSUAL if "pattern" not in schema])
def test_schemas_of_answers_are_kept_as_far_as_they_can_be(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    for strict in (False, True):
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 1, "response_format": form}
        if strict:
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**options)
        else:
            client.chat.completions.create(**options)


def test_a_tokenizer_without_marks_of_thoughts_knows_none(tokenizer: Tokenizer) -> None:
    """The template opens a thought; as nothing could end it, the answer's form would never be kept."""
    renamed = tokenizer.json.replace('"</think>"', '"<|a|>"').replace('"<think>"', '"<|b|>"')
    with serving(lambda: tiny(Tokenizer(renamed, tokenizer.config)), chat_template="r1") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=30, extra_body={"guided_choice": ["yes"]})
    assert answer.choices[0].message.content == "yes"


@pytest.mark.parametrize("seed", [1, 2])
def test_json_schema(client: openai.OpenAI, served: Served, seed: int) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, response_format=form, max_tokens=200, seed=seed, **end_thought(served)
    )
    assert answer.choices[0].finish_reason == "stop"
    fits(answer.choices[0].message.content or "")


def test_guided_json(client: openai.OpenAI, served: Served) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 200, "seed": 1, **end_thought(served)}
    fits(client.chat.completions.create(**options, extra_body={"guided_json": SCHEMA}).choices[0].message.content or "")


@pytest.mark.parametrize(("field", "value"), [("guided_regex", "[a-f]{3}-[0-9]{2}"), ("guided_choice", ["yes", "no (at all)"])])
def test_regex_and_choice(client: openai.OpenAI, served: Served, field: str, value: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 100, "seed": 1, **end_thought(served)}
    content = client.chat.completions.create(**options, extra_body={field: value}).choices[0].message.content or ""
    assert content in value if field == "guided_choice" else re.fullmatch(value, content)


def test_a_schema_does_not_forbid_thinking(client: openai.OpenAI, served: Served) -> None:
    """Free thought first, then the form."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=300,
        seed=5,
        logit_bias={str(served.host.tokenizer.token_id("</think>")): 5},
        extra_body={"guided_regex": "[a-f]{3}", "chat_template_kwargs": {"thinking": True}},
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch("[a-f]{3}", message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert (answer.usage.completion_tokens_details.reasoning_tokens or 0) > 0


def test_thinking_streams_apart(client: openai.OpenAI, served: Served) -> None:
    extra = {"chat_template_kwargs": {"thinking": True}}
    stream = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=30, seed=1, stream=True, extra_body=extra)
    reasoning = "".join((chunk.choices[0].delta.model_extra or {}).get("reasoning_content", "") for chunk in stream)
    assert reasoning
    assert "<think>" not in reasoning


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}},
        {"response_format": {"type": "json_schema"}},
        {"extra_body": {"guided_regex": "("}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": []},
    ],
)
def test_what_cannot_be_is_refused(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**({"model": "tiny", "messages": ASK} | fields))


def test_anthropic_text_streaming_and_errors(claude: anthropic.Anthropic) -> None:
    ask: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "the red fish"}]}]
    whole = claude.messages.create(model="tiny", max_tokens=12, system="Be kind.", messages=ask, extra_body={"temperature": 0})
    assert whole.usage.output_tokens > 0
    with claude.messages.stream(model="tiny", max_tokens=12, system="Be kind.", messages=ask, extra_body={"temperature": 0}) as stream:
        last = stream.get_final_message()
    assert [block.model_dump() for block in last.content] == [block.model_dump() for block in whole.content]
    assert last.stop_reason == whole.stop_reason
    assert claude.messages.count_tokens(model="tiny", messages=ask).input_tokens > 3
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=1, messages=ask)


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tools(claude: anthropic.Anthropic, served: Served, stream: bool) -> None:
    if "<think>\\n" in (served.host.tokenizer.chat_template or ""):
        pytest.skip("a model that always thinks has to be able to end its thought")
    tools: list[Any] = [{"name": "get_weather", "description": "Weather.", "input_schema": SCHEMA}]
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome", "days": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]}
    messages: list[Any] = [
        *ASK,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result, {"type": "text", "text": "more"}]},
    ]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 300, "messages": messages, "tools": tools}
    options["tool_choice"] = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    if stream:
        with claude.messages.stream(**options) as events:
            answer = events.get_final_message()
    else:
        answer = claude.messages.create(**options)
    assert answer.stop_reason == "tool_use"
    block = answer.content[-1]
    assert isinstance(block, anthropic.types.ToolUseBlock)
    fits(json.dumps(block.input))


LONG_NAME = {"type": "object", "properties": {"path": {"type": "string", "minLength": 200}}, "required": ["path"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("calls", [False, True])
def test_an_item_that_is_cut_off_is_not_complete(chat: Served, stream: bool, calls: bool) -> None:
    """The arguments of a call are closed where they end, so they look whole."""
    client = openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"model": "tiny", "input": ASK, "max_output_tokens": 25}
    if calls:
        options |= {"tools": [{"type": "function", "name": "write", "parameters": LONG_NAME}], "tool_choice": "required"}
    else:
        options["temperature"] = 0  # drawn by chance, the end of the text would come too early now and then
    if stream:
        events = list(client.responses.create(**options, stream=True))
        done = [event.item for event in events if event.type == "response.output_item.done"]
        answer = events[-1].response
        assert answer.output == done
    else:
        answer = client.responses.create(**options)
    assert answer.status == "incomplete"
    assert answer.output[-1].type == ("function_call" if calls else "message")
    assert [item.status for item in answer.output] == ["completed"] * (len(answer.output) - 1) + ["incomplete"]


class Trip(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


def test_anthropic_schema(claude: anthropic.Anthropic, served: Served) -> None:
    if "<think>\\n" in (served.host.tokenizer.chat_template or ""):
        pytest.skip("a model that always thinks has to be able to end its thought")
    messages: list[Any] = ASK
    trip = claude.messages.parse(model="tiny", max_tokens=200, messages=messages, output_format=Trip).parsed_output
    assert isinstance(trip, Trip)


def test_responses(client: openai.OpenAI, served: Served) -> None:
    whole = client.responses.create(model="tiny", input="the red fish", max_output_tokens=12, temperature=0)
    events = list(client.responses.create(model="tiny", input="the red fish", max_output_tokens=12, temperature=0, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == whole.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_responses_tools_and_schema(client: openai.OpenAI, served: Served, stream: bool) -> None:
    if "<think>\\n" in (served.host.tokenizer.chat_template or ""):
        pytest.skip("a model that always thinks has to be able to end its thought")
    tools: list[Any] = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}]
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"}
    items: list[Any] = [*ASK, call, {"type": "function_call_output", "call_id": "c1", "output": "sun"}, *ASK]
    options: dict[str, Any] = {"model": "tiny", "input": items, "tools": tools, "max_output_tokens": 200, "parallel_tool_calls": False}
    if stream:
        with client.responses.stream(**options, tool_choice="required") as events:
            answer = events.get_final_response() if list(events) else None
    else:
        answer = client.responses.create(**options, tool_choice="required")
    assert answer is not None
    found = [item for item in answer.output if item.type == "function_call"]
    assert len(found) == 1
    fits(found[0].arguments)
    form: Any = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
    fits(client.responses.create(model="tiny", input="x", text=form, max_output_tokens=200).output_text)


def test_no_end_of_text_ends_a_thought_before_the_answer_that_is_due(tokenizer: Tokenizer) -> None:
    """Also not another one than the tokenizer's: a model's files may name several."""
    think_end = tokenizer.encode("</think>", special=True)[-1]
    ends = [tokenizer.eos_id, 7]
    form = AnswerForm(answer=json.dumps({"grammars": [{"json_schema": {"const": True}}]}), thinking=True, think_end=think_end)
    mask = Grammars(tokenizer, 400, ends).mask(form)
    thinking = mask.allowed()
    assert thinking is not None
    assert not thinking[ends].any()
    assert thinking.sum() == 398
    mask.accept(think_end)
    answering = mask.allowed()
    assert answering is not None
    assert answering.any()
    assert not answering[ends].any()
