from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing
from datetime import UTC
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from skipping_loop import now, run

from hallubench.account import Account
from hallubench.api_lane import Answer, Complete, answer_all
from hallubench.attempts import AttemptLog
from hallubench.errors import LaneError, PromptError
from hallubench.limits import Budget, Quota
from hallubench.retry import Record, Retry, Stop, Verdict, verdict_of_status
from hallubench.types import Completion, Prompt, Request, SamplingParams, Usage

KEY = "sk-secret-key"


class ServerError(Exception):
    """Carries the verdict that `classify` reads."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.message)
        self.verdict = verdict


def classify(error: Exception) -> Verdict:
    assert isinstance(error, ServerError)
    return error.verdict


def status(code: int, message: str = "no", after: float | None = None) -> ServerError:
    return ServerError(verdict_of_status(code, message, after=after))


def requests(count: int, max_tokens: int = 100) -> Iterator[Request]:
    for i in range(count):
        yield Request(
            request_id=f"r{i}",
            prompt=Prompt(id=f"p{i}", index=i, text=f"question {i}"),
            sample_index=0,
            provider="p",
            model="m",
            system_prompt=None,
            params=SamplingParams(max_tokens=max_tokens),
        )


class Server:
    """Answers each prompt with an answer of its own after `latency` seconds, or does what it is told.

    `attempts` holds the arrival time of every call, `most` the largest number of calls at once.
    """

    def __init__(
        self, latency: float = 0.2, behave: Callable[[Request, int], Exception | float | None] | None = None
    ) -> None:
        self.latency = latency
        self.behave = behave or (lambda request, attempt: None)
        self.attempts: list[tuple[str, float]] = []
        self.asked: Counter[str] = Counter()
        self.now_open = self.most = 0

    async def complete(self, request: Request) -> Answer:
        self.attempts.append((request.request_id, now()))
        self.asked[request.request_id] += 1
        self.now_open += 1
        self.most = max(self.most, self.now_open)
        try:
            behaviour = self.behave(request, self.asked[request.request_id])
            if isinstance(behaviour, Exception):
                raise behaviour
            await asyncio.sleep(self.latency if behaviour is None else behaviour)
            return Answer(
                text=f"answer to {request.prompt.text}", usage=Usage(input_tokens=5, output_tokens=7)
            )
        finally:
            self.now_open -= 1


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Coroutine[Any, Any, list[Completion]]]:
    """Runs a lane to its end; what was finished before an error is in the list `into`."""

    async def ask(
        complete: Complete,
        questions: Iterable[Request],
        budget: Budget | None = None,
        into: list[Completion] | None = None,
        **options: Any,
    ) -> list[Completion]:
        completions = [] if into is None else into
        with AttemptLog(tmp_path / "attempts.jsonl") as log:
            account = Account(budget or Budget())
            lane = answer_all(questions, complete, classify, account=account, log=log, **options)
            async with aclosing(lane):
                async for completion in lane:
                    completions.append(completion)
        return completions

    return ask


Ask = Callable[..., Coroutine[Any, Any, list[Completion]]]


def read_log(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]


def test_every_request_gets_one_completion_in_the_order_they_finish(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: 10.0 - request.prompt.index)
    completions = run(ask(server.complete, requests(5)))

    assert [completion.request_id for completion in completions] == ["r4", "r3", "r2", "r1", "r0"]
    assert completions[0].text == "answer to question 4"
    assert completions[0].usage == Usage(input_tokens=5, output_tokens=7)
    assert completions[0].elapsed_seconds == pytest.approx(6)
    assert completions[0].timestamp.tzinfo is UTC
    assert completions[0].retry_count == 0


def test_no_requests_are_no_completions(ask: Ask) -> None:
    assert run(ask(Server().complete, [])) == []


def test_requests_are_drawn_as_they_can_be_sent(tmp_path: Path) -> None:
    drawn = 0

    def draw() -> Iterator[Request]:
        nonlocal drawn
        for request in requests(100_000):
            drawn += 1
            yield request

    async def main() -> None:
        server = Server()
        with AttemptLog(tmp_path / "attempts.jsonl") as log:
            lane = answer_all(
                draw(), server.complete, classify, account=Account(Budget(max_concurrency=8)), log=log
            )
            async with aclosing(lane):
                await anext(lane)
                assert drawn <= 2 * 8 + 1

    run(main())


def test_a_consumer_that_does_not_come_back_stops_the_drawing(tmp_path: Path) -> None:
    server = Server()

    async def main() -> None:
        with AttemptLog(tmp_path / "attempts.jsonl") as log:
            lane = answer_all(
                requests(100_000), server.complete, classify, account=Account(Budget()), log=log
            )
            async with aclosing(lane):
                await anext(lane)
                await asyncio.sleep(3600)

    run(main())
    assert 256 <= len(server.attempts) <= 1025


def test_a_failed_attempt_is_tried_again_after_one_two_and_four_seconds(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(500) if attempt < 4 else None)
    (completion,) = run(ask(server.complete, requests(1)))

    times = [time for _, time in server.attempts]
    assert [late - early for early, late in pairwise(times)] == pytest.approx([1, 2, 4], rel=0.26)
    assert completion.text == "answer to question 0"
    assert completion.retry_count == 3
    assert completion.elapsed_seconds == pytest.approx(0.2)


def test_a_retry_waits_at_least_as_long_as_the_server_asks(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(500, after=30) if attempt == 1 else None)
    run(ask(server.complete, requests(1)))

    assert server.attempts[1][1] == 30


def test_a_failed_attempt_keeps_no_tokens_of_the_budget(ask: Ask) -> None:
    """Ten seconds' worth of tokens is there at first, enough for one of these prompts."""
    server = Server(behave=lambda request, attempt: status(500) if attempt == 1 else None)
    run(ask(server.complete, requests(1), Budget(output_tokens_per_minute=600)))

    assert server.attempts[1][1] <= 1.25


