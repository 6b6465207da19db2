"""Thought, content and tool calls, cut anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.foreign import foreign

from shoal.data import Tokenizer
from shoal.engine import TextStream
from shoal.serve.dialect import Dialect
from shoal.serve.protocol import ChatBody
from shoal.serve.reader import AnswerReader, CallPart, Marks, Piece, reader_behind
from shoal.serve.tokens import Offsets
from shoal.serve.turn import Answer, Step

V31 = (
    "let me see</think>\n\nLooking.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Paris <｜tool"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
R1 = (
    "\nlet me see\n</think>\nLooking.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris <｜tool"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n'
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


def read(tokenizer: Tokenizer, ids: list[int], cuts: list[int], **options: bool) -> Answer:
    """What becomes of an answer of these tokens that comes in pieces."""
    reader, answer, stream = AnswerReader(Marks(tokenizer), **options), Answer(), TextStream(tokenizer)
    places = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    for start, end in itertools.pairwise(places):
        text = "".join(map(stream.push, ids[start:end]))
        answer.add(Step(0, reader.push(text, ids[start:end]), (), None))
    answer.add(Step(0, reader.finish(), (), None))
    return answer


@pytest.mark.parametrize("text", [V31, R1])
@given(cuts=st.lists(st.integers(0, 300), max_size=12))
def test_both_dialects(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    answer = read(tokenizer, tokenizer.encode(text, special=True), cuts, thinking=True, calls=True)
    assert (answer.reasoning, answer.content) == ("let me see", "Looking.")
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [("get_weather", {"city": "Paris <｜tool"}), ("stop", {})]
    assert len({call.id for call in answer.calls}) == 2


@given(cuts=st.lists(st.integers(0, 300), max_size=12), end=st.integers(0, 300))
def test_arguments_are_json_wherever_the_answer_ends(tokenizer: Tokenizer, cuts: list[int], end: int) -> None:
    for text in (V31, R1):
        ids = tokenizer.encode(text, special=True)[:end]
        for call in read(tokenizer, ids, cuts, thinking=True, calls=True).calls:
            assert isinstance(json.loads(call.arguments), dict)


@given(st.text(alphabet="<think>/ a\n｜") | st.text(), st.lists(st.integers(0, 40), max_size=6))
def test_text_without_marks_is_content(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text)
    assert read(tokenizer, ids, cuts).content == text
    answer = read(tokenizer, [*ids, *tokenizer.encode("</think>x", special=True)], cuts, thinking=True)
    assert answer.reasoning == text.strip()
    assert answer.content == "x"


@given(st.lists(st.integers(0, 300), max_size=12))
def test_what_ordinary_tokens_spell_is_text(tokenizer: Tokenizer, cuts: list[int]) -> None:
    """Nobody who gets a model to write a text can make it a call, the end of one, or the end of a thought."""
    spelled = tokenizer.encode(f"<think>{V31}")
    assert read(tokenizer, spelled, cuts, may_think=True, calls=True) == Answer(content=f"<think>{V31}")
    assert read(tokenizer, spelled, cuts, thinking=True, calls=True) == Answer(reasoning=f"<think>{V31}")
    begin, end = (tokenizer.encode(part, special=True) for part in V31.split('{"city": "Paris <｜tool"}'))
    arguments = tokenizer.encode('{"city": "a<｜tool▁call▁end｜>b"}')
    calls = read(tokenizer, [*begin, *arguments, *end], cuts, thinking=True, calls=True).calls
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("get_weather", {"city": "a<｜tool▁call▁end｜>b"}), ("stop", {})]


@given(st.lists(st.integers(0, 300), max_size=12), st.booleans())
def test_tokens_of_the_thought_are_counted_one_by_one(tokenizer: Tokenizer, cuts: list[int], opens: bool) -> None:
    thought, rest = tokenizer.encode("let me </think> see"), tokenizer.encode("</think>\nthe <think> red fish", special=True)
    ids = [*([tokenizer.token_id("<think>")] if opens else []), *thought, *rest]
    reader = AnswerReader(Marks(tokenizer), thinking=not opens, may_think=opens)
    for start, end in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]):
        reader.push("", ids[start:end])  # type: ignore[arg-type]
    assert reader.thought_tokens == len(thought)


def test_marks_that_mean_nothing_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a</think>b<｜tool▁sep｜>", special=True)
    assert read(tokenizer, ids, [], calls=True) == Answer(content="a</think>b<｜tool▁sep｜>")


def test_text_may_lag_behind_the_tokens(tokenizer: Tokenizer) -> None:
    """As it does while a stop string may have begun; one that ends within a mark leaves nothing of it."""
    ids = tokenizer.encode("ab</think>cd", special=True)
    reader, answer = AnswerReader(Marks(tokenizer), thinking=True), Answer()
    for text, tokens in (("a", ids), ("b</th", []), ("ink>c", [])):
        answer.add(Step(0, reader.push(text, tokens), (), None))
    assert answer == Answer("ab", "c")
    reader = AnswerReader(Marks(tokenizer), thinking=True)
    assert reader.push("ab</", ids) == Piece("ab")
    assert not reader.finish()


def test_a_thought_may_be_opened_by_the_model_itself(tokenizer: Tokenizer) -> None:
    for text, answer in (("<think>a</think>b", Answer("a", "b")), ("no <think>", Answer("", "no <think>"))):
        assert read(tokenizer, tokenizer.encode(text, special=True), [2], may_think=True) == answer


def test_one_call_where_only_one_is_wanted(tokenizer: Tokenizer) -> None:
    assert len(read(tokenizer, tokenizer.encode(V31, special=True), [], thinking=True, calls=True, parallel=False).calls) == 1


def test_the_first_part_of_a_call_names_it(tokenizer: Tokenizer) -> None:
    text = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a"'
    piece = AnswerReader(Marks(tokenizer), calls=True).push(text, tokenizer.encode(text, special=True))
    assert piece == Piece(calls=(CallPart(0, piece.calls[0].id, "f", '{"a"'),))


@pytest.mark.parametrize("cuts", [[], [5], [3, 4, 12]])
def test_a_tool_may_be_called_function(tokenizer: Tokenizer, cuts: list[int]) -> None:
    text = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜> {"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    answer = read(tokenizer, tokenizer.encode(text, special=True), cuts, calls=True)
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [("function", {"a": 1})]


def test_marks_and_places_are_where_the_text_goes_on_behind_its_prompt() -> None:
    """With a tokenizer that drops the space of a text's first word, and keeps that of a word behind others."""
    plain = foreign("metaspace")
    content = json.loads(plain.json)
    for i, mark in enumerate(("<think>", "</think>")):
        content["added_tokens"].append({**content["added_tokens"][2], "id": plain.vocab_size + i, "content": mark, "special": False})
    tokenizer = Tokenizer(json.dumps(content), plain.config, "{{ messages[0].content }}<think>")
    prompt, answer = tokenizer.encode("the red fish <think> yes", special=True), tokenizer.encode("my</think>lord", special=True)
    reader, stream, offsets = reader_behind(tokenizer, prompt[:-1]), TextStream(tokenizer, prompt[:-1]), Offsets(tokenizer, 100, prompt)
    piece = reader.push("".join(map(stream.push, answer)), answer)
    assert (piece.reasoning, piece.content) == ("my", "lord")
    assert [offsets.next(token) for token in answer][1] == 100 + len(" my")


def test_an_answer_that_was_begun_goes_on_in_the_middle_of_its_text() -> None:
    plain = foreign("prepend")
    tokenizer = Tokenizer(plain.json, plain.config, "[user] {{ messages[0].content }}[assistant]{{ '\\n' }}")
    said = [{"role": "user", "content": "a king"}, {"role": "assistant", "content": "yes my lord"}]
    prompt = Dialect(tokenizer).prompt(ChatBody.model_validate({"messages": said, "continue_final_message": True}))
    assert prompt == tokenizer.encode("[user] a king[assistant]\nyes my lord")
