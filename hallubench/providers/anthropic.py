"""Claude, by Anthropic's SDK. No seed and no log-probabilities: the API has neither.

The entry's `options` can hold `thinking` and `output_config`, passed on as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ssl import SSLContext
from typing import Any

from anthropic import (
    APIConnectionError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AsyncAnthropic,
    BaseModel,
    DefaultAsyncHttpxClient,
)
from anthropic.types import Message
from anthropic.types import Usage as AnthropicUsage
from httpx2 import HTTPError

from hallubench.accepts import OPTIONS
from hallubench.api_lane import Answer
from hallubench.limits import Quota
from hallubench.providers import Context
from hallubench.providers.api import ApiProvider, MalformedError, open_api, settings_of
from hallubench.providers.pools import LIMITS, open_pools
from hallubench.retry import Retry, Stop, Verdict, retry_after, verdict_of_status
from hallubench.types import FinishReason, Request, Usage

SAMPLING_VERSION = {"anthropic-version": "2023-06-01"}
"""The version of the API under which the models up to Claude 4.6 take temperature, top_p and top_k. The
SDK's own version takes them for no model, and its `create` has no such arguments."""

RESOURCES = ("requests", "tokens", "input-tokens", "output-tokens")

SPEND_LIMIT = re.compile(r"usage limits|credit balance", re.IGNORECASE)
"""A cap that the user set, or an account that is empty, is told in a 400 by these words only."""
SETTING = re.compile(r"\b(temperature|top_p|top_k|stop_sequences|thinking|output_config|max_tokens)\b")
"""What a 400 names when it refuses every request of an entry, not one prompt ..."""
PROMPT = re.compile(r"^(messages|system)\b|prompt is too long|input length")
"""... unless it says that the prompt is what does not fit beside it."""


@asynccontextmanager
async def open_anthropic(context: Context) -> AsyncIterator[ApiProvider]:
    """Open a client for the account of the context's entries.

    Raises:
        ConfigError: the key cannot be one.
    """
    settings = settings_of(context)

    def connect(verify: SSLContext) -> AsyncAnthropic:
        return AsyncAnthropic(
            api_key=settings.api_key,
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(limits=LIMITS, verify=verify),
        )

    async with open_pools(settings.connections, connect) as pools:

        async def complete(request: Request) -> Answer:
            with pools.client() as client:
                response = await client.messages.with_raw_response.create(**arguments(request))
                return answer(await response.parse(), response.headers)

        with open_api(context, settings, complete, classify) as provider:
            yield provider


def arguments(request: Request) -> dict[str, Any]:
    """What `messages.create` is called with; what the request leaves open is not sent."""
    turns = request.messages
    system = []
    while turns and turns[0]["role"] == "system":
        system.append(turns.pop(0)["content"])
    params = request.params
    sent: dict[str, Any] = {"model": request.model, "messages": turns, "max_tokens": params.max_tokens}
    if system:
        sent["system"] = "\n\n".join(system)
    if params.stop:
        sent["stop_sequences"] = list(params.stop)
    sent |= {key: request.options[key] for key in OPTIONS["claude"] if key in request.options}
    sampling = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(params, name)) is not None
    }
    if sampling:
        sent |= {"extra_body": sampling, "extra_headers": SAMPLING_VERSION}
    return sent


def answer(message: object, headers: Mapping[str, str]) -> Answer:
    """The parts of a response that are kept.

    Raises:
        MalformedError: it is no message. The SDK returns whatever a server says with status 200.
    """
    match message:
        case Message(content=list(blocks)) if all(isinstance(block, BaseModel) for block in blocks):
            texts = [block.text for block in blocks if block.type == "text"]
            thoughts = [block.thinking for block in blocks if block.type == "thinking"]
        case _:
            raise MalformedError("the server answered something that is no message")
    if not all(isinstance(text, str) for text in (*texts, *thoughts)):
        raise MalformedError("the server answered a text block without text")
    return Answer(
        text="".join(texts),
        finish_reason=finish_reason(message.stop_reason),
        provider_finish_reason=message.stop_reason,
        reasoning="\n\n".join(thoughts) or None,
        usage=usage(message.usage),
        model_version=message.model,
        provider_request_id=headers.get("request-id"),
        quotas=quotas(headers),
    )