def test_a_request_whose_retries_all_fail_is_recorded_and_the_run_goes_on(ask: Ask) -> None:
    server = Server(
        behave=lambda request, attempt: status(500, "boom") if request.prompt.index == 1 else None
    )
    completions = {completion.request_id: completion for completion in run(ask(server.complete, requests(3)))}

    failed = completions["r1"]
    assert (failed.error, failed.error_type, failed.retry_count, failed.text, failed.finish_reason) == (
        "Failed after 3 retries: boom",
        "server_error",
        3,
        None,
        "error",
    )
    assert server.asked == {"r0": 1, "r1": 4, "r2": 1}
    assert completions["r0"].text
    assert completions["r2"].text


def test_without_retries_the_first_failure_counts(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(500, "boom"))
    (completion,) = run(ask(server.complete, requests(1), max_retries=0))

    assert completion.error == "Failed after 0 retries: boom"
    assert len(server.attempts) == 1


def test_a_request_that_is_rejected_is_recorded_at_once(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(400, "prompt is too long"))
    (completion,) = run(ask(server.complete, requests(1)))

    assert (completion.error, completion.error_type) == ("prompt is too long", "bad_request")
    assert len(server.attempts) == 1


def test_a_request_that_no_budget_can_hold_is_recorded_without_being_sent(ask: Ask) -> None:
    server = Server()
    (completion,) = run(ask(server.complete, requests(1, 2048), Budget(output_tokens_per_minute=1000)))

    assert "`max_tokens`" in str(completion.error)
    assert server.attempts == []


def test_a_hang_ends_at_the_timeout_and_is_tried_again(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: 1e9 if attempt == 1 else None)
    (completion,) = run(ask(server.complete, requests(1), attempt_timeout=30))

    assert completion.text
    assert server.attempts[1][1] == pytest.approx(31, abs=0.3)


def test_a_request_that_hangs_every_time_is_recorded_as_a_timeout(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: 1e9)
    (completion,) = run(ask(server.complete, requests(1), attempt_timeout=30))

    assert completion.error == "Failed after 3 retries: no answer within 30 s"
    assert completion.error_type == "timeout"


