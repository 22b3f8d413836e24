from __future__ import annotations

import math

import pytest

from hallubench.limits import Bucket, Concurrency, Cost, Headroom, Quota, estimate
from hallubench.types import Message, Prompt, Request, SamplingParams


def take_greedily(bucket: Bucket, until: float, amount: float = 1, start: float = 0) -> list[float]:
    """When a caller that never pauses gets its amounts."""
    times, now = [], start
    while now <= until:
        if wait := bucket.wait(amount, now):
            now += wait
        else:
            bucket.take(amount)
            times.append(now)
    return times


def most_in_a_minute(times: list[float]) -> int:
    return max(sum(start <= time <= start + 60 for time in times) for start in times)


def test_a_bucket_gives_its_burst_at_once_and_then_keeps_its_rate() -> None:
    times = take_greedily(Bucket(60, capacity=10, level=10, now=0), until=120)

    assert times[:10] == [0] * 10
    assert times[10:] == pytest.approx([(i + 1) / 0.99 for i in range(len(times) - 10)])


@pytest.mark.parametrize("rate", [1, 7, 60, 600])
def test_a_bucket_gives_at_most_rate_and_burst_in_any_minute_and_nearly_all_of_its_rate(rate: int) -> None:
    times = take_greedily(Bucket(rate, capacity=10, level=10, now=0), until=240)

    assert most_in_a_minute(times) <= rate + 10
    assert len(times) >= 0.97 * 4 * rate


def test_a_bucket_in_debt_gives_nothing_before_it_has_paid() -> None:
    bucket = Bucket(60, capacity=100, level=100, now=0)
    bucket.take(130)

    assert bucket.wait(10, 0) == pytest.approx(40 / 0.99)


def test_what_is_given_back_never_fills_a_bucket_above_its_capacity() -> None:
    bucket = Bucket(60, capacity=100, level=90, now=0)
    bucket.take(-50)

    assert bucket.wait(100, 0) == 0
    bucket.take(100)
    assert bucket.wait(1, 0) > 0


def test_an_amount_above_the_capacity_never_comes() -> None:
    assert Bucket(60, capacity=10, level=10, now=0).wait(11, 0) == math.inf


def test_a_slowed_bucket_is_empty_then_gives_half_its_rate_and_climbs_back() -> None:
    bucket = Bucket(600, capacity=10, level=10, now=0)
    bucket.slow_down(0)
    times = take_greedily(bucket, until=120)

    first, full = sum(time <= 10 for time in times), sum(60 < time <= 70 for time in times)
    assert times[0] > 0
    assert 0.5 * 99 <= first <= 0.65 * 99
    assert full == pytest.approx(99, abs=1)


def test_a_bucket_slowed_again_and_again_still_gives_something() -> None:
    bucket = Bucket(600, capacity=10, level=10, now=0)
    for _ in range(100):
        bucket.slow_down(0)

    assert bucket.wait(1, 0) <= 10


def answer_a_round(concurrency: Concurrency) -> int:
    for _ in range(limit := concurrency.limit):
        concurrency.grow(limit)
    return concurrency.limit


def test_concurrency_doubles_with_each_round_up_to_its_cap() -> None:
    concurrency = Concurrency()

    assert [answer_a_round(concurrency) for _ in range(5)] == [32, 64, 128, 256, 256]


def test_concurrency_halves_when_refused_and_then_climbs_slowly() -> None:
    concurrency = Concurrency(200)
    concurrency.shrink(200)
    rounds = [concurrency.limit, *(answer_a_round(concurrency) for _ in range(15))]

    assert rounds[0] == 100
    assert rounds[1] <= 106
    assert rounds[-1] == 200


def test_concurrency_shrinks_from_what_was_in_flight_and_never_below_one() -> None:
    concurrency = Concurrency(200)
    limits = []
    for in_flight in (8, 4, 2, 1, 1):
        concurrency.shrink(in_flight)
        limits.append(concurrency.limit)

    assert limits == [4, 2, 1, 1, 1]


def test_concurrency_that_is_not_used_does_not_grow() -> None:
    concurrency = Concurrency()
    for _ in range(100):
        concurrency.grow(2)

    assert concurrency.limit == 16


COST = Cost(model="m", input_tokens=100, output_tokens=2048)


