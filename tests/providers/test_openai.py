from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asking import ask, context, log, request_to, served_by
from fault_server import OPENAI, Fault, Response, answer_to, run_fast
from llmock.pytest_plugin import LLMock

from hallubench.config import Config
from hallubench.errors import LaneError
from hallubench.types import Logprobs

pytestmark = pytest.mark.slow

KEY = "sk-proj-SecretSecretSecret"


def config(base_url: str, **entry: Any) -> Config:
    model = {"name": "tiny", "type": "openai", "api_key": KEY, "base_url": f"{base_url}/v1"} | entry
    return Config.model_validate({"requests_per_minute": None, "timeout": 100.0, "models": [model]})


request = partial(request_to, "openai", "tiny")
served = partial(served_by, OPENAI, config, request())


def error(status: int, **fields: Any) -> Response:
    return Response({"error": {"message": "...", "type": "some_error"} | fields}, status)


def completion(*, choice: dict[str, Any] | None = None, **fields: Any) -> Response:
    whole = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "tiny",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}
            | (choice or {})
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }
    return Response(whole | fields, 200, {"x-request-id": "req_7"})


def test_an_answer_keeps_everything_the_server_tells(tmp_path: Path) -> None:
    response = completion(
        choice={"message": {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm."}},
        system_fingerprint="fp_1",
        usage={
            "prompt_tokens": 70,
            "completion_tokens": 50,
            "total_tokens": 120,
            "prompt_tokens_details": {"cached_tokens": 64},
            "completion_tokens_details": {"reasoning_tokens": 40},
        },
    )
    (answer,), _ = served(tmp_path, lambda call: response)
    assert (answer.text, answer.reasoning) == ("Hello.", "Hm.")
    assert (answer.finish_reason, answer.provider_finish_reason) == ("stop", "stop")
    assert (answer.usage.input_tokens, answer.usage.cached_tokens) == (70, 64)
    assert (answer.usage.output_tokens, answer.usage.reasoning_tokens) == (50, 40)
    assert answer.model_version == "tiny fp_1"
    assert answer.provider_request_id == "req_7"
    assert answer.logprobs is None


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "other"),
        ("eos", "other"),
        (None, "other"),
    ],
)
def test_a_finish_reason_is_kept_beside_its_standard_name(
    tmp_path: Path, reason: str | None, finish_reason: str
) -> None:
    (answer,), _ = served(tmp_path, lambda call: completion(choice={"finish_reason": reason}))
    assert (answer.provider_finish_reason, answer.finish_reason) == (reason, finish_reason)


def test_a_request_goes_out_with_all_its_settings(tmp_path: Path) -> None:
    options = {"extra_body": {"reasoning_effort": "low"}}
    asked = request(
        temperature=0.0,
        top_p=0.9,
        top_k=40,
        stop=("END",),
        seed=7,
        logprobs=5,
        prompt_logprobs=3,
        options=options,
    )
    _, (call,) = served(tmp_path, lambda call: None, [asked], options=options)
    assert call.path == "/v1/chat/completions"
    assert call.body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_tokens": 64,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["END"],
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 5,
        "prompt_logprobs": 3,
        "return_token_ids": True,
        "reasoning_effort": "low",
    }
    assert call.headers["authorization"] == f"Bearer {KEY}"


def test_what_a_request_leaves_open_is_not_sent(tmp_path: Path) -> None:
    _, (call,) = served(tmp_path, lambda call: None)
    assert call.body.keys() == {"model", "messages", "max_tokens"}


def test_a_server_without_a_key_is_asked_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (answer,), (call,) = served(tmp_path, lambda call: None, api_key=None)
    assert answer.text == answer_to("Hello?")
    assert call.headers["authorization"] == "Bearer none"


def token(text: str, logprob: float, *best: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in best]
    return {"token": text, "logprob": logprob, "bytes": None, "top_logprobs": top}


def alternatives(logprobs: Logprobs, position: int) -> list[tuple[str, float]]:
    start, end = logprobs.top_offsets[position : position + 2]
    return list(zip(logprobs.top_tokens[start:end], logprobs.top_logprobs[start:end], strict=True))


def logprobs_of(folder: Path, *content: dict[str, Any], **choice: Any) -> Logprobs:
    response = completion(choice={"logprobs": {"content": content}} | choice)
    (answer,), _ = served(folder, lambda call: response, [request(logprobs=2)])
    assert answer.logprobs is not None
    return answer.logprobs


def test_log_probabilities_are_kept_with_their_alternatives_best_first(tmp_path: Path) -> None:
    logprobs = logprobs_of(
        tmp_path,
        token("a", -0.5, ("a", -0.5), ("b", -1.0)),
        token("b", -0.75, ("b", -0.75), ("a", -0.25), ("c", -2.0)),  # vLLM's order: the chosen one first
        token("z", -8.0, ("a", -0.5), ("b", -1.0)),
        token("!", -0.125),
    )
    assert logprobs.tokens == ["a", "b", "z", "!"]
    assert list(logprobs.logprobs) == [-0.5, -0.75, -8.0, -0.125]
    assert list(logprobs.ranks) == [1, 2, 0, 0]
    assert list(logprobs.token_ids) == [-1, -1, -1, -1]
    assert alternatives(logprobs, 0) == [("a", -0.5), ("b", -1.0)]
    assert alternatives(logprobs, 1) == [("a", -0.25), ("b", -0.75), ("c", -2.0)]
    assert alternatives(logprobs, 2) == [("a", -0.5), ("b", -1.0)]
    assert alternatives(logprobs, 3) == []