def test_waiting_when_the_server_asks_to_uses_up_no_retry(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(429, after=20) if attempt <= 5 else None)
    (completion,) = run(ask(server.complete, requests(1)))

    assert completion.text
    assert completion.retry_count == 0
    assert server.attempts[-1][1] >= 100


def test_a_request_that_is_sent_away_for_ever_while_others_pass_fails_in_the_end(ask: Ask) -> None:
    server = Server(
        behave=lambda request, attempt: status(429, after=1) if not request.prompt.index else None
    )
    completions = {
        completion.request_id: completion for completion in run(ask(server.complete, requests(99)))
    }

    assert completions.pop("r0").error == "Failed after 3 retries: no"
    assert server.asked["r0"] == 14
    assert all(completion.text for completion in completions.values())


def test_a_busy_server_that_names_no_time_uses_up_retries(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(529, "overloaded"))
    (completion,) = run(ask(server.complete, requests(1)))

    assert completion.error == "Failed after 3 retries: overloaded"
    assert completion.error_type == "overloaded"


def test_an_account_that_is_refused_for_ten_minutes_stops_the_lane(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(429, "slow down", after=100))
    completions: list[Completion] = []
    with pytest.raises(LaneError, match=r"refused .* \(slow down\): run the same command again later"):
        run(ask(server.complete, requests(1000), into=completions))

    assert completions == []
    assert server.attempts[-1][1] <= 600


def test_a_server_that_asks_to_wait_for_an_hour_stops_the_lane_at_once(ask: Ask) -> None:
    server = Server(behave=lambda request, attempt: status(429, after=3600))
    with pytest.raises(LaneError):
        run(ask(server.complete, requests(1000)))

    assert server.attempts[-1][1] == 0


def test_a_lane_that_cannot_go_on_keeps_what_is_in_flight_and_leaves_the_rest_pending(ask: Ask) -> None:
    server = Server(
        latency=1, behave=lambda request, attempt: status(401) if request.prompt.index == 3 else None
    )
    completions: list[Completion] = []
    with pytest.raises(LaneError, match=r"^no: check `api_key`$"):
        run(ask(server.complete, requests(100), Budget(max_concurrency=8), into=completions))

    assert {completion.request_id for completion in completions} <= {f"r{i}" for i in range(9)} - {"r3"}
    assert len(completions) >= 3
    assert len(server.attempts) == len(completions) + 1


def test_a_prompts_file_that_breaks_off_ends_the_lane_after_what_was_asked(ask: Ask) -> None:
    def broken() -> Iterator[Request]:
        yield from requests(3)
        raise PromptError("line 4 is no JSON")

    completions: list[Completion] = []
    with pytest.raises(PromptError, match="line 4"):
        run(ask(Server().complete, broken(), into=completions))

    assert len(completions) == 3


def test_closing_the_lane_cancels_what_is_in_flight_and_logs_it(tmp_path: Path) -> None:
    server = Server(behave=lambda request, attempt: 1 + request.prompt.index * 1e6)

    async def main() -> None:
        with AttemptLog(tmp_path / "attempts.jsonl") as log:
            account = Account(Budget(max_concurrency=4))
            lane = answer_all(requests(100), server.complete, classify, account=account, log=log)
            async with aclosing(lane):
                await anext(lane)
            assert server.now_open == 0
            assert len(asyncio.all_tasks()) == 1

    run(main())
    assert [line["exception"] for line in read_log(tmp_path)] == [None] + ["CancelledError"] * 4


def test_a_lane_told_to_stop_starts_nothing_and_yields_what_soon_finishes(tmp_path: Path) -> None:
    server = Server(behave=lambda request, attempt: 2.0 if request.prompt.index else 1e6)

    async def main() -> tuple[list[Completion], float]:
        stopping = asyncio.Event()
        asyncio.get_running_loop().call_later(1, stopping.set)
        with AttemptLog(tmp_path / "attempts.jsonl") as log:
            account = Account(Budget(max_concurrency=4))
            lane = answer_all(
                requests(100), server.complete, classify, account=account, log=log, stopping=stopping
            )
            return [completion async for completion in lane], now()

    completions, ended = run(main())
    assert {completion.request_id for completion in completions} == {"r1", "r2", "r3"}
    assert len(server.attempts) == 4
    assert ended == pytest.approx(1 + 5)


