"""How much an account may ask, as plain arithmetic on a clock that the caller reads.

Four things hold a request back, and `account.Account` asks all of them: the budgets that the config
sets (`Bucket`), what the server says is left of its own limits (`Headroom`), how many requests may be
in flight (`Concurrency`), and a pause that the server asked for. Times are seconds on any monotonic
clock. Nothing here waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hallubench.types import Request

MARGIN = 0.99
"""Share of a configured rate that is used. The rest is what the network may bunch requests up by, so
that the server, too, never counts more than rate + burst in a minute."""
CLIMB_SECONDS = 60.0
"""A slowed bucket is back from standstill to its full rate after so long."""
SLOWEST_PACE = 1 / 64
SHORTEST_WAIT = 1e-6
"""Seconds; below it lies what rounding leaves of a wait that was served."""
BELIEF_SECONDS = 60.0
BYTES_PER_TOKEN = 3
"""Below what tokenizers reach on English (about 4), so that an estimate rarely falls short."""

FIRST_CONCURRENCY = 16
MOST_CONCURRENCY = 256
CLIMB_PER_ROUND = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a config allows an account; None is no limit of ours."""

    requests_per_minute: float | None = None
    burst: int = 10
    """Requests that may go out at once after a quiet while."""
    input_tokens_per_minute: float | None = None
    output_tokens_per_minute: float | None = None
    max_concurrency: int | None = None
    """Requests in flight; None adapts to what the server takes, up to 256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one attempt is expected to take from the budgets; the real usage settles it afterwards."""

    model: str
    """Servers keep limits for each model; see `Headroom`."""
    requests: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    """The most it can be: `max_tokens`."""


def estimate(request: Request) -> Cost:
    """The cost of a request before it is sent: its text at 3 bytes a token, and all of `max_tokens`."""
    texts = [turn.content for turn in request.prompt.messages or ()]
    texts += [request.prompt.text or "", request.system_prompt or ""]
    size = sum(len(text.encode(errors="replace")) for text in texts)
    return Cost(
        model=request.model,
        input_tokens=math.ceil(size / BYTES_PER_TOKEN),
        output_tokens=request.params.max_tokens,
    )


class Bucket:
    """A token bucket, refilled continuously: at most `per_minute + capacity` in any minute.

    An amount that is settled later may leave it in debt, which it pays before it gives again.
    """

    def __init__(self, per_minute: float, capacity: float, level: float, now: float) -> None:
        self.capacity = capacity
        self._rate = MARGIN * per_minute / 60
        self._level = level
        self._pace = 1.0
        self._updated = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be there, 0 if it is; ask again then. Infinite above the capacity."""
        if amount > self.capacity:
            return math.inf
        self._refill(now)
        wait = (amount - self._level) / (self._rate * self._pace)
        if wait < SHORTEST_WAIT:
            return 0.0
        return wait if self._pace == 1 else min(wait, 1.0)  # by then the pace has climbed

    def take(self, amount: float) -> None:
        """Take what `wait` found to be there; a negative amount is given back."""
        self._level = min(self.capacity, self._level - amount)

    def slow_down(self, now: float) -> None:
        """The server refused: nothing is left there, and half the rate is the new one, climbing back."""
        self._refill(now)
        self._level = min(self._level, 0.0)
        self._pace = max(SLOWEST_PACE, self._pace / 2)

    def _refill(self, now: float) -> None:
        elapsed, self._updated = now - self._updated, now
        climbing = min(elapsed, CLIMB_SECONDS * (1 - self._pace))
        at_full_pace = elapsed - climbing
        climbed = climbing * (self._pace + climbing / CLIMB_SECONDS / 2)
        self._pace = 1.0 if at_full_pace else self._pace + climbing / CLIMB_SECONDS
        self._level = min(self.capacity, self._level + self._rate * (climbed + at_full_pace))


class Concurrency:
    """How many requests may be in flight: grows while the server takes them, halves when it refuses.

    It doubles with each round of answers until the first refusal, and grows by one or 5% a round from
    then on. A configured limit is where it starts and what it never passes.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most or MOST_CONCURRENCY
        self._limit = float(most or FIRST_CONCURRENCY)
        self._was_refused = False
        self._peak = 0

    @property
    def limit(self) -> int:
        return int(self._limit)

    def grow(self, in_flight: int) -> None:
        """An answer came while `in_flight` requests were out, its own included."""
        self._peak = max(self._peak, in_flight)
        if self._limit < 2 * self._peak:  # a limit that is not used proves nothing
            step = max(1 / self._limit, CLIMB_PER_ROUND) if self._was_refused else 1.0
            self._limit = min(self._most, self._limit + step)

    def shrink(self, in_flight: int) -> None:
        """The server refused one of `in_flight` requests."""
        self._was_refused = True
        self._peak = 0
        self._limit = max(1.0, min(self._limit, in_flight) / 2)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a response's headers say about one of the server's own limits, which refills continuously."""

    limit: float
    remaining: float
    reset_after: float
    """Seconds until `remaining` is `limit` again."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What has been sent to a model so far."""

    requests: int = 0
    input_tokens: int = 0

    def __add__(self, cost: Cost) -> Sent:
        return Sent(self.requests + cost.requests, self.input_tokens + cost.input_tokens)

    def of(self, resource: str) -> int:
        """How much of a server's resource that is; an output counts as one token until it is there."""
        match resource:
            case "input_tokens":
                return self.input_tokens
            case "tokens":
                return self.input_tokens + self.requests
            case _:
                return self.requests


class Headroom:
    """What a server says is left for one model, as buckets that each response sets right.

    Resources are `requests`, `input_tokens`, `output_tokens`, and `tokens` (both together). What it said
    is forgotten after a minute: a limit per minute is full again by then, and of a longer one, the
    server's refusal tells more.
    """

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}
        self._sent = Sent()
        self._latest = Sent()
        self._believed_until = 0.0

    def take(self, cost: Cost) -> Sent:
        """Count an attempt, and tell what had been sent with it; `observe` wants to know."""
        for resource, bucket in self._buckets.items():
            bucket.take((Sent() + cost).of(resource))
        self._sent += cost
        return self._sent

    def wait(self, cost: Cost, now: float) -> float:
        """Seconds until the server should have room for `cost`, 0 if it has; ask again then."""
        if now >= self._believed_until:
            self._buckets.clear()
        amount = Sent() + cost
        waits = [
            bucket.wait(min(amount.of(resource), bucket.capacity), now)
            for resource, bucket in self._buckets.items()
        ]
        return min(max(waits), self._believed_until - now) if waits else 0.0

    def observe(self, quotas: Mapping[str, Quota], sent: Sent, now: float) -> None:
        """A response came to the attempt with which `sent` had been sent.

        What was sent after it is taken off, because the server may not have counted that. A response
        that was overtaken by the one to a later attempt says nothing new.
        """
        if sent.requests < self._latest.requests:
            return
        self._latest = sent
        self._believed_until = now + BELIEF_SECONDS
        for resource, quota in quotas.items():
            if quota.limit <= 0:
                continue
            rate = quota.limit / 60
            if quota.remaining < quota.limit and 0 < quota.reset_after < math.inf:
                rate = min(rate, (quota.limit - quota.remaining) / quota.reset_after)
            level = quota.remaining - (self._sent.of(resource) - sent.of(resource))
            self._buckets[resource] = Bucket(60 * rate, quota.limit, level, now)
