from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from hallubench.retry import Record, Retry, Stop, backoff, retry_after, verdict_of_status


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(status: int) -> None:
    verdict = verdict_of_status(status, "no", after=3.0, provider_request_id="req_1")

    assert isinstance(verdict, Retry)
    assert (verdict.status, verdict.after, verdict.provider_request_id) == (status, 3.0, "req_1")
    assert verdict.slow_account == (status in {429, 503, 529})


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_belongs_to_one_request_is_recorded(status: int) -> None:
    assert isinstance(verdict_of_status(status, "prompt is too long"), Record)


@pytest.mark.parametrize(("status", "key"), [(401, "`api_key`"), (403, "`api_key`"), (404, "`name`")])
def test_what_no_request_survives_stops_the_lane_and_names_the_key_to_fix(status: int, key: str) -> None:
    verdict = verdict_of_status(status, "no such thing")

    assert isinstance(verdict, Stop)
    assert verdict.message.startswith("no such thing: ")
    assert key in verdict.message


NOW = datetime(2026, 1, 31, 10, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "53"}, 53.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "2", "retry-after-ms": "1500"}, 1.5),
        (
            {"retry-after": format_datetime(NOW + timedelta(seconds=9)), "date": format_datetime(NOW)},
            9.0,
        ),
        ({"retry-after": format_datetime(NOW)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_the_time_that_a_server_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_backoff_doubles_from_one_second_with_jitter_up_to_a_minute() -> None:
    for retry, seconds in [(1, 1), (2, 2), (3, 4), (7, 60), (5000, 60)]:
        drawn = {backoff(retry) for _ in range(50)}
        assert all(0.75 * seconds <= wait <= 1.25 * seconds for wait in drawn)
        assert len(drawn) > 1