def test_a_chosen_token_that_may_not_be_among_the_best_is_not_listed_with_them(tmp_path: Path) -> None:
    logprobs = logprobs_of(tmp_path, token("z", -8.0, ("z", -8.0), ("a", -0.5)))
    assert list(logprobs.ranks) == [0]
    assert alternatives(logprobs, 0) == [("a", -0.5)]


def test_a_log_probability_too_low_to_tell_is_minus_infinity(tmp_path: Path) -> None:
    logprobs = logprobs_of(tmp_path, token("a", -0.5, ("a", -0.5), ("b", -9999.0)))
    assert alternatives(logprobs, 0) == [("a", -0.5), ("b", -math.inf)]


def test_token_ids_are_kept_where_the_server_tells_them(tmp_path: Path) -> None:
    logprobs = logprobs_of(tmp_path, token("a", -0.5), token("b", -0.5), token_ids=[17, 4])
    assert list(logprobs.token_ids) == [17, 4]


def test_log_probabilities_of_the_prompt_are_read_as_vllm_sends_them(tmp_path: Path) -> None:
    def entry(text: str, logprob: float, rank: int) -> dict[str, Any]:
        return {"decoded_token": text, "logprob": logprob, "rank": rank}

    response = completion(
        prompt_token_ids=[1, 2, 3],
        prompt_logprobs=[
            None,
            {"2": entry("b", -3.0, 9), "5": entry("e", -0.25, 1), "6": entry("f", -1.5, 2)},
            {"3": entry("c", -0.5, 1), "7": entry("g", -1.0, 2)},
        ],
    )
    (answer,), _ = served(tmp_path, lambda call: response, [request(prompt_logprobs=2)])
    logprobs = answer.prompt_logprobs
    assert logprobs is not None
    assert list(logprobs.token_ids) == [1, 2, 3]
    assert logprobs.tokens == ["", "b", "c"]
    assert math.isnan(logprobs.logprobs[0])
    assert list(logprobs.logprobs[1:]) == [-3.0, -0.5]
    assert list(logprobs.ranks) == [0, 9, 1]
    assert list(logprobs.top_offsets) == [0, 0, 2, 4]
    assert list(logprobs.top_token_ids) == [5, 6, 3, 7]
    assert list(logprobs.top_tokens) == ["e", "f", "c", "g"]


HEALED = {
    "rate limit": Response({}, 429, {"retry-after": "1"}),
    "server error": error(500),
    "overloaded": error(503),
    "reset": Fault.RESET,
    "cut": Fault.CUT,
    "hang": Fault.HANG,
    "truncated JSON": Response(b'{"id": "chatc'),
    "HTML": Response("<html>Sign in to this network</html>"),
    "an error with a good status": Response({"error": {"code": 502, "message": "upstream"}}),
    "no choices": completion(choices=[]),
    "no message": completion(choice={"message": None}),
    "a choice that is none": completion(choices=["Hi."]),
}


@pytest.mark.parametrize("fault", HEALED.values(), ids=HEALED.keys())
def test_what_may_pass_is_tried_again(tmp_path: Path, fault: Response | Fault) -> None:
    (answer,), calls = served(tmp_path, lambda call: fault if call.attempt == 1 else None)
    assert answer.text == answer_to("Hello?")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("refusal", "error_type"),
    [
        (error(400, code="context_length_exceeded", param="messages"), "bad_request"),
        (error(400, code="content_filter"), "content_filter"),
        (error(403, code=403, metadata={"flagged_input": "...", "reasons": ["violence"]}), "content_filter"),
    ],
)
def test_what_is_wrong_with_one_prompt_is_recorded_and_the_others_go_on(
    tmp_path: Path, refusal: Response, error_type: str
) -> None:
    answers, calls = served(
        tmp_path, lambda call: refusal if call.prompt == "bad" else None, [request("bad"), request("good")]
    )
    bad, good = sorted(answers, key=lambda answer: answer.request_id)
    assert bad.error_type == error_type
    assert good.text == answer_to("good")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        (error(401, message=f"Incorrect API key {KEY}"), "check `api_key`"),
        (error(403), "check what `api_key` is allowed"),
        (error(404, code="model_not_found"), "check the model's `name`"),
        (error(400, message="tiny is not a valid model ID"), "check the model's `name`"),
        (error(429, code="insufficient_quota"), "add credit"),
        (error(402), "add credit"),
        (error(400, param="temperature", code="unsupported_value"), "remove `temperature` of the entry tiny"),
        (error(400, param="top_logprobs"), "remove `top_logprobs` of the entry tiny"),
    ],
)
def test_what_no_request_can_pass_stops_the_lane_with_the_fix(
    tmp_path: Path, refusal: Response, fix: str
) -> None:
    with pytest.raises(LaneError) as stopped:
        served(tmp_path, lambda call: refusal, (request(f"prompt {n}") for n in range(100)))
    assert fix in str(stopped.value)
    assert KEY not in str(stopped.value)
    assert len(log(tmp_path)) < 20  # those in flight together


def test_the_quota_in_the_headers_is_kept_to(tmp_path: Path) -> None:
    spent = {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m20s",
    }
    response = Response(completion().body, 200, spent)
    served(tmp_path, lambda call: response, [request("1"), request("2")], max_concurrency=1)
    first, second = log(tmp_path)
    assert first["wait"] < 20 < second["wait"] <= 80


def test_the_wire_is_that_of_a_server_written_elsewhere(tmp_path: Path, llmock: LLMock) -> None:
    llmock.fail(503, times=1)
    asked = [request(f"prompt {n}", temperature=0.7) for n in range(20)]
    answers = run_fast(ask(context(config(llmock.url), tmp_path), asked), speed=20)
    assert {answer.request_id for answer in answers} == {one.request_id for one in asked}
    assert all(answer.text and answer.usage.output_tokens for answer in answers)
    assert len(llmock.requests) == len(log(tmp_path)) == 21
