"""Whatever comes, in whatever pieces: the result is JSON, and JSON that is whole comes through as it is."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.partial_json import PartialObject

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def read(pieces: list[str]) -> str:
    reader = PartialObject()
    return "".join(map(reader.push, pieces)) + reader.finish()


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.data())
def test_whole_objects_come_through_and_cut_ones_are_closed(value: Any, escapes: bool, indent: int | None, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=escapes, indent=indent)
    assert read(["```json\n", *text, "\n```"]) == text
    cut = data.draw(st.integers(0, len(text)))
    middle = data.draw(st.integers(0, cut))
    closed = read([text[:middle], text[middle:cut]])
    assert isinstance(json.loads(closed), dict)
    assert closed.startswith(text[:cut])


@given(st.text(alphabet='{}[]",:\\ut0123456789.eE+- abfnrs\n\x00é') | st.text())
def test_nonsense_becomes_json(text: str) -> None:
    assert isinstance(json.loads(read(list(text))), dict)
    assert isinstance(json.loads(read(['{"a":', text])), dict)
