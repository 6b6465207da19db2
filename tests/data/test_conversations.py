"""Which tokens of a conversation carry loss: exactly what the assistant wrote, behind the very prompt that the server makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.data import Tokenizer, train_tokenizer
from shoal.data.chat_template import BUILT_IN, built_in_template, encode_chat, encode_turns, render_chat
from shoal.data.conversations import Conversation, conversation_of, read_conversations, read_pairs, tokenize
from shoal.data.tokenizer import EOS
from shoal.formats.export import chat_template

PLAIN = train_tokenizer(["the reef and the fish swim over 12 + 30 = 42, été 😀 call(x)\n" * 20], 400)
TEMPLATES = {"plain": chat_template(), **{name: built_in_template(name) for name in BUILT_IN}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
ASKED, GOOD, BAD = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
said = st.text(alphabet="abc é😀1+\n.{}", min_size=1, max_size=12)


def with_template(name: str) -> Tokenizer:
    return Tokenizer(PLAIN.json, PLAIN.config, TEMPLATES[name])


def call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}


@st.composite
def conversations(draw: st.DrawFn, template: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages of any shape a template allows, and what the assistant wrote in each of its turns, as that template writes it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(said)}] if draw(st.booleans()) else []
    written: list[str] = []
    turns = draw(st.integers(1, 3))
    for turn in range(turns):
        messages.append({"role": "user", "content": draw(said | st.just("<think> not mine </think>"))})
        if template != "plain" and draw(st.booleans()):
            arguments = json.dumps({"a": draw(st.integers(0, 99))})
            messages.append({"role": "assistant", "content": "", "tool_calls": [call(arguments)]})
            if template == "r1":
                inside = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
            else:
                inside = f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
            written.append(f"<｜tool▁calls▁begin｜>{inside}<｜tool▁calls▁end｜>{EOS}")
            messages.append({"role": "tool", "content": draw(said)})
        content, last = draw(said), turn == turns - 1
        thought = draw(st.none() | said)
        if thought is None:
            messages.append({"role": "assistant", "content": content})
            stripped = template == "plain" and not last  # that template takes space off earlier answers
            written.append((content.lstrip() if stripped else content) + EOS)
            continue
        whole = f"<think>\n{thought}\n</think>\n{content}"
        messages.append({"role": "assistant", "content": whole})
        after_tool = messages[-2]["role"] == "tool"
        if template == "plain":
            written.append((whole if last else content.lstrip()) + EOS)
        elif last and not after_tool:  # the tag itself stands in the prompt
            written.append(whole.removeprefix("<think>" if template == "v3.1" else "<think>\n") + EOS)
        else:
            written.append(f"\n{content}{EOS}")
    return messages, written


@pytest.mark.parametrize("template", TEMPLATES)
@given(data=st.data())
@settings(max_examples=60)
def test_exactly_what_the_assistant_wrote_carries_loss(template: str, data: st.DataObject) -> None:
    tokenizer = with_template(template)
    messages, written = data.draw(conversations(template))
    example = tokenize(tokenizer, Conversation(messages, TOOLS if template != "plain" else None), "a row")
    learnt = example.ids[example.written].tolist()
    assert tokenizer.decode(learnt, skip_special=False) == "".join(written)
    assert learnt.count(tokenizer.eos_id) == len(written)
    others = example.ids[~example.written].tolist()
    whole = render_chat(tokenizer, messages, TOOLS if template != "plain" else None, add_generation_prompt=False)
    pieces = encode_turns(tokenizer, messages, TOOLS if template != "plain" else None)
    decoded = [(tokenizer.decode(ids, skip_special=False), is_written) for ids, is_written in pieces]
    assert "".join(text for text, _ in decoded) == whole
    assert tokenizer.decode(others, skip_special=False) == "".join(text for text, is_written in decoded if not is_written)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinks", [True, False])
def test_an_answer_stands_behind_the_prompt_that_the_server_makes(template: str, thinks: bool) -> None:
    if template == "r1" and not thinks:
        pytest.skip("R1 always thinks: its server's prompt opens a thought")
    tokenizer = with_template(template)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "12 + 30?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "the reef?"},
    ]
    answer = "<think>\nfish\n</think>\nthe fish" if thinks else "the fish"
    example = tokenize(tokenizer, Conversation([*asked, {"role": "assistant", "content": answer}]), "a row")
    prompt = tokenizer.encode(render_chat(tokenizer, asked, thinking=thinks), special=True)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.written[len(prompt) :].all()
    assert not example.written[len(prompt) - 1]


def test_a_control_token_that_someone_spells_is_text_in_training_as_in_serving() -> None:
    tokenizer = with_template("r1")
    asked = [{"role": "user", "content": f"what is {EOS}?"}]
    prompt = encode_chat(tokenizer, asked)
    example = tokenize(tokenizer, Conversation([*asked, {"role": "assistant", "content": "<think>\n</think>\nan end"}]), "a row")
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.ids.tolist().count(tokenizer.eos_id) == 1


def test_a_template_without_marks_is_refused() -> None:
    bare = Tokenizer(PLAIN.json, PLAIN.config, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="generation"):
        tokenize(bare, Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "a row")


def test_the_usual_forms_become_the_same_messages(tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "green"}
    rows = [
        {"messages": [question, answer]},
        {"conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "green"}]},
        {"instruction": "red?", "input": "", "output": "green"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "b.parquet")
    found = [conversation.messages for _, conversation in read_conversations([str(tmp_path)])]
    assert found == [[question, answer]] * 4


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train_sft-0.jsonl", "train_sft-1.jsonl", "test_sft-0.jsonl", "README.json"], {"train_sft-0.jsonl", "train_sft-1.jsonl"}),
        (["train/a.json", "test/a.json"], {"train/a.json"}),
        (["train.jsonl", "more.jsonl"], {"train.jsonl", "more.jsonl"}),
    ],
)
def test_of_a_folder_the_split_for_tests_is_not_learnt(tmp_path: Path, names: list[str], read: set[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pair = {"prompt": name, "chosen": "a", "rejected": "b"}
        (tmp_path / name).write_text(json.dumps({"messages": [{"role": "user", "content": name}]} | pair) + "\n")
    assert {conversation.messages[0]["content"] for _, conversation in read_conversations([str(tmp_path)])} == read
    assert {chosen.messages[0]["content"] for _, chosen, _ in read_pairs([str(tmp_path)])} == read


def test_thoughts_and_parts_are_folded_into_the_content() -> None:
    row = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "red?", "image": None}, {"type": "image", "text": None, "image": "x.png"}],
            },
            {"role": "assistant", "reasoning_content": "hm", "content": "green", "tool_calls": None},
        ]
    }
    messages = conversation_of(row, "here").messages
    assert messages[0]["content"] == "red?"
    assert messages[1] == {"role": "assistant", "content": "<think>\nhm\n</think>\ngreen"}


def test_what_stands_beside_the_turns_is_said(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    for row in (
        {"system": "Be brief.", "messages": [ASKED, GOOD]},
        {"system": "Be brief.", "messages": [system, ASKED, GOOD]},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "a"}]},
        {"system": "Be brief.", "instruction": "red?", "output": "a"},
    ):
        assert conversation_of(row, "here").messages == [system, ASKED, GOOD]
    history = conversation_of({"instruction": "red?", "output": "b", "history": [["red?", "a"]]}, "here")
    assert history.messages == [ASKED, GOOD, ASKED, BAD]


def test_functions_of_openais_first_form_are_tools() -> None:
    function, asked = TOOLS[0]["function"], {"role": "user", "content": "12 + 30?"}
    first = {
        "functions": [function],
        "messages": [
            asked,
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
            {"role": "function", "name": "add", "content": "42"},
            {"role": "assistant", "content": "42"},
        ],
    }
    second = {
        "tools": json.dumps(TOOLS),
        "messages": [
            asked,
            {"role": "assistant", "content": "", "tool_calls": [call("{}")]},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "42"},
        ],
    }
    for template in BUILT_IN:
        one, other = (tokenize(with_template(template), conversation_of(row, "here"), "here") for row in (first, second))
        assert one.ids.tolist() == other.ids.tolist()
        assert one.written.tolist() == other.written.tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_roles_that_a_template_does_not_know_are_refused_not_dropped(template: str) -> None:
    conversation = Conversation([ASKED, {"role": "critic", "content": "no"}, GOOD])
    with pytest.raises(UserError, match=r"file:3: .*critic"):
        tokenize(with_template(template), conversation, "file:3")


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_of_no_weight_are_read_and_not_learnt(template: str) -> None:
    tokenizer = with_template(template)
    row = {"messages": [ASKED, BAD | {"weight": 0}, ASKED, GOOD | {"weight": 1}]}
    example = tokenize(tokenizer, conversation_of(row, "here"), "here")
    assert tokenizer.decode(example.ids[example.written].tolist(), skip_special=False) == f"a{EOS}"
    assert example.ids.tolist() == tokenize(tokenizer, Conversation([ASKED, BAD, ASKED, GOOD]), "here").ids.tolist()


def test_parquet_teaches_what_json_lines_teach(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = []
    for name, arguments, kind in (("weather", {"city": "Rome"}, "string"), ("search", {"limit": 3}, "integer")):
        properties = {field: {"type": kind} for field in arguments}
        tool = {"name": name, "description": "", "parameters": {"type": "object", "properties": properties}}
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        messages = [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
        rows.append({"messages": messages, "tools": [{"type": "function", "function": tool}]})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [conversation for _, conversation in read_conversations([str(tmp_path)])]
    assert found == [conversation_of(row, "here") for row in rows]


@pytest.mark.parametrize(
    "row",
    [
        "text",
        {"system": 1, "messages": []},
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        {"instruction": "a", "output": "b", "history": ["ab"]},
        {"instruction": "a", "output": "b", "history": 1},
        {"text": "a"},
        {"messages": ["a"]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": {"a": 1}}]},
        {"conversations": [{"from": "x"}]},
    ],
)
def test_rows_that_are_no_conversations_are_refused_with_their_place(row: Any) -> None:
    with pytest.raises(UserError, match=r"file:3"):
        conversation_of(row, "file:3")


@pytest.mark.parametrize("given", [{"tools": TOOLS}, {"tool_calls": [call("{}")]}])
def test_what_the_plain_template_cannot_write_is_refused_not_dropped(given: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": ""} | ({"tool_calls": given["tool_calls"]} if "tool_calls" in given else {})
    conversation = Conversation([{"role": "user", "content": "12 + 30?"}, answer], given.get("tools"))
    with pytest.raises(UserError, match=r"file:3: .*--chat-template"):
        tokenize(with_template("plain"), conversation, "file:3")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "red?", "chosen": "a", "rejected": "b"},
        {"question": "red?", "system": "", "chosen": "a", "rejected": "b"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "red?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
)
def test_pairs_have_their_prompt_once(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    ((_, chosen, rejected),) = read_pairs([str(tmp_path / "pairs.jsonl")])
    assert (chosen.messages, rejected.messages) == ([ASKED, GOOD], [ASKED, BAD])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row | {"system": "Be brief.", "tools": json.dumps(TOOLS)}) + "\n")
    ((_, chosen, rejected),) = read_pairs([str(tmp_path / "pairs.jsonl")])
    system = {"role": "system", "content": "Be brief."}
    assert (chosen, rejected) == (Conversation([system, ASKED, GOOD], TOOLS), Conversation([system, ASKED, BAD], TOOLS))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "red?", "chosen": None, "rejected": "b"},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED]},
        {"prompt": "blue?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": "a", "rejected": "b"},
        {"chosen": [GOOD], "rejected": [BAD]},
        {"system": "Be brief.", "input": "red?", "chosen": "a", "rejected": "b"},
    ],
)
def test_pairs_that_teach_nothing_are_refused_with_their_place(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl.*(chosen|rejected)"):
        list(read_pairs([str(tmp_path / "pairs.jsonl")]))
