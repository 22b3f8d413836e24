"""What API providers share: the settings of an account, and the loop behind `generate`.

A provider adds `complete` and `classify` (see `api_lane`), and the client of its SDK.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hallubench.account import Account
from hallubench.api_lane import Classify, Complete, answer_all
from hallubench.attempts import AttemptLog
from hallubench.config import BASE_URLS, USABLE_KEY
from hallubench.errors import ConfigError
from hallubench.limits import MOST_CONCURRENCY, Budget
from hallubench.providers import Context
from hallubench.types import Completion, Request


class MalformedError(ValueError):
    """A response with a good status is not what it should be; raised by `complete`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the entries of one account ask for; their budgets are the same (`plan.make_plan` sees to it)."""

    api_key: str | None
    """None where neither the entry nor the environment has one."""
    base_url: str
    timeout: float
    """Seconds after which an attempt is given up; the longest that any entry asks for."""
    max_retries: int
    budget: Budget

    @property
    def connections(self) -> int:
        """As many as the account may ever have in flight, so that none waits for another inside the SDK."""
        return self.budget.max_concurrency or MOST_CONCURRENCY

    @property
    def secrets(self) -> Collection[str]:
        """What no message may hold."""
        return {self.api_key} if self.api_key else set()


def settings_of(context: Context) -> Settings:
    """Read the settings of a context's account from the config and the environment.

    Raises:
        ConfigError: the key holds what no key has and no HTTP header can carry.
    """
    config, first = context.config, context.entries[0]
    if first.key and not USABLE_KEY.fullmatch(first.key):
        raise ConfigError(f"{first.name}: the API key holds spaces or special characters; copy it again")
    limits = {key: config.limit(first, key) for key in Budget.__dataclass_fields__}
    return Settings(
        api_key=first.key,
        base_url=first.base_url or BASE_URLS[first.type],
        timeout=max(config.limit(entry, "timeout") for entry in context.entries),
        max_retries=config.max_retries,
        budget=Budget(**limits),
    )


@contextmanager
def open_api(
    context: Context, settings: Settings, complete: Complete, classify: Classify
) -> Iterator[ApiProvider]:
    """Open a provider out of the two functions that are its own, with its account and its log.

    Args:
        context: what the provider is opened with.
        settings: `settings_of(context)`.
        complete: makes one call for one request, without retries of its own.
        classify: says what follows from an exception of `complete`.
    """

    def on_pause(seconds: float) -> None:
        context.notify(f"{context.entries[0].type}: the server asks to wait; going on in {seconds:.0f} s")

    with AttemptLog(context.runs_dir / f"{context.run_id}.attempts.jsonl") as log:
        yield ApiProvider(
            settings, Account(settings.budget, on_pause), log, complete, classify, context.stopping
        )


class ApiProvider:
    """Answers requests by calls to an API, within the budget of its account."""

    def __init__(
        self,
        settings: Settings,
        account: Account,
        log: AttemptLog,
        complete: Complete,
        classify: Classify,
        stopping: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._account = account
        self._log = log
        self._complete = complete
        self._classify = classify
        self._stopping = stopping

    def generate(self, requests: Iterable[Request]) -> AsyncGenerator[Completion, None]:
        return answer_all(
            requests,
            self._complete,
            self._classify,
            account=self._account,
            log=self._log,
            secrets=self._settings.secrets,
            max_retries=self._settings.max_retries,
            attempt_timeout=self._settings.timeout,
            stopping=self._stopping,
        )
