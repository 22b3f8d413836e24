"""Any server that speaks OpenAI's chat completions, by OpenAI's SDK: vLLM, llama.cpp, OpenRouter, OpenAI.

The entry's `options` can hold `extra_body`, whose keys are sent beside the standard ones; that is where
a server's own settings go (`reasoning_effort`, or `return_token_ids` of vLLM).
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate
from ssl import SSLContext
from typing import Any

from httpx2 import HTTPError
from openai import (
    APIConnectionError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
)
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice

from hallubench.api_lane import Answer
from hallubench.limits import Quota
from hallubench.providers import Context
from hallubench.providers.api import ApiProvider, MalformedError, open_api, settings_of
from hallubench.providers.pools import LIMITS, open_pools
from hallubench.retry import Record, Retry, Stop, Verdict, retry_after, verdict_of_status
from hallubench.types import FinishReason, Logprobs, Request, Usage

NO_KEY = "none"
"""Sent where there is no key: local servers ask for none, and the SDK insists on one."""

UNLIKELY = -9999.0
"""What servers write for a log-probability that JSON cannot hold, or that is lower than they tell."""

SETTINGS = {
    "temperature", "top_p", "top_k", "seed", "stop", "logprobs", "top_logprobs", "prompt_logprobs"
}  # fmt: skip
"""A 400 about one of these refuses every request of an entry, not one prompt."""
UNSUPPORTED = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
UNKNOWN_MODEL = re.compile(r"model_not_found|not a valid model", re.IGNORECASE)
SPENT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
BLOCKED = {"content_filter", "content_policy_violation", "invalid_prompt"}

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@asynccontextmanager
async def open_openai(context: Context) -> AsyncIterator[ApiProvider]:
    """Open a client for the account of the context's entries.

    Raises:
        ConfigError: the key cannot be one.
    """
    settings = settings_of(context)
    # OpenAI's newer models refuse the old name of the limit; other servers may not know the new one.
    official = settings.base_url.startswith("https://api.openai.com/")
    limit_name = "max_completion_tokens" if official else "max_tokens"

    def connect(verify: SSLContext) -> AsyncOpenAI:
        return AsyncOpenAI(
            api_key=settings.api_key or NO_KEY,
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(limits=LIMITS, verify=verify),
        )

    async with open_pools(settings.connections, connect) as pools:

        async def complete(request: Request) -> Answer:
            sent = arguments(request, limit_name)
            with pools.client() as client:
                response = await client.chat.completions.with_raw_response.create(**sent)
                return answer(response.parse(), response.headers, request.params.prompt_logprobs)

        with open_api(context, settings, complete, classify) as provider:
            yield provider


def arguments(request: Request, limit_name: str = "max_tokens") -> dict[str, Any]:
    """What `chat.completions.create` is called with; what the request leaves open is not sent."""
    params = request.params
    sent: dict[str, Any] = {
        "model": request.model,
        "messages": request.messages,
        limit_name: params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
        "stop": list(params.stop) or None,
    }
    if params.logprobs is not None:
        sent |= {"logprobs": True, "top_logprobs": params.logprobs}
    body: dict[str, Any] = {"top_k": params.top_k}
    if params.prompt_logprobs is not None:  # only vLLM has them; it tells their first token only by its id
        body |= {"prompt_logprobs": params.prompt_logprobs, "return_token_ids": True}
    body |= request.options.get("extra_body", {})
    given = {name: value for name, value in sent.items() if value is not None}
    extra = {name: value for name, value in body.items() if value is not None}
    return given | ({"extra_body": extra} if extra else {})


def answer(completion: object, headers: Mapping[str, str], prompt_alternatives: int | None = None) -> Answer:
    """The parts of a response that are kept.

    Args:
        completion: what the SDK made of the body.
        headers: of the response.
        prompt_alternatives: how many were asked for at each token of the prompt.

    Raises:
        MalformedError: it is no completion. The SDK returns whatever a server says with status 200.
    """
    match completion:
        case ChatCompletion(choices=[Choice(message=message, finish_reason=reason) as choice, *_]) if message:
            text, extra = message.content, message.model_extra or {}
        case _:
            raise MalformedError("the server answered something that is no completion")
    if text is None:
        text = message.refusal or ""
    if not isinstance(text, str):
        raise MalformedError("the server answered a text that is none")
    version = " ".join(filter(None, (completion.model, completion.system_fingerprint)))
    return Answer(
        text=text,
        finish_reason=finish_reason(reason),
        provider_finish_reason=reason,
        reasoning=extra.get("reasoning_content") or extra.get("reasoning") or None,
        usage=usage(completion.usage),
        model_version=version or None,
        logprobs=output_logprobs(choice),
        prompt_logprobs=prompt_logprobs(completion, prompt_alternatives),
        provider_request_id=headers.get("x-request-id"),
        quotas=quotas(headers),
    )


def finish_reason(reason: str | None) -> FinishReason:
    match reason:
        case "stop" | "length" | "content_filter":
            return reason
        case _:  # tool_calls, function_call, and what servers invent
            return "other"


def usage(reported: CompletionUsage | None) -> Usage:
    if not isinstance(reported, CompletionUsage):
        return Usage()
    prompt, output = reported.prompt_tokens_details, reported.completion_tokens_details
    return Usage(
        input_tokens=reported.prompt_tokens,
        output_tokens=reported.completion_tokens,
        cached_tokens=prompt.cached_tokens if prompt else None,
        reasoning_tokens=output.reasoning_tokens if output else None,
    )


def output_logprobs(choice: Choice) -> Logprobs | None:
    """Log-probabilities of the answer; None where the server sent none.

    Servers name tokens by their texts. Ids are those of vLLM's `return_token_ids`, else -1. Whether
    they are raw or processed is not said, so `logprobs_mode` stays None.
    """
    content = choice.logprobs.content if choice.logprobs else None
    if content is None:
        return None
    ids = (choice.model_extra or {}).get("token_ids")
    if ids is None or len(ids) != len(content):
        ids = [-1] * len(content)
    positions = [_alternatives(position) for position in content]
    return _flat(
        ids=ids,
        tokens=[position.token for position in content],
        logprobs=[position.logprob for position in content],
        ranks=[rank for rank, _ in positions],
        alternatives=[[(-1, token, logprob) for token, logprob in best] for _, best in positions],
    )


def _alternatives(position: ChatCompletionTokenLogprob) -> tuple[int, list[tuple[str, float]]]:
    """The rank of the chosen token (0 if unknown) and the alternatives, best first.

    vLLM puts the chosen token first, also if it is not among the best ones. As the worst of the list
    it may thus be of any rank, and is no alternative.
    """
    listed = [(top.token, top.logprob) for top in position.top_logprobs or ()]
    best = sorted(listed, key=lambda alternative: -alternative[1])
    chosen = (position.token, position.logprob)
    if chosen not in best:
        return 0, best
    if listed[0] == chosen == best[-1]:
        return 0, best[:-1] if len(best) > 1 else best
    return best.index(chosen) + 1, best


def prompt_logprobs(completion: ChatCompletion, k: int | None) -> Logprobs | None:
    """Log-probabilities of the prompt, as vLLM adds them to a response; None where there are none.

    Each position is a mapping from token ids: the prompt's own first, then the k best. The first token
    of the prompt has none.

    Raises:
        MalformedError: they are laid out in another way.
    """
    extra = completion.model_extra or {}
    positions: Sequence[Mapping[str, Any] | None] | None = extra.get("prompt_logprobs")
    ids: Sequence[int] | None = extra.get("prompt_token_ids")
    if k is None or positions is None or ids is None:
        return None
    try:
        own = [position[str(id_)] if position else {} for id_, position in zip(ids, positions, strict=True)]
        best = [
            sorted(
                (token["rank"], int(id_), token["decoded_token"] or "", token["logprob"])
                for id_, token in (position or {}).items()
                if token["rank"] <= k
            )
            for position in positions
        ]
        return _flat(
            ids=ids,
            tokens=[token.get("decoded_token") or "" for token in own],
            logprobs=[token.get("logprob", math.nan) for token in own],
            ranks=[token.get("rank", 0) for token in own],
            alternatives=[[token[1:] for token in tokens] for tokens in best],
        )
    except (LookupError, TypeError, ValueError) as error:
        raise MalformedError(
            f"the server's prompt_logprobs are laid out in an unknown way: {error!r}"
        ) from None


def _flat(
    *,
    ids: Sequence[int],
    tokens: list[str],
    logprobs: list[float],
    ranks: list[int],
    alternatives: Sequence[Sequence[tuple[int, str, float]]],
) -> Logprobs:
    listed = [alternative for position in alternatives for alternative in position]
    return Logprobs(
        token_ids=array("i", ids),
        tokens=tokens,
        logprobs=array("f", _real(logprobs)),
        ranks=array("i", ranks),
        top_offsets=array("i", accumulate(map(len, alternatives), initial=0)),
        top_token_ids=array("i", [id_ for id_, _, _ in listed]),
        top_tokens=[token for _, token, _ in listed],
        top_logprobs=array("f", _real(logprob for _, _, logprob in listed)),
    )


def _real(logprobs: Iterable[float]) -> list[float]:
    return [-math.inf if logprob <= UNLIKELY else logprob for logprob in logprobs]


def quotas(headers: Mapping[str, str]) -> dict[str, Quota]:
    """What `x-ratelimit-*` headers say is left, by the resources of `limits.Headroom`."""
    found = {}
    for resource in ("requests", "tokens"):
        try:
            found[resource] = Quota(
                limit=float(headers[f"x-ratelimit-limit-{resource}"]),
                remaining=float(headers[f"x-ratelimit-remaining-{resource}"]),
                reset_after=_seconds(headers[f"x-ratelimit-reset-{resource}"]),
            )
        except (KeyError, ValueError):
            continue  # most servers have none, and some of them other units
    return found


def _seconds(duration: str) -> float:
    """6m0s -> 360.0."""
    if not re.fullmatch(f"({DURATION.pattern})+", duration):
        raise ValueError(duration)
    return sum(float(number) * SECONDS[unit] for number, unit in DURATION.findall(duration))


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
    body = error.body if isinstance(error.body, dict) else {}
    words = str(body.get("message") or error.message)
    # The code of vLLM and of OpenRouter is the status once more.
    code = None if error.code == str(error.status_code) else error.code
    message = f"HTTP {error.status_code} {code or error.type or ''}".rstrip() + f": {words}"
    named = {str(error.code), str(error.type)}
    known: dict[str, Any] = {
        "status": error.status_code,
        "provider_request_id": error.request_id,
        "quotas": quotas(error.response.headers),
    }
    if error.status_code == 402 or named & SPENT:
        return Stop(error_type="spend_limit", message=f"{message}: add credit to the account", **known)
    if named & BLOCKED or "flagged_input" in str(body.get("metadata")):  # the latter is OpenRouter's 403
        return Record(error_type="content_filter", message=message, **known)
    if error.status_code in (400, 422):
        if UNKNOWN_MODEL.search(message):
            return Stop(error_type="not_found", message=f"{message}: check the model's `name`", **known)
        if named & UNSUPPORTED or error.param in SETTINGS:
            fix = f"change or remove `{error.param}` of the entry {_model_of(error)}"
            return Stop(error_type="bad_request", message=f"{message}: {fix}", **known)
    return verdict_of_status(message=message, after=retry_after(error.response.headers), **known)


def _model_of(error: APIStatusError) -> str:
    return str(json.loads(error.request.content)["model"])
