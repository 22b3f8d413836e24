"""A JSON file read piece by piece: one item of a list after another, however many there are.

    stream = JsonStream(file)
    for key in stream.members():
        if key == "results":
            for index in stream.elements():
                result = stream.value()
        else:
            rest = stream.value()
    stream.end()

Not ijson: the files of the legacy script hold -Infinity, which its fast backend refuses; half a surrogate
pair becomes "?" there, equal keys pass in silence, and deep nesting takes all memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

PIECE = 2**20
"""Characters read at a time; a value longer than that is read whole."""

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = len("-Infinity")
_NUMBER_GOES_ON = len("e+")
"""Of 1.5e+10, cut behind this, the 1.5 is a number by itself."""


class JsonError(ValueError):
    """What is wrong with the text, and in which line."""


class JsonStream:
    """Walks through one JSON document; each value that is come upon has to be taken, or walked through.

    Strict, but for -Infinity: it is a number. A key that comes twice in an object is refused.

    Raises:
        JsonError: (while reading) the text is not JSON, or ends too early.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._window = ""
        self._at = 0
        self._line = 1
        """Of the window's first character."""

    def peek(self) -> str:
        """The character that the next value begins with, such as "{" or "["; "" at the end."""
        while True:
            space = _SPACE.match(self._window, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._read_on():
                return ""

    def value(self) -> Any:
        """Take the next value whole."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                if self._is_cut(error) and self._read_on():
                    continue
                raise self._error(error.msg, error.pos) from None
            except JsonError as error:
                raise self._error(str(error), self._at) from None
            except RecursionError:
                raise self._error("nested too deeply", self._at) from None
            except ValueError:  # Python's own bound on the digits of an integer
                raise self._error("a number has too many digits", self._at) from None
            if len(self._window) - end <= _NUMBER_GOES_ON and self._read_on():
                continue
            self._at = end
            return value

    def members(self) -> Iterator[str]:
        """The keys of the next value, an object; the value of each has to be taken before the next key."""
        self._take("{")
        seen = set()
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                raise self._error("Expecting a key in double quotes", self._at)
            if (key := self.value()) in seen:
                raise self._error(f"the key {json.dumps(key)} comes twice in one object", self._at)
            seen.add(key)
            self._take(":")
            yield key
            if self._take(",", "}") == "}":
                return

    def elements(self) -> Iterator[int]:
        """The places in the next value, a list; the element of each has to be taken before the next place."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        index = 0
        while True:
            yield index
            index += 1
            if self._take(",", "]") == "]":
                return

    def end(self) -> None:
        """Refuse what stands behind the document."""
        if self.peek():
            raise self._error("Extra data", self._at)

    def _take(self, *wanted: str) -> str:
        found = self.peek()
        if found not in wanted:
            raise self._error(f"Expecting {' or '.join(map(repr, wanted))}", self._at)
        self._at += 1
        return found

    def _read_on(self) -> bool:
        """Drop what was taken and read more: as much as is left, so that a long value takes few attempts."""
        left = len(self._window) - self._at
        piece = self._file.read(max(PIECE, left))
        if piece:
            self._line += self._window.count("\n", 0, self._at)
            self._window = self._window[self._at :] + piece
            self._at = 0
        return bool(piece)

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the window's end, and not the text, may be what is wrong."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._window) - _LONGEST_WORD

    def _error(self, problem: str, place: int) -> JsonError:
        if place >= len(self._window) or problem.startswith("Unterminated string"):
            problem = "the file ends too early"
        line = self._line + self._window.count("\n", 0, place)
        return JsonError(f"line {line}: {problem}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise JsonError(f"the key {json.dumps(twice)} comes twice in one object")
    return members


def _constant(name: str) -> float:
    if name != "-Infinity":
        raise JsonError(f"{name} is not JSON, write null")
    return float("-inf")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_constant)
