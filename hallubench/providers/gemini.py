"""Gemini, through either of Google's SDKs: what is asked, and what the API's errors mean.

The entry's `sdk` names the one that sends: "google-generativeai", the default, whose support has
ended, or "google-genai". The entry's `options` can hold `safety_settings`, a list of the API's
SafetySettings, and `thinking`, its ThinkingConfig (google-genai only); both are passed on as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import Any, TypeAlias

from hallubench.api_lane import Answer
from hallubench.errors import ConfigError
from hallubench.providers import Context
from hallubench.providers.api import (
    ApiProvider,
    MalformedError,
    Settings,
    open_api,
    settings_of,
)
from hallubench.providers.gemini_response import BlockedError, answer
from hallubench.retry import Record, Retry, Stop, Verdict, retry_after, verdict_of_status
from hallubench.types import Request, SamplingParams

SDKS = {
    "google-generativeai": "hallubench.providers.google_generativeai",
    "google-genai": "hallubench.providers.google_genai",
}
"""The files that send, each with an `open_sdk`."""

Send: TypeAlias = Callable[[Request], Awaitable[bytes | str]]
"""Makes one HTTP call and returns the body of a good answer. Safe to cancel.

It raises `StatusError`, `MalformedError`, `TimeoutError` or `ConnectionError`, whatever its SDK raises.
"""
OpenSdk: TypeAlias = Callable[[Context, Settings], AbstractAsyncContextManager[Send]]

API_KEY = re.compile(r"\bAPI key\b", re.IGNORECASE)
"""In a 400: the key is wrong, or has expired."""
SETTING = re.compile(
    r"temperature|top_?[pk]\b|max_?output_?tokens|stop_?sequences|\bseed\b|logprobs|thinking|safety_?setting"
    r"|generation_?config|not enabled for",
    re.IGNORECASE,
)
"""In a 400: what is refused stands in every request of an entry, not in one prompt."""
EMPTY_ACCOUNT = re.compile(r"spend(ing)? (cap|limit)|credits are depleted|limit: 0(?![.\d])", re.IGNORECASE)
"""In a 429: no waiting helps. Its words "check your plan and billing details" stand in every 429."""


class StatusError(Exception):
    """The server answered with an HTTP error status."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str]) -> None:
        """Take a `body` that is JSON already, or text that may be."""
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body
        self.headers = headers


@asynccontextmanager
async def open_gemini(context: Context) -> AsyncIterator[ApiProvider]:
    """Open a client for the account of the context's entries.

    Raises:
        ConfigError: there is no key, the SDK is not installed, or it cannot send what an entry asks for.
    """
    settings = settings_of(context)
    if not settings.api_key:
        raise ConfigError("there is no key for Gemini: run export GOOGLE_API_KEY=..., or write `api_key`")
    async with _open_sdk(context, settings) as send:

        async def complete(request: Request) -> Answer:
            return answer(await send(request))

        with open_api(context, settings, complete, classify) as provider:
            yield provider


def _open_sdk(context: Context, settings: Settings) -> AbstractAsyncContextManager[Send]:
    name = context.entries[0].sdk or "google-generativeai"
    try:
        open_sdk: OpenSdk = import_module(SDKS[name]).open_sdk
    except ImportError as error:
        raise ConfigError(f"sdk {name}: {error}; `hallubench validate` tells what to install") from None
    return open_sdk(context, settings)


def conversation(request: Request) -> tuple[str | None, list[dict[str, Any]]]:
    """The system instruction and the `contents` of a request."""
    turns = request.messages
    system = []
    while turns and turns[0]["role"] == "system":
        system.append(turns.pop(0)["content"])
    contents = [
        {"role": "model" if turn["role"] == "assistant" else "user", "parts": [{"text": turn["content"]}]}
        for turn in turns
    ]
    return "\n\n".join(system) or None, contents


def generation_config(params: SamplingParams) -> dict[str, Any]:
    """The API's names for sampling parameters; what is left open is not sent."""
    values = {
        "max_output_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop_sequences": list(params.stop) or None,
        "seed": params.seed,
        "response_logprobs": None if params.logprobs is None else True,
        "logprobs": params.logprobs,
    }
    return {name: value for name, value in values.items() if value is not None}


def classify(error: Exception) -> Verdict:
    """What follows from an exception of a call; raises it again if it is none of the API's."""
    match error:
        case StatusError():
            return _classify_status(error)
        case BlockedError():
            return Record(
                error_type="content_filter",
                message=str(error),
                status=200,
                provider_request_id=error.response_id,
            )
        case MalformedError():
            return Retry(error_type="malformed", message=f"malformed answer: {error}", status=200)
        case TimeoutError():
            return Retry(error_type="timeout", message="the connection timed out")
        case ConnectionError():
            return Retry(error_type="connection", message=f"the connection failed: {error}")
    raise error


def _classify_status(error: StatusError) -> Verdict:
    problem = _problem(error.body)
    words = problem.get("message") or str(error.body)[:200]
    message = f"HTTP {error.status} {problem.get('status', '')}".rstrip() + f": {words}"
    details = [detail for detail in problem.get("details", ()) if isinstance(detail, dict)]
    if stop := _why_stop(error.status, problem.get("status"), words, details):
        error_type, fix = stop
        return Stop(error_type=error_type, message=f"{message}: {fix}", status=error.status)
    after = _retry_delay(details)
    return verdict_of_status(
        error.status, message, after=retry_after(error.headers) if after is None else after
    )


def _problem(body: object) -> dict[str, Any]:
    """The `error` object of a body; empty if it holds none, such as a proxy's HTML."""
    if isinstance(body, bytes | str):
        try:
            body = json.loads(body)
        except ValueError:
            return {}
    match body:
        case {"error": dict(problem)} | [{"error": dict(problem)}]:
            return problem
    return {}


def _why_stop(
    status: int, code: str | None, words: str, details: Sequence[Mapping[str, Any]]
) -> tuple[str, str] | None:
    """Our type of an error that every request would meet though its status tells otherwise, and the fix."""
    quotas = [str(quota) for detail in details for quota in detail.get("violations", ())]
    match status:
        case 400 if API_KEY.search(words) or any(
            detail.get("reason") == "API_KEY_INVALID" for detail in details
        ):
            return "authentication", "check `api_key`"
        case 400 if code == "FAILED_PRECONDITION":
            return "authentication", "put the key's project right in Google AI Studio (billing, region)"
        case 400 if SETTING.search(words):
            return "bad_request", "change that setting on the model's entry, or remove it"
        case 429 if any("PerDay" in quota for quota in quotas):
            return "spend_limit", "run the same command again when the day's quota is renewed, or raise it"
        case 429 if EMPTY_ACCOUNT.search(words):
            return "spend_limit", "raise the limit of the key's project, then run the same command again"
    return None


def _retry_delay(details: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of a RetryInfo, such as "53s"; None without one."""
    for detail in details:
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)s", str(detail.get("retryDelay"))):
            return float(found[1])
    return None