def finish_reason(stop_reason: str | None) -> FinishReason:
    match stop_reason:
        case "end_turn" | "stop_sequence":
            return "stop"
        case "max_tokens" | "model_context_window_exceeded":
            return "length"
        case "refusal":
            return "content_filter"
        case _:  # tool_use, pause_turn, and what is yet to come
            return "other"


def usage(reported: AnthropicUsage | None) -> Usage:
    """Token counts; `input_tokens` is all of the input, of which the API counts the cached part apart."""
    if not isinstance(reported, AnthropicUsage):
        return Usage()
    cached = reported.cache_read_input_tokens
    details = reported.output_tokens_details
    return Usage(
        input_tokens=reported.input_tokens + (cached or 0) + (reported.cache_creation_input_tokens or 0),
        output_tokens=reported.output_tokens,
        cached_tokens=cached,
        reasoning_tokens=details.thinking_tokens if details else None,
    )


def quotas(headers: Mapping[str, str]) -> dict[str, Quota]:
    """What `anthropic-ratelimit-*` headers say is left, by the resources of `limits.Headroom`."""
    found = {}
    for resource in RESOURCES:
        prefix = f"anthropic-ratelimit-{resource}"
        try:
            found[resource.replace("-", "_")] = Quota(
                limit=float(headers[f"{prefix}-limit"]),
                remaining=float(headers[f"{prefix}-remaining"]),
                reset_after=_seconds_until(headers[f"{prefix}-reset"], headers),
            )
        except (KeyError, ValueError):
            continue  # not every response has them all
    return found


def classify(error: Exception) -> Verdict:
    """What follows from an exception of a call; raises it again if it is none of the API's."""
    match error:
        case APITimeoutError():
            return Retry(error_type="timeout", message="the connection timed out")
        case APIConnectionError():
            return Retry(error_type="connection", message=f"no connection: {error.__cause__ or error}")
        case HTTPError():  # the body broke off
            return Retry(error_type="connection", message=f"the connection broke: {error!r}")
        case APIStatusError():
            return _classify_status(error)
        case MalformedError() | APIResponseValidationError() | json.JSONDecodeError() | UnicodeDecodeError():
            return Retry(error_type="malformed", message=f"malformed answer: {error}", status=200)
    raise error


def _classify_status(error: APIStatusError) -> Verdict:
    words = error.api_message or error.message
    message = f"HTTP {error.status_code} {error.type or ''}".rstrip() + f": {words}"
    headers = error.response.headers
    verdict = verdict_of_status(
        error.status_code,
        message,
        after=retry_after(headers),
        provider_request_id=error.request_id,
        quotas=quotas(headers),
    )
    if _is_spend_limit(error, words):
        error_type, fix = (
            "spend_limit",
            "raise it in the Claude Console, or run again when it is reset",
        )
    elif error.status_code == 400 and not PROMPT.search(words) and (setting := SETTING.search(words)):
        name = "stop" if setting[1] == "stop_sequences" else setting[1]
        error_type, fix = "bad_request", f"change or remove `{name}` of the entry {_model_of(error)}"
    else:
        return verdict
    return Stop(
        error_type=error_type,
        message=f"{message}: {fix}",
        status=verdict.status,
        provider_request_id=verdict.provider_request_id,
        quotas=verdict.quotas,
    )


def _is_spend_limit(error: APIStatusError, words: str) -> bool:
    if error.status_code == 402 or error.type == "billing_error":
        return True
    if (error.error_code or "").endswith("spend_limit_reached"):
        return True
    return error.status_code == 400 and bool(SPEND_LIMIT.search(words))


def _model_of(error: APIStatusError) -> str:
    return str(json.loads(error.request.content)["model"])


def _seconds_until(moment: str, headers: Mapping[str, str]) -> float:
    """Seconds to an RFC 3339 time, by the server's own clock where it tells it."""
    now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
    return max(0.0, (datetime.fromisoformat(moment) - now).total_seconds())