def observed(headroom: Headroom, resource: str, quota: Quota) -> None:
    headroom.observe({resource: quota}, headroom.take(COST), now=0)


def test_headroom_waits_until_the_server_has_refilled_enough() -> None:
    headroom = Headroom()
    observed(headroom, "requests", Quota(limit=60, remaining=0, reset_after=60))

    assert headroom.wait(COST, now=0) == pytest.approx(1 / 0.99)
    assert headroom.wait(COST, now=2) == 0


def test_headroom_believes_a_limit_that_refills_slower_than_in_a_minute() -> None:
    headroom = Headroom()
    observed(headroom, "requests", Quota(limit=60, remaining=0, reset_after=600))

    assert headroom.wait(COST, now=0) == pytest.approx(10 / 0.99)


def test_headroom_forgets_after_a_minute_and_leaves_the_answer_to_the_server() -> None:
    headroom = Headroom()
    observed(headroom, "requests", Quota(limit=100, remaining=0, reset_after=86400))

    assert headroom.wait(COST, now=0) == 60
    assert headroom.wait(COST, now=60) == 0


def test_headroom_passes_over_what_cannot_be_a_limit() -> None:
    headroom = Headroom()
    for quota in (Quota(0, 0, 60), Quota(100, 100, 0), Quota(100, 50, float("inf"))):
        observed(headroom, "requests", quota)
        assert headroom.wait(COST, now=0) == 0


@pytest.mark.parametrize(
    ("resource", "remaining"), [("requests", 5), ("input_tokens", 500), ("output_tokens", 5), ("tokens", 505)]
)
def test_headroom_is_taken_by_what_is_sent(resource: str, remaining: int) -> None:
    headroom = Headroom()
    observed(headroom, resource, Quota(limit=1000, remaining=remaining, reset_after=60))

    sent = 0
    while headroom.wait(COST, now=0) == 0:
        headroom.take(COST)
        sent += 1
    assert sent == 5


def test_headroom_takes_off_what_was_sent_while_the_response_was_on_its_way() -> None:
    headroom = Headroom()
    first = headroom.take(COST)
    for _ in range(4):
        headroom.take(COST)
    headroom.observe({"requests": Quota(limit=60, remaining=5, reset_after=55)}, first, now=0)

    assert headroom.wait(COST, now=0) == 0
    headroom.take(COST)
    assert headroom.wait(COST, now=0) > 0


def test_headroom_does_not_believe_a_response_that_was_overtaken() -> None:
    headroom = Headroom()
    first, second = headroom.take(COST), headroom.take(COST)
    headroom.observe({"requests": Quota(limit=60, remaining=0, reset_after=60)}, second, now=0)
    headroom.observe({"requests": Quota(limit=60, remaining=60, reset_after=0)}, first, now=0)

    assert headroom.wait(COST, now=0) > 0


def test_headroom_lets_a_request_through_that_is_larger_than_the_servers_limit_once_it_is_full() -> None:
    headroom = Headroom()
    observed(headroom, "input_tokens", Quota(limit=60, remaining=57, reset_after=3))

    assert headroom.wait(COST, now=0) == pytest.approx(3 / 0.99)
    assert headroom.wait(COST, now=4) == 0


def request(prompt: Prompt, system_prompt: str | None = None) -> Request:
    return Request(
        request_id="r",
        prompt=prompt,
        sample_index=0,
        provider="p",
        model="m",
        system_prompt=system_prompt,
        params=SamplingParams(max_tokens=2048),
    )


@pytest.mark.parametrize(
    ("prompt", "system_prompt", "tokens"),
    [
        (Prompt(id="p", index=0, text="x" * 300), None, 100),
        (Prompt(id="p", index=0, text="x" * 300), "y" * 30, 110),
        (Prompt(id="p", index=0, messages=(Message("user", "x" * 30), Message("user", "yy"))), None, 11),
        (Prompt(id="p", index=0, text="日本語"), None, 3),
        (Prompt(id="p", index=0, text="\ud800"), None, 1),
    ],
)
def test_the_estimate_counts_all_text_of_a_request(
    prompt: Prompt, system_prompt: str | None, tokens: int
) -> None:
    cost = estimate(request(prompt, system_prompt))

    assert (cost.input_tokens, cost.output_tokens, cost.requests) == (tokens, 2048, 1)
