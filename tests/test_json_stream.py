from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hallubench import json_stream
from hallubench.json_stream import JsonError, JsonStream

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def walk(stream: JsonStream, depth: int) -> Any:
    """A value, item by item down to a depth, and whole below it."""
    if depth and stream.peek() == "{":
        return {key: walk(stream, depth - 1) for key in stream.members()}
    if depth and stream.peek() == "[":
        return [walk(stream, depth - 1) for _ in stream.elements()]
    return stream.value()


def read(text: str, depth: int = 2) -> Any:
    stream = JsonStream(io.StringIO(text))
    value = walk(stream, depth)
    stream.end()
    return value


@given(
    value=VALUES,
    indent=st.sampled_from([None, 2]),
    ascii_=st.booleans(),
    piece=st.integers(1, 9),
    depth=st.integers(0, 3),
)
def test_wherever_the_pieces_end_the_document_is_what_json_loads_makes(
    value: Any, indent: int | None, ascii_: bool, piece: int, depth: int
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "PIECE", piece)
        assert read(text, depth) == value


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_document_that_is_cut_anywhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, piece: int, depth: int
) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    text = '{"a": [-1.5e+10, "\\u00e9\\n", true], "b": {"c": null}}'
    assert read(text, depth) == json.loads(text)
    for end in range(len(text)):
        with pytest.raises(JsonError, match="line 1: "):
            read(text[:end], depth)


@pytest.mark.parametrize("piece", [1, 1000])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1,\n2,\n]", "line 3: Expecting value"),
        ("[1,\n2 3]", r"line 2: Expecting ',' or '\]'"),
        ('{"a": 1,\n\n"a": 2}', 'line 3: the key "a" comes twice in one object'),
        ("[[1,\n\n2 3]]", "line 3: Expecting ',' delimiter"),
        ("{1: 2}", "line 1: Expecting a key in double quotes"),
        ('{"a" 1}', "line 1: Expecting ':'"),
        ("[]\n[]", "line 2: Extra data"),
        ("[NaN]", "line 1: NaN is not JSON, write null"),
        ("[Infinity]", "line 1: Infinity is not JSON"),
        ('["\n"]', "line 1: Invalid control character"),
        ("  \n", "line 2: the file ends too early"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    monkeypatch: pytest.MonkeyPatch, text: str, problem: str, piece: int
) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    with pytest.raises(JsonError, match=problem):
        read(text, depth=1)


@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_minus_infinity_is_a_number(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    assert read("[-Infinity, -1]") == [-math.inf, -1]


class Endless(io.StringIO):
    """A mistake, and behind it more text than anybody should read."""

    taken = 0

    def read(self, size: int | None = -1) -> str:
        self.taken += size or 0
        return "[1 2" + " " * ((size or 0) - 4)


def test_a_mistake_is_found_without_reading_on_to_the_end() -> None:
    file = Endless()
    with pytest.raises(JsonError, match="Expecting"):
        JsonStream(file).value()
    assert file.taken <= 2 * json_stream.PIECE