def test_a_lane_told_to_stop_does_not_wait_for_retries_or_budgets(tmp_path: Path) -> None:
    server = Server(behave=lambda request, attempt: status(429, after=500))

    async def main() -> float:
        stopping = asyncio.Event()
        asyncio.get_running_loop().call_later(1, stopping.set)
        with AttemptLog(tmp_path / "attempts.jsonl") as log:
            lane = answer_all(
                requests(100),
                server.complete,
                classify,
                account=Account(Budget()),
                log=log,
                stopping=stopping,
            )
            assert [completion async for completion in lane] == []
        return now()

    assert run(main()) == 1


def test_what_fails_while_the_lane_stops_is_left_pending(tmp_path: Path) -> None:
    async def complete(request: Request) -> Answer:
        calls.append(now())
        await asyncio.sleep(2)
        raise status(500)

    async def main() -> list[Completion]:
        stopping = asyncio.Event()
        asyncio.get_running_loop().call_later(1, stopping.set)
        with AttemptLog(tmp_path / "attempts.jsonl") as log:
            lane = answer_all(
                requests(1), complete, classify, account=Account(Budget()), log=log, stopping=stopping
            )
            return [completion async for completion in lane]

    calls: list[float] = []
    assert run(main()) == []
    assert calls == [0]


def test_every_attempt_leaves_a_line(ask: Ask, tmp_path: Path) -> None:
    server = Server(behave=lambda request, attempt: status(503, after=7) if attempt == 1 else None)
    run(ask(server.complete, requests(1)))

    first, second = read_log(tmp_path)
    assert [first.pop("sent_at"), second.pop("sent_at")] != [None, None]
    assert first == {
        "request_id": "r0",
        "attempt": 1,
        "wait": 0,
        "seconds": 0,
        "status": 503,
        "exception": "ServerError",
        "provider_request_id": None,
    }
    assert (second["attempt"], second["wait"], second["seconds"]) == (2, 7, 0.2)
    assert (second["status"], second["exception"]) == (200, None)


@pytest.mark.parametrize("verdict", [Retry, Record, Stop])
def test_a_key_in_a_servers_words_never_gets_out(
    ask: Ask, tmp_path: Path, verdict: type[Retry] | type[Record] | type[Stop]
) -> None:
    message = f"bad request to https://host/?key={KEY}\nwith {KEY}"
    error = ServerError(verdict(error_type="x", message=message))
    server = Server(behave=lambda request, attempt: error)
    completions: list[Completion] = []
    seen = ""
    try:
        run(ask(server.complete, requests(1), into=completions, secrets=[KEY]))
    except LaneError as stopped:
        seen = str(stopped)
    seen += "".join(str(completion.error) for completion in completions)

    assert "bad request to https://host/?key=***" in seen
    assert KEY not in seen + (tmp_path / "attempts.jsonl").read_text()
    assert "\n" not in seen


def test_what_the_server_says_is_left_is_not_overdrawn(ask: Ask) -> None:
    """The server's bucket holds 50, refills 50 a minute, and refuses what it does not hold."""
    level, updated, refused = 50.0, 0.0, 0

    async def complete(request: Request) -> Answer:
        nonlocal level, updated, refused
        level, updated = min(50.0, level + (now() - updated) * 50 / 60), now()
        if level < 1:
            refused += 1
            raise status(429, after=1)
        level -= 1
        left = {"requests": Quota(50, int(level), (50 - level) * 60 / 50)}
        await asyncio.sleep(2)
        return Answer(text="", quotas=left)

    async def main() -> float:
        completions = await ask(complete, requests(200))
        assert len(completions) == 200
        return now()

    seconds = run(main())
    assert refused == 0
    assert seconds <= 150 / 50 * 60 * 1.1


