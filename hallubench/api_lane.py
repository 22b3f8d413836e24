"""The loop of every API provider: requests in, completions out, as fast as the account allows.

A provider writes `complete(request)`, which makes one HTTP call, and `classify(exception)`, which
says what follows from its failure. Budgets, retries, concurrency, order, the log of attempts and
the way to stop are here, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeAlias

from hallubench.account import Account, Permit
from hallubench.attempts import AttemptLog
from hallubench.errors import LaneError
from hallubench.limits import Quota, estimate
from hallubench.redact import redact
from hallubench.retry import Failure, Record, Retry, Stop, Verdict, backoff
from hallubench.text import printable
from hallubench.types import Completion, FinishReason, Logprobs, Request, Usage

GRACE_SECONDS = 5.0
"""What is in flight when a lane stops may finish for so long: it may be paid for."""
MOST_OPEN = 1_024
"""Requests drawn and not yet yielded: in flight, waiting for a retry, or for the consumer."""
FREE_REFUSALS = 10
"""How often a server may ask one request to come back later before that counts as a failed try."""
PATIENCE_SECONDS = 600.0
"""A lane stops when its account would have been refused everything for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one successful call brought; the fields are those of `types.Completion`."""

    text: str
    finish_reason: FinishReason = "stop"
    provider_finish_reason: str | None = None
    reasoning: str | None = None
    usage: Usage = field(default_factory=Usage)
    model_version: str | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    logprobs_mode: str | None = None
    provider_request_id: str | None = None
    status: int = 200
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """What the response's headers say is left; keys as in `limits.Headroom`."""


Complete: TypeAlias = Callable[[Request], Awaitable[Answer]]
Classify: TypeAlias = Callable[[Exception], Verdict]


async def answer_all(
    requests: Iterable[Request],
    complete: Complete,
    classify: Classify,
    *,
    account: Account,
    log: AttemptLog,
    secrets: Collection[str] = (),
    max_retries: int = 3,
    attempt_timeout: float = 600.0,
    stopping: asyncio.Event | None = None,
) -> AsyncGenerator[Completion, None]:
    """Answer every request once and yield each completion as it is whole.

    Requests are drawn as they can be sent, one ahead: a million of them cost no memory. A failed
    attempt is tried again after 1, 2, 4, ... seconds (a quarter more or less), and not before the
    time the server names. A server that is busy and names a time does not use up a retry: the
    account waits, not the prompt; after `FREE_REFUSALS` of them, it does.

    The generator ends early, with what is in flight given `GRACE_SECONDS` to finish and the rest
    left pending, when `stopping` is set, when the lane cannot go on, or when `requests` raises;
    the last two then raise. Closing it cancels what is in flight.

    Args:
        requests: drawn from lazily, in this event loop.
        complete: makes one call, without retries of its own; safe to cancel.
        classify: says what follows from an exception of `complete`; knows every one.
        account: the gate that every attempt passes; its connections must be enough for it.
        log: gets a line for every attempt.
        secrets: what must not appear in any message, such as the API key.
        max_retries: tries after the first one.
        attempt_timeout: seconds after which an attempt is given up, and retried.
        stopping: set by others to end soon.

    Raises:
        LaneError: `classify` said `Stop`, or the server took nothing for `PATIENCE_SECONDS`.
    """
    lane = _Lane(complete, classify, account, log, secrets, max_retries, attempt_timeout)
    watch = asyncio.ensure_future((stopping or asyncio.Event()).wait())
    watch.add_done_callback(lambda _: lane.stop())
    lane.start(requests)
    try:
        while (completion := await lane.finished()) is not None:
            yield completion
    finally:
        watch.cancel()
        await lane.close()


