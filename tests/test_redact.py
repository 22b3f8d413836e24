from __future__ import annotations

import pytest

from hallubench.redact import redact

KEY = 'sk-ant/api+03="quoted" é'


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"Authorization: Bearer {KEY}",
        "GET /v1beta/models?key=sk-ant%2Fapi%2B03%3D%22quoted%22%20%C3%A9",
        "GET /v1beta/models?key=sk-ant%2Fapi%2B03%3D%22quoted%22+%C3%A9",
        repr({"key": KEY}),
    ],
)
def test_a_secret_is_masked_however_it_is_written(text: str) -> None:
    assert "ant" not in redact(text, [KEY])
    assert "***" in redact(text, [KEY])


def test_a_secret_inside_a_longer_one_leaves_no_rest_of_it() -> None:
    assert redact("key-long and key", ["key", "key-long"]) == "*** and ***"


def test_an_empty_secret_changes_nothing() -> None:
    assert redact("text", [""]) == "text"