@pytest.mark.parametrize("rate", [60, 1200])
def test_a_server_counts_at_most_rate_and_burst_in_any_minute_and_nearly_all_of_the_rate(
    ask: Ask, rate: int
) -> None:
    """Failures are retried within the budget, and the way to the server takes up to half a second."""
    dice = random.Random(rate)
    arrivals: list[float] = []

    async def complete(request: Request) -> Answer:
        await asyncio.sleep(dice.uniform(0, 0.5))
        arrivals.append(now())
        await asyncio.sleep(dice.uniform(0.1, 1))
        if dice.random() < 0.1:
            raise status(500)
        return Answer(text="")

    async def main() -> float:
        await ask(complete, requests(2 * rate), Budget(requests_per_minute=rate, burst=10))
        return now()

    run(main())
    arrivals.sort()
    first_of_minute = 0
    for last, time in enumerate(arrivals):
        while arrivals[first_of_minute] < time - 60:
            first_of_minute += 1
        assert last - first_of_minute + 1 <= rate + 10
    assert sum(time <= 120 for time in arrivals) >= 0.97 * 2 * rate


def test_token_budgets_hold_over_time_and_are_used_up(ask: Ask) -> None:
    """Prompts use 7 output tokens of the 100 they reserve; the budget is in what is used."""
    server = Server(latency=2)

    async def main() -> float:
        await ask(server.complete, requests(4000), Budget(output_tokens_per_minute=1400))
        return now()

    assert run(main()) == pytest.approx(4000 / 200 * 60, rel=0.03)


@pytest.mark.parametrize("room", [1, 20, 100])
def test_concurrency_finds_what_the_server_takes(ask: Ask, room: int) -> None:
    refused = 0

    def behave(request: Request, attempt: int) -> Exception | None:
        nonlocal refused
        if server.now_open > room:
            refused += 1
            return status(429, after=1)
        return None

    server = Server(latency=2, behave=behave)

    async def main() -> float:
        completions = await ask(server.complete, requests(50 * room))
        assert all(completion.text for completion in completions)
        return now()

    seconds = run(main())
    assert seconds <= 50 * 2 / 0.6
    assert refused <= 0.35 * len(server.attempts)


def test_two_hundred_connections_are_used_within_a_run_of_four_thousand(ask: Ask) -> None:
    server = Server()

    async def main() -> float:
        await ask(server.complete, requests(4000))
        return now()

    assert run(main()) <= 1.25 * 4000 / 256 * 0.2
    assert server.most == 256


def test_through_every_kind_of_trouble_each_prompt_is_answered_once(ask: Ask, tmp_path: Path) -> None:
    dice = random.Random(7)

    def behave(request: Request, attempt: int) -> Exception | float | None:
        trouble = dice.random()
        if trouble < 0.10:
            return status(429, after=0.1)
        if trouble < 0.15:
            return status(500)
        if trouble < 0.17:
            return ServerError(Retry(error_type="connection", message="reset"))
        if trouble < 0.19:
            return 1e6
        if trouble < 0.21:
            return ServerError(Retry(error_type="malformed", message="no JSON", status=200))
        return None

    server = Server(behave=behave)
    completions = run(ask(server.complete, requests(1000), attempt_timeout=10, max_retries=10))

    assert {completion.request_id: completion.text for completion in completions} == {
        request.request_id: f"answer to {request.prompt.text}" for request in requests(1000)
    }
    assert len(completions) == 1000
    log = read_log(tmp_path)
    assert len(log) == len(server.attempts)
    assert Counter(line["request_id"] for line in log) == server.asked
    assert sum(line["exception"] is None for line in log) == 1000


def test_the_failure_of_a_classifier_ends_the_lane(ask: Ask) -> None:
    class UnknownError(Exception):
        pass

    server = Server(behave=lambda request, attempt: UnknownError())
    with pytest.raises(AssertionError):
        run(ask(server.complete, requests(1)))
