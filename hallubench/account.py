"""The gate of one API account: every attempt passes it, first come, first served.

One `Account` stands for what a provider counts together (provider, key, base URL), whatever the
models. Who waits, waits in one line, so that a long prompt is not overtaken for ever by short ones.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from hallubench.limits import Bucket, Budget, Concurrency, Cost, Headroom, Quota, Sent
from hallubench.retry import backoff
from hallubench.types import Usage

TRUSTED_REFUSALS = 3
"""Refusals in a row after which a retry-after that keeps being too short is lengthened."""
PAUSE_WORTH_TELLING = 5.0
NOTHING = Usage(input_tokens=0, output_tokens=0)


class Account:
    """What an account's attempts share: its budgets, what its server says is left, and its pauses.

    Belongs to the event loop that runs when it is made, and reads its clock.

    Args:
        budget: what the config allows.
        on_pause: called with the seconds when everything has to wait for 5 seconds or longer.
    """

    def __init__(self, budget: Budget, on_pause: Callable[[float], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_pause = on_pause
        self._buckets = _buckets(budget, self._loop.time())
        self._concurrency = Concurrency(budget.max_concurrency)
        self._headroom: defaultdict[str, Headroom] = defaultdict(Headroom)
        self._line: deque[tuple[Cost, asyncio.Future[Permit]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._in_flight = 0
        self._slowdowns = 0
        self._paused_until = -math.inf
        self._refusals = 0
        self._refused_since: float | None = None

    @property
    def seconds_refused(self) -> float:
        """For how long the server will have taken nothing when the current pause ends."""
        return 0.0 if self._refused_since is None else self._paused_until - self._refused_since

    def impossible(self, cost: Cost) -> str | None:
        """Why an attempt could never be admitted, with the fix; None if it can."""
        for resource, bucket in self._buckets.items():
            if (amount := getattr(cost, resource)) > bucket.capacity:
                return (
                    f"needs up to {amount} {resource.replace('_', ' ')}, more than the account's "
                    f"{resource}_per_minute ({bucket.capacity:g}): raise that, "
                    + ("or lower `max_tokens`" if resource == "output_tokens" else "or leave the prompt out")
                )
        return None

    async def admit(self, cost: Cost) -> Permit:
        """Wait in line until an attempt may be sent; it is in flight until its permit is released.

        A cost that is `impossible` waits for ever.
        """
        future: asyncio.Future[Permit] = self._loop.create_future()
        self._line.append((cost, future))
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._serve()  # whoever stood behind may go
            else:  # admitted and cancelled within one turn of the loop
                self._release(future.result())
            raise

    def _serve(self) -> None:
        """Admit whoever is first in line, until somebody has to wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        while self._line:
            cost, future = self._line[0]
            if not future.done():
                if self._in_flight >= self._concurrency.limit:
                    return  # the next release serves
                if wait := self._wait(cost, now):
                    self._timer = self._loop.call_later(wait, self._serve)
                    return
                future.set_result(self._admit(cost))
            self._line.popleft()

    def _wait(self, cost: Cost, now: float) -> float:
        return max(
            0.0,
            self._paused_until - now,
            self._headroom[cost.model].wait(cost, now),
            *(bucket.wait(getattr(cost, resource), now) for resource, bucket in self._buckets.items()),
        )

    def _admit(self, cost: Cost) -> Permit:
        self._in_flight += 1
        for resource, bucket in self._buckets.items():
            bucket.take(getattr(cost, resource))
        return Permit(self, cost, self._headroom[cost.model].take(cost), self._slowdowns)

    def _release(self, permit: Permit) -> None:
        self._in_flight -= 1
        self._serve()

    def answered(self, permit: Permit, usage: Usage) -> None:
        """The attempt was answered: the real usage replaces what was reserved for it."""
        self._settle(permit.cost, usage)
        self._refused_since = None
        self._refusals = 0
        if permit.slowdowns == self._slowdowns:  # else it says nothing about the new limit
            self._concurrency.grow(self._in_flight)

    def rejected(self, permit: Permit) -> None:
        """The attempt ended in an error status: what was reserved for it was not spent."""
        self._settle(permit.cost, NOTHING)

    def refused(self, permit: Permit, after: float | None) -> None:
        """The server has too much to do: pause for `after` seconds and go on at half the speed.

        Attempts that were in flight together are refused together and slow the account down once.
        Without `after`, pauses grow from refusal to refusal like the backoff of a retry.
        """
        self._settle(permit.cost, NOTHING)
        now = self._loop.time()
        pause = after or 0.0
        if self._refused_since is None:
            self._refused_since = now
        if permit.slowdowns == self._slowdowns:  # else it was sent before the last one, and is old news
            self._slowdowns += 1
            self._refusals += 1
            self._concurrency.shrink(self._in_flight)
            for bucket in self._buckets.values():
                bucket.slow_down(now)
            if after is None:
                pause = backoff(self._refusals)
            elif self._refusals > TRUSTED_REFUSALS:
                pause = max(after, backoff(self._refusals - TRUSTED_REFUSALS))
        if self._on_pause and pause >= PAUSE_WORTH_TELLING and now + pause > self._paused_until + 1:
            self._on_pause(pause)
        self._paused_until = max(self._paused_until, now + pause)

    def observe(self, permit: Permit, quotas: Mapping[str, Quota]) -> None:
        """The response to an attempt said what is left of the server's own limits."""
        if quotas:
            self._headroom[permit.cost.model].observe(quotas, permit.sent, self._loop.time())

    def _settle(self, reserved: Cost, usage: Usage) -> None:
        for resource in ("input_tokens", "output_tokens"):
            spent: int | None = getattr(usage, resource)
            if resource in self._buckets and spent is not None:
                self._buckets[resource].take(spent - getattr(reserved, resource))


class Permit:
    """Leave for one attempt. Used with `with`, whose end lets the next one in."""

    def __init__(self, account: Account, cost: Cost, sent: Sent, slowdowns: int) -> None:
        self.cost = cost
        self.sent = sent
        self.slowdowns = slowdowns
        """How often the account had been slowed down when it was given."""
        self._account = account

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._account._release(self)


def _buckets(budget: Budget, now: float) -> dict[str, Bucket]:
    """The configured budgets, by the field of `Cost` that they count."""
    buckets = {}
    if (rate := budget.requests_per_minute) is not None:
        buckets["requests"] = Bucket(rate, capacity=budget.burst, level=budget.burst, now=now)
    for resource, rate in (
        ("input_tokens", budget.input_tokens_per_minute),
        ("output_tokens", budget.output_tokens_per_minute),
    ):
        if rate is not None:
            # A run may follow another one closely, so it does not begin with a whole minute's tokens.
            buckets[resource] = Bucket(rate, capacity=rate, level=rate / 6, now=now)
    return buckets
