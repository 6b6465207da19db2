"""Thought, content and tool calls, cut anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.reader import AnswerReader, CallPart, Piece
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


def read(text: str, cuts: list[int], **options: bool) -> Answer:
    reader, answer = AnswerReader(**options), Answer()
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for start, end in itertools.pairwise(places):
        answer.add(Step(0, reader.push(text[start:end]), (), None))
    answer.add(Step(0, reader.finish(), (), None))
    return answer


@pytest.mark.parametrize("text", [V31, R1])
@given(cuts=st.lists(st.integers(0, 300), max_size=12))
def test_both_dialects(text: str, cuts: list[int]) -> None:
    answer = read(text, cuts, thinking=True, calls=True)
    assert (answer.reasoning, answer.content) == ("let me see", "Looking.")
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [("get_weather", {"city": "Paris <｜tool"}), ("stop", {})]
    assert len({call.id for call in answer.calls}) == 2


@given(cuts=st.lists(st.integers(0, 300), max_size=12), end=st.integers(0, 300))
def test_arguments_are_json_wherever_the_answer_ends(cuts: list[int], end: int) -> None:
    for text in (V31[:end], R1[:end]):
        for call in read(text, cuts, thinking=True, calls=True).calls:
            assert isinstance(json.loads(call.arguments), dict)


@given(st.text(alphabet="<think>/ a\n｜") | st.text(), st.lists(st.integers(0, 40), max_size=6))
def test_text_without_marks_is_content(text: str, cuts: list[int]) -> None:
    assert read(text, cuts).content == text
    answer = read(text + "</think>x", cuts, thinking=True)
    if "</think>" not in text:
        assert answer.reasoning == text.strip()
        assert answer.content == "x"


def test_a_thought_may_be_opened_by_the_model_itself() -> None:
    assert read("<think>a</think>b", [2], may_think=True) == Answer("a", "b")
    assert read("no <think>", [2], may_think=True) == Answer("", "no <think>")


def test_one_call_where_only_one_is_wanted() -> None:
    assert len(read(V31, [], thinking=True, calls=True, parallel=False).calls) == 1


def test_the_first_part_of_a_call_names_it() -> None:
    reader = AnswerReader(calls=True)
    piece = reader.push('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a"')
    assert piece == Piece(calls=(CallPart(0, piece.calls[0].id, "f", '{"a"'),))


@pytest.mark.parametrize("cuts", [[], [70], [60, 75, 80]])
def test_a_tool_may_be_called_function(cuts: list[int]) -> None:
    text = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜> {"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    calls = [(call.name, call.arguments) for call in read(text, cuts, calls=True).calls]
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("function", {"a": 1})]
