from __future__ import annotations

import io
import json
import math
from array import array
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replace_fields

from hallubench.schema import SCHEMA, Row, to_table
from hallubench.types import Completion, Logprobs, Message, Prompt, Request, SamplingParams, Usage

LOGPROB_COLUMNS = SCHEMA.names[SCHEMA.get_field_index("output_token_ids") :]
NOW = datetime(2026, 11, 23, 10, 1, 23, 456789, tzinfo=UTC)


def make_row(
    *,
    prompt: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    request: dict[str, Any] | None = None,
    completion: dict[str, Any] | None = None,
) -> Row:
    """A row with some fields of its prompt, sampling parameters, request and completion set."""
    asked: dict[str, Any] = {
        "request_id": "0123456789abcdef0123",
        "prompt": replace_fields(Prompt(id="p1", index=0, text="Does it exist?"), **(prompt or {})),
        "sample_index": 0,
        "provider": "echo",
        "model": "m",
        "system_prompt": None,
        "params": replace(SamplingParams(max_tokens=64), **(params or {})),
    }
    answer = Completion(request_id=asked["request_id"], timestamp=NOW, elapsed_seconds=0.5, text="Yes.")
    return Row("run-1", Request(**asked | (request or {})), replace(answer, **(completion or {})), None)


def make_logprobs(tops: list[list[tuple[int, str, float]]]) -> Logprobs:
    """Log-probabilities where the best alternative of each position was chosen."""
    flat = [top for position in tops for top in position]
    offsets = array("i", [0])
    for position in tops:
        offsets.append(offsets[-1] + len(position))
    best = [position[0] if position else (7, "x", math.nan) for position in tops]
    return Logprobs(
        token_ids=array("i", [top[0] for top in best]),
        tokens=[top[1] for top in best],
        logprobs=array("f", [top[2] for top in best]),
        ranks=array("i", [1 if position else 0 for position in tops]),
        top_offsets=offsets,
        top_token_ids=array("i", [top[0] for top in flat]),
        top_tokens=[top[1] for top in flat],
        top_logprobs=array("f", [top[2] for top in flat]),
    )


def stored(*rows: Row) -> list[dict[str, Any]]:
    """What is read back of rows after a trip through a Parquet file."""
    file = io.BytesIO()
    pq.write_table(to_table(rows), file)
    found: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return found


def test_every_column_has_a_description() -> None:
    for field in SCHEMA:
        assert field.metadata[b"description"], field.name


def test_no_rows_make_a_table_whose_columns_have_their_types() -> None:
    assert to_table([]).schema.equals(SCHEMA)


def test_a_row_of_nothing_but_what_it_must_have_keeps_every_type() -> None:
    table = to_table([make_row()])
    assert table.schema.equals(SCHEMA, check_metadata=True)
    table.validate(full=True)
    assert table["output_top_tokens"].null_count == 1


def test_every_field_comes_back_as_it_went() -> None:
    (row,) = stored(
        make_row(
            prompt={
                "index": 3,
                "text": None,
                "messages": (Message("user", "Hi"), Message("assistant", "Hello")),
                "category": "cve",
                "is_synthetic_probe": True,
                "gold_label": {"exists": None, "description": "nø"},
                "gold_refs": ("https://a", "https://b"),
                "original_id": "o1",
                "extra": {"z": 1, "a": [1, {"b": 2}]},
            },
            params={"temperature": 0.7, "top_p": 0.9, "top_k": 40, "stop": ("\n\n", "END"), "seed": 2**62},
            request={"sample_index": 2, "system_prompt": "Be brief.", "options": {"thinking": {"budget": 5}}},
            completion={
                "text": "",
                "finish_reason": "length",
                "provider_finish_reason": "MAX_TOKENS",
                "reasoning": "hm",
                "usage": Usage(input_tokens=1, output_tokens=2, cached_tokens=3, reasoning_tokens=2**40),
                "model_version": "c1899de2",
                "logprobs_mode": "raw_logprobs",
                "provider_request_id": "req_1",
                "retry_count": 2,
            },
        )._replace(cost_usd=0.25)
    )
    assert row == {
        "run_id": "run-1",
        "request_id": "0123456789abcdef0123",
        "prompt_id": "p1",
        "prompt_index": 3,
        "sample_index": 2,
        "provider": "echo",
        "model": "m",
        "model_version": "c1899de2",
        "prompt": None,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "system_prompt": "Be brief.",
        "full_response": "",
        "reasoning": "hm",
        "finish_reason": "length",
        "provider_finish_reason": "MAX_TOKENS",
        "error": None,
        "error_type": None,
        "retry_count": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 64,
        "stop": ["\n\n", "END"],
        "seed": 2**62,
        "options": json.dumps({"thinking": {"budget": 5}}),
        "input_tokens": 1,
        "output_tokens": 2,
        "cached_tokens": 3,
        "reasoning_tokens": 2**40,
        "timestamp": NOW,
        "elapsed_seconds": 0.5,
        "cost_usd": 0.25,
        "provider_request_id": "req_1",
        "prompt_category": "cve",
        "is_synthetic_probe": True,
        "gold_label": json.dumps({"exists": None, "description": "nø"}),
        "gold_refs": ["https://a", "https://b"],
        "original_id": "o1",
        "prompt_extra": json.dumps({"z": 1, "a": [1, {"b": 2}]}),
        "logprobs_mode": "raw_logprobs",
    } | dict.fromkeys(LOGPROB_COLUMNS)