class _Lane:
    """One run of `answer_all`: a task that draws the requests, and one for each that is open."""

    def __init__(
        self,
        complete: Complete,
        classify: Classify,
        account: Account,
        log: AttemptLog,
        secrets: Collection[str],
        max_retries: int,
        attempt_timeout: float,
    ) -> None:
        self._complete = complete
        self._classify = classify
        self._account = account
        self._log = log
        self._secrets = secrets
        self._max_retries = max_retries
        self._attempt_timeout = attempt_timeout
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Completion | None]] = set()
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._finished: asyncio.Queue[Completion | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(MOST_OPEN)
        self._stopping = False
        self._deadline: asyncio.TimerHandle | None = None
        self._error: BaseException | None = None

    def start(self, requests: Iterable[Request]) -> None:
        self._spawn(self._draw(requests))

    async def finished(self) -> Completion | None:
        """The next completion, or None when all has ended.

        Raises:
            LaneError: all has ended because the lane could not go on.
        """
        completion = await self._finished.get()
        if completion is not None:
            self._room.release()
        elif self._error is not None:
            raise self._error
        return completion

    def stop(self, error: BaseException | None = None) -> None:
        """Start no attempt any more and let those in flight finish, if they do soon.

        Args:
            error: why, where something went wrong.
        """
        self._error = self._error or error
        if not self._stopping:
            self._stopping = True
            for task in self._tasks - self._in_flight:
                task.cancel()
            self._deadline = self._loop.call_later(GRACE_SECONDS, self._cancel_all)

    async def close(self) -> None:
        """Cancel what still runs, and wait for it to end."""
        self._stopping = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._cancel_all()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, Completion | None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Completion | None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            if (error := task.exception()) is not None:
                self.stop(error)
            elif (completion := task.result()) is not None:
                self._finished.put_nowait(completion)
        if not self._tasks:
            self._finished.put_nowait(None)

    def _cancel_all(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _draw(self, requests: Iterable[Request]) -> None:
        """Open one request after another, each when the one before it has been admitted."""
        for request in requests:
            await self._room.acquire()
            admitted = asyncio.Event()
            self._spawn(self._answer(request, admitted))
            await admitted.wait()

    async def _answer(self, request: Request, admitted: asyncio.Event) -> Completion | None:
        """Try until there is an answer or an error to record; None if the lane stops before that."""
        cost = estimate(request)
        if problem := self._account.impossible(cost):
            admitted.set()
            return self._failed(request, Record(error_type="bad_request", message=problem), 0.0, retries=0)
        retries = refusals = 0
        ready_at = self._loop.time()
        attempt = 0
        while True:
            attempt += 1
            with await self._account.admit(cost) as permit:
                admitted.set()
                outcome, seconds = await self._attempt(request, attempt, self._loop.time() - ready_at)
                self._learn(permit, outcome)
            ready_at = self._loop.time()
            match outcome:
                case Answer():
                    return self._answered(request, outcome, seconds, retries)
                case Record():
                    return self._failed(request, outcome, seconds, retries)
                case Stop():
                    raise LaneError(self._clean(outcome.message))
            if outcome.slow_account and self._account.seconds_refused > PATIENCE_SECONDS:
                raise LaneError(
                    f"refused for {PATIENCE_SECONDS:.0f} s or longer ({self._clean(outcome.message)}): "
                    "run the same command again later, or lower `requests_per_minute` or `max_concurrency`"
                )
            if self._stopping:
                return None
            if outcome.slow_account and outcome.after is not None and refusals < FREE_REFUSALS:
                refusals += 1
            elif retries < self._max_retries:
                retries += 1
                await asyncio.sleep(max(backoff(retries), outcome.after or 0.0))
            else:
                outcome = replace(outcome, message=f"Failed after {retries} retries: {outcome.message}")
                return self._failed(request, outcome, seconds, retries)

    async def _attempt(self, request: Request, attempt: int, wait: float) -> tuple[Answer | Verdict, float]:
        """One call, what came of it and its seconds, with its line in the log."""
        task = asyncio.current_task()
        assert task is not None
        self._in_flight.add(task)
        sent_at, started = datetime.now(UTC), self._loop.time()
        outcome: Answer | Verdict | None = None
        exception: str | None = asyncio.CancelledError.__name__
        try:
            outcome, exception = await self._call(request)
        finally:
            self._in_flight.discard(task)
            seconds = self._loop.time() - started
            self._log.write(
                request_id=request.request_id,
                attempt=attempt,
                sent_at=sent_at,
                wait=wait,
                seconds=seconds,
                status=outcome.status if outcome else None,
                exception=exception,
                provider_request_id=outcome.provider_request_id if outcome else None,
            )
        return outcome, seconds

    async def _call(self, request: Request) -> tuple[Answer | Verdict, str | None]:
        """The answer, or the verdict on the exception and the exception's name."""
        limit = asyncio.timeout(self._attempt_timeout)
        try:
            async with limit:
                return await self._complete(request), None
        except Exception as error:
            if limit.expired():
                message = f"no answer within {self._attempt_timeout:g} s"
                return Retry(error_type="timeout", message=message), type(error).__name__
            return self._classify(error), type(error).__name__

    def _learn(self, permit: Permit, outcome: Answer | Verdict) -> None:
        """Tell the account what the attempt says about it."""
        self._account.observe(permit, outcome.quotas)
        match outcome:
            case Answer():
                self._account.answered(permit, outcome.usage)
            case Retry(slow_account=True):
                self._account.refused(permit, outcome.after)
            case Failure(status=int(status)) if status >= 400:
                self._account.rejected(permit)

    def _answered(self, request: Request, answer: Answer, seconds: float, retries: int) -> Completion:
        return Completion(
            request_id=request.request_id,
            timestamp=datetime.now(UTC),
            elapsed_seconds=seconds,
            text=answer.text,
            finish_reason=answer.finish_reason,
            provider_finish_reason=answer.provider_finish_reason,
            reasoning=answer.reasoning,
            usage=answer.usage,
            model_version=answer.model_version,
            logprobs=answer.logprobs,
            prompt_logprobs=answer.prompt_logprobs,
            logprobs_mode=answer.logprobs_mode,
            provider_request_id=answer.provider_request_id,
            retry_count=retries,
        )

    def _failed(self, request: Request, failure: Failure, seconds: float, retries: int) -> Completion:
        return Completion(
            request_id=request.request_id,
            timestamp=datetime.now(UTC),
            elapsed_seconds=seconds,
            finish_reason="error",
            provider_request_id=failure.provider_request_id,
            error=self._clean(failure.message),
            error_type=failure.error_type,
            retry_count=retries,
        )

    def _clean(self, message: str) -> str:
        return printable(redact(message, self._secrets))
