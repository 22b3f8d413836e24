"""The body of a good response of Gemini's `generateContent` -> an `Answer`.

    {"candidates": [{"content": {"role": "model", "parts": [{"text": "Yes."}]}, "finishReason": "STOP"}],
     "usageMetadata": {"promptTokenCount": 12, "candidatesTokenCount": 2, "thoughtsTokenCount": 80},
     "modelVersion": "gemini-2.5-flash", "responseId": "hb0xaZ-kLvmnkdUP"}

It is read here and not by the SDKs' classes: those of google-generativeai drop the tokens spent on
thinking and every finish reason that they are too old for.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from hallubench.api_lane import Answer
from hallubench.providers.api import MalformedError
from hallubench.types import FinishReason, Logprobs, Usage


class BlockedError(Exception):
    """The server did not let the prompt through to the model."""

    def __init__(self, message: str, response_id: str | None) -> None:
        super().__init__(message)
        self.response_id = response_id


class _Json(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True, protected_namespaces=())


class _Part(_Json):
    text: str = ""
    thought: bool = False


class _Content(_Json):
    parts: tuple[_Part, ...] = ()


class _Token(_Json):
    token: str = ""
    token_id: int = -1
    log_probability: float = math.nan


class _Step(_Json):
    candidates: tuple[_Token, ...] = ()
    """The most probable tokens, best first."""


class _LogprobsResult(_Json):
    chosen_candidates: tuple[_Token, ...] = ()
    top_candidates: tuple[_Step, ...] = ()


class _Candidate(_Json):
    content: _Content = _Content()
    finish_reason: str | None = None
    logprobs_result: _LogprobsResult = _LogprobsResult()


class _PromptFeedback(_Json):
    block_reason: str | None = None
    block_reason_message: str | None = None


class _UsageMetadata(_Json):
    prompt_token_count: int | None = None
    candidates_token_count: int = 0
    """Without the thoughts; a count of 0 is left out."""
    thoughts_token_count: int | None = None
    cached_content_token_count: int | None = None


class _Response(_Json):
    candidates: tuple[_Candidate, ...] = ()
    prompt_feedback: _PromptFeedback = _PromptFeedback()
    usage_metadata: _UsageMetadata | None = None
    model_version: str | None = None
    response_id: str | None = None


def answer(body: bytes | str) -> Answer:
    """Read a body.

    Raises:
        BlockedError: the prompt was blocked.
        MalformedError: it is no answer.
    """
    try:
        response = _Response.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise MalformedError(f"{where}: {problem['msg']}" if where else problem["msg"]) from None
    if not response.candidates:
        if (feedback := response.prompt_feedback).block_reason is None:
            raise MalformedError("neither a candidate nor a reason why there is none")
        words = f" ({feedback.block_reason_message})" if feedback.block_reason_message else ""
        raise BlockedError(f"the prompt was blocked: {feedback.block_reason}{words}", response.response_id)
    candidate = response.candidates[0]
    parts, reason = candidate.content.parts, candidate.finish_reason
    if not parts and reason is None:
        raise MalformedError("a candidate without content and without a finish reason")
    return Answer(
        text="".join(part.text for part in parts if not part.thought),
        finish_reason=_finish_reason(reason),
        provider_finish_reason=reason,
        reasoning="\n\n".join(part.text for part in parts if part.thought) or None,
        usage=_usage(response.usage_metadata),
        model_version=response.model_version,
        logprobs=_logprobs(candidate.logprobs_result),
        provider_request_id=response.response_id,
    )


def _finish_reason(reason: str | None) -> FinishReason:
    match reason:
        case "STOP":
            return "stop"
        case "MAX_TOKENS" | "CONTINUATION":
            return "length"
        case "SAFETY" | "RECITATION" | "BLOCKLIST" | "PROHIBITED_CONTENT" | "SPII" | "ESCALATION":
            return "content_filter"
        case _:  # LANGUAGE, OTHER, MALFORMED_RESPONSE, and what is yet to come
            return "other"


def _usage(reported: _UsageMetadata | None) -> Usage:
    if reported is None:
        return Usage()
    thoughts = reported.thoughts_token_count
    return Usage(
        input_tokens=reported.prompt_token_count,
        output_tokens=reported.candidates_token_count + (thoughts or 0),
        cached_tokens=reported.cached_content_token_count,
        reasoning_tokens=thoughts,
    )


def _logprobs(result: _LogprobsResult) -> Logprobs | None:
    chosen = result.chosen_candidates
    if not chosen:
        return None
    steps = [step.candidates for step in result.top_candidates[: len(chosen)]]
    steps += [()] * (len(chosen) - len(steps))
    offsets = array("i", [0])
    for step in steps:
        offsets.append(offsets[-1] + len(step))
    best = [token for step in steps for token in step]
    return Logprobs(
        token_ids=array("i", [token.token_id for token in chosen]),
        tokens=[token.token for token in chosen],
        logprobs=array("f", [token.log_probability for token in chosen]),
        ranks=array("i", [_rank(token, step) for token, step in zip(chosen, steps, strict=True)]),
        top_offsets=offsets,
        top_token_ids=array("i", [token.token_id for token in best]),
        top_tokens=[token.token for token in best],
        top_logprobs=array("f", [token.log_probability for token in best]),
    )


def _rank(chosen: _Token, best: Sequence[_Token]) -> int:
    """Its place among the best, from 1; 0 if it is not among them."""
    identity = (chosen.token_id, chosen.token)
    places = (place for place, token in enumerate(best, start=1) if (token.token_id, token.token) == identity)
    return next(places, 0)
