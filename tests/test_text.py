from __future__ import annotations

import pytest

from hallubench.text import printable


@pytest.mark.parametrize(
    "control", ["\x1b[31m", "\x9b2J", "\r", "\n", "\0", "\x7f", "\u202e", "\u2066", "\ud800"]
)
def test_what_a_terminal_would_obey_is_escaped(control: str) -> None:
    shown = printable(f"a{control}b")
    assert shown.isprintable()
    assert shown.encode().decode("unicode_escape") == f"a{control}b"


@pytest.mark.parametrize("text", ["plain", "Größe", "שלום", "日本語", "[red]x[/red]"])
def test_what_can_be_printed_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_only_what_is_too_long_is_cut() -> None:
    assert printable("x" * 300) == "x" * 300
    assert printable("x" * 301) == "x" * 300 + "..."
    assert printable("abc", longest=2) == "ab..."