def test_a_timestamp_of_another_zone_is_the_same_moment_in_utc() -> None:
    (row,) = stored(
        make_row(completion={"timestamp": NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))})
    )
    assert row["timestamp"] == NOW


def test_a_failed_row_has_an_error_and_no_answer() -> None:
    (row,) = stored(make_row(completion={"text": None, "error": "boom", "finish_reason": "error"}))
    assert (row["full_response"], row["error"], row["finish_reason"]) == (None, "boom", "error")


def test_an_empty_answer_is_not_a_missing_one() -> None:
    (row,) = stored(make_row(completion={"text": ""}))
    assert row["full_response"] == ""


def test_what_the_engine_does_not_know_is_null_and_impossible_stays_minus_infinity() -> None:
    logprobs = Logprobs(
        token_ids=array("i", [5, -1]),
        tokens=["a", "b"],
        logprobs=array("f", [math.nan, -math.inf]),
        ranks=array("i", [0, 1]),
        top_offsets=array("i", [0, 0, 2]),
        top_token_ids=array("i", [-1, 9]),
        top_tokens=["b", "c"],
        top_logprobs=array("f", [math.nan, -math.inf]),
    )
    (row,) = stored(make_row(completion={"prompt_logprobs": logprobs}))
    assert row["prompt_token_ids"] == [5, None]
    assert row["prompt_token_texts"] == ["a", "b"]
    assert row["prompt_logprobs"] == [None, -math.inf]
    assert row["prompt_ranks"] == [None, 1]
    assert row["prompt_top_token_ids"] == [[], [None, 9]]
    assert row["prompt_top_tokens"] == [[], ["b", "c"]]
    assert row["prompt_top_logprobs"] == [[], [None, -math.inf]]
    assert row["output_logprobs"] is None


def test_no_tokens_are_an_empty_list_and_no_log_probabilities_null() -> None:
    rows = stored(make_row(completion={"logprobs": make_logprobs([])}), make_row())
    assert [row["output_logprobs"] for row in rows] == [[], None]
    assert [row["output_top_tokens"] for row in rows] == [[], None]


def test_log_probabilities_that_do_not_fit_together_are_refused() -> None:
    whole = make_logprobs([[(1, "a", -0.5)]])
    broken = Logprobs(
        token_ids=whole.token_ids,
        tokens=[],
        logprobs=whole.logprobs,
        ranks=whole.ranks,
        top_offsets=whole.top_offsets,
        top_token_ids=whole.top_token_ids,
        top_tokens=whole.top_tokens,
        top_logprobs=whole.top_logprobs,
    )
    with pytest.raises(ValueError, match="0 values where 1 belong"):
        to_table([make_row(completion={"logprobs": broken})])


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    bad = "a\ud800b"
    (row,) = stored(
        make_row(
            prompt={"text": bad, "gold_refs": (bad,), "category": bad, "gold_label": {"k": bad}},
            params={"stop": (bad,)},
            completion={"text": bad, "error_type": bad, "logprobs": make_logprobs([[(1, bad, -0.5)]])},
        )
    )
    for value in (row["prompt"], row["full_response"], row["prompt_category"], row["error_type"]):
        assert value == "a\ufffdb"
    assert row["gold_refs"] == row["stop"] == row["output_token_texts"] == ["a\ufffdb"]
    assert row["output_top_tokens"] == [["a\ufffdb"]]
    assert json.loads(row["gold_label"]) == {"k": bad}


def test_two_halves_of_a_surrogate_pair_become_their_character() -> None:
    (row,) = stored(make_row(completion={"text": "\ud83d\ude00 \ud800"}))
    assert row["full_response"] == "\U0001f600 \ufffd"


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FLOAT32 = st.floats(width=32, allow_nan=False, max_value=0)
POSITION = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.text(max_size=4), FLOAT32), max_size=4)


@given(
    st.lists(st.none() | st.lists(POSITION, max_size=4), max_size=5),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_text_and_any_log_probabilities_come_back(
    answers: list[list[list[tuple[int, str, float]]] | None], text: str
) -> None:
    rows = stored(
        *(
            make_row(
                prompt={"text": text},
                completion={"logprobs": None if tops is None else make_logprobs(tops), "text": text},
            )
            for tops in answers
        )
    )
    for row, tops in zip(rows, answers, strict=True):
        assert row["prompt"] == row["full_response"] == text
        if tops is None:
            assert row["output_top_logprobs"] is row["output_ranks"] is None
            continue
        assert row["output_top_token_ids"] == [[top[0] for top in position] for position in tops]
        assert row["output_top_tokens"] == [[top[1] for top in position] for position in tops]
        assert row["output_top_logprobs"] == [[top[2] for top in position] for position in tops]
        assert row["output_token_ids"] == [position[0][0] if position else 7 for position in tops]
        assert row["output_logprobs"] == [position[0][2] if position else None for position in tops]
        assert row["output_ranks"] == [1 if position else None for position in tops]
