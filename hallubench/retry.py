"""What follows from a failed attempt: try again and when, record it, or stop the lane.

A provider classifies each exception into one `Verdict`, so that whether to retry and how long to
wait are one value. What an HTTP status means is the same everywhere and stands here; a provider
decides only what its own service says differently (a 429 that is a spend limit).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeAlias

from hallubench.limits import Quota

LONGEST_BACKOFF = 60.0

RETRIED = {408: "timeout", 409: "conflict", 429: "rate_limit", 503: "overloaded", 529: "overloaded"}
SLOWING = {429, 503, 529}
STOPPING = {
    401: ("authentication", "check `api_key`"),
    403: ("authentication", "check what `api_key` is allowed to use"),
    404: ("not_found", "check the model's `name` and `base_url`"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What every verdict tells about the attempt."""

    error_type: str
    """For the store: rate_limit, overloaded, server_error, conflict, timeout, connection, malformed,
    bad_request, content_filter, authentication, not_found, spend_limit."""
    message: str
    """What went wrong, in the server's words where it has any. Keys in it are masked later."""
    status: int | None = None
    """The HTTP status, where there was one."""
    provider_request_id: str | None = None
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """What the response's headers say is left; keys as in `limits.Headroom`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry(Failure):
    """It may pass: try again after a backoff, and not before the server's own time."""

    after: float | None = None
    """Seconds that the server asks to wait (retry-after, RetryInfo)."""
    slow_account: bool = False
    """The account or the server has too much to do: everything on the account slows down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Failure):
    """The request itself cannot be answered (rejected, blocked): it fails, and the others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Failure):
    """No request of the lane can be answered (bad key, unknown model, spend limit).

    `message` is what the user reads: one line that ends with the fix.
    """


Verdict: TypeAlias = Retry | Record | Stop


def verdict_of_status(
    status: int,
    message: str,
    *,
    after: float | None = None,
    provider_request_id: str | None = None,
    quotas: Mapping[str, Quota] | None = None,
) -> Verdict:
    """What an HTTP error status means, where the provider has no better word for it.

    408, 409, 429 and 5xx are tried again, and 429, 503 and 529 slow the account; 401, 403 and 404
    stop the lane; any other belongs to its request alone. The arguments are those of `Retry`.
    """
    quotas = quotas or {}
    if status in STOPPING:
        error_type, fix = STOPPING[status]
        return Stop(
            error_type=error_type,
            message=f"{message.rstrip('.')}: {fix}",
            status=status,
            provider_request_id=provider_request_id,
            quotas=quotas,
        )
    if status in RETRIED or status >= 500:
        return Retry(
            error_type=RETRIED.get(status, "server_error"),
            message=message,
            status=status,
            provider_request_id=provider_request_id,
            quotas=quotas,
            after=after,
            slow_account=status in SLOWING,
        )
    return Record(
        error_type="bad_request",
        message=message,
        status=status,
        provider_request_id=provider_request_id,
        quotas=quotas,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `retry-after-ms` or `retry-after` ask to wait; None without a usable one.

    A date is taken against the server's own `date`, so that a wrong clock here does not matter.
    Names are in lower case, or the mapping does not mind (httpx, requests).
    """
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers["retry-after"])
    except KeyError:
        return None
    except ValueError:
        try:
            sent = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
            seconds = (parsedate_to_datetime(headers["retry-after"]) - sent).total_seconds()
        except (KeyError, ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def backoff(retry: int) -> float:
    """Seconds before the `retry`-th retry, from 1: 1, 2, 4, ... up to 60, each a quarter more or less."""
    jitter = random.uniform(0.75, 1.25)  # noqa: S311  # spreads retries; no secret hangs on it
    return min(LONGEST_BACKOFF, 2.0 ** min(retry - 1, 10)) * jitter
