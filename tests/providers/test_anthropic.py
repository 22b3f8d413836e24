from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asking import ask, context, log, request_to, served_by
from fault_server import ANTHROPIC, Call, Fault, FaultServer, Response, answer_to, run_fast
from llmock.pytest_plugin import LLMock

from hallubench.config import Config
from hallubench.errors import ConfigError, LaneError
from hallubench.providers.anthropic import classify
from hallubench.types import Message

pytestmark = pytest.mark.slow

KEY = "sk-ant-api03-SecretSecretSecret"


def config(base_url: str, **entry: Any) -> Config:
    model = {"name": "claude-3-5-sonnet", "type": "claude", "api_key": KEY, "base_url": base_url} | entry
    return Config.model_validate({"requests_per_minute": None, "timeout": 100.0, "models": [model]})


request = partial(request_to, "anthropic", "claude-3-5-sonnet")
served = partial(served_by, ANTHROPIC, config, request())


def error(status: int, type_: str, message: str = "...", **fields: Any) -> Response:
    body = {"type": "error", "error": {"type": type_, "message": message} | fields}
    return Response(body, status, {"request-id": "req_1"})


def message(**fields: Any) -> dict[str, Any]:
    whole = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-3-5-sonnet-20241022",
        "content": [{"type": "text", "text": "Hi."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 5},
    }
    return whole | fields


def test_an_answer_keeps_everything_the_server_tells(tmp_path: Path) -> None:
    body = message(
        content=[
            {"type": "thinking", "thinking": "Hm.", "signature": "..."},
            {"type": "text", "text": "Hello, "},
            {"type": "redacted_thinking", "data": "..."},
            {"type": "a_block_of_tomorrow", "content": [1]},
            {"type": "text", "text": "you."},
        ],
        usage={
            "input_tokens": 10,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 1000,
            "output_tokens": 50,
            "output_tokens_details": {"thinking_tokens": 40},
        },
    )
    (completion,), _ = served(tmp_path, lambda call: Response(body, 200, {"request-id": "req_7"}))

    assert completion.text == "Hello, you."
    assert completion.reasoning == "Hm."
    assert (completion.finish_reason, completion.provider_finish_reason) == ("stop", "end_turn")
    assert completion.usage.input_tokens == 1110
    assert completion.usage.cached_tokens == 100
    assert completion.usage.output_tokens == 50
    assert completion.usage.reasoning_tokens == 40
    assert completion.model_version == "claude-3-5-sonnet-20241022"
    assert completion.provider_request_id == "req_7"
    assert completion.logprobs is None
    assert log(tmp_path)[0]["status"] == 200


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "other"),
        ("a_reason_of_tomorrow", "other"),
        (None, "other"),
    ],
)
def test_a_stop_reason_is_kept_beside_its_standard_name(
    tmp_path: Path, stop_reason: str | None, finish_reason: str
) -> None:
    (completion,), _ = served(tmp_path, lambda call: Response(message(stop_reason=stop_reason)))
    assert completion.provider_finish_reason == stop_reason
    assert completion.finish_reason == finish_reason


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    (completion,), _ = served(tmp_path, lambda call: Response(message(content=[])))
    assert (completion.text, completion.error) == ("", None)


def test_a_request_goes_out_with_all_its_settings(tmp_path: Path) -> None:
    asked = request(
        system="Be brief.",
        messages=(
            Message("system", "Be kind."),
            Message("user", "Hi"),
            Message("assistant", "Yes?"),
            Message("user", "Why?"),
        ),
        temperature=0.0,
        top_p=0.9,
        top_k=40,
        stop=("END",),
        options={"thinking": {"type": "disabled"}},
    )
    _, (call,) = served(tmp_path, lambda call: None, [asked], options={"thinking": {"type": "disabled"}})
    assert call.path == "/v1/messages"
    assert call.body == {
        "model": "claude-3-5-sonnet",
        "max_tokens": 64,
        "system": "Be brief.\n\nBe kind.",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Why?"},
        ],
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 40,
        "stop_sequences": ["END"],
        "thinking": {"type": "disabled"},
    }
    assert call.headers["anthropic-version"] == "2023-06-01"
    assert KEY in call.headers["authorization"]


def test_what_a_request_leaves_open_is_not_sent(tmp_path: Path) -> None:
    _, (call,) = served(tmp_path, lambda call: None)
    assert call.body.keys() == {"model", "max_tokens", "messages"}
    assert call.headers["anthropic-version"] != "2023-06-01"


HEALED: Mapping[str, tuple[Response | Fault, str]] = {
    "timeout": (error(408, "timeout_error"), "RequestTimeoutError"),
    "conflict": (error(409, "conflict_error"), "ConflictError"),
    "rate limit": (error(429, "rate_limit_error"), "RateLimitError"),
    "server error": (error(500, "api_error"), "InternalServerError"),
    "bad gateway": (Response("<html>Bad gateway</html>", 502), "InternalServerError"),
    "overloaded": (error(529, "overloaded_error"), "OverloadedError"),
    "reset": (Fault.RESET, "APIConnectionError"),
    "cut": (Fault.CUT, "APIConnectionError"),
    "hang": (Fault.HANG, "TimeoutError"),
    "truncated JSON": (Response(b'{"id": "msg_1", "content": [{"ty'), "JSONDecodeError"),
    "not UTF-8": (Response(b'{"id": "\xff"}'), "UnicodeDecodeError"),
    "empty": (Response(b""), "JSONDecodeError"),
    "HTML": (Response("<html>Sign in to this network</html>"), "MalformedError"),
    "another JSON": (Response({"status": "fine"}), "MalformedError"),
    "a JSON list": (Response(b"[1, 2]"), "MalformedError"),
    "no text": (Response(message(content=[{"type": "text"}])), "MalformedError"),
    "no blocks": (Response(message(content=["Hi."])), "MalformedError"),
}


@pytest.mark.parametrize(("fault", "exception"), HEALED.values(), ids=HEALED.keys())
def test_what_may_pass_is_tried_again(tmp_path: Path, fault: Response | Fault, exception: str) -> None:
    (completion,), calls = served(tmp_path, lambda call: fault if call.attempt == 1 else None)
    assert completion.text == answer_to("Hello?")
    assert len(calls) == 2
    first, second = log(tmp_path)
    assert (first["exception"], second["exception"]) == (exception, None)
    assert first["status"] == (fault.status if isinstance(fault, Response) else None)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.HANG, Response("<html>"), error(500, "api_error")])
def test_a_fault_that_stays_is_recorded_after_the_last_retry(tmp_path: Path, fault: Response | Fault) -> None:
    (completion,), calls = served(tmp_path, lambda call: fault)
    assert completion.text is None
    assert completion.error is not None
    assert completion.error.startswith("Failed after 3 retries: ")
    assert completion.retry_count == 3
    assert len(calls) == 4


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "invalid_request_error", "prompt is too long: 203422 tokens > 200000 maximum"),
        error(
            400,
            "invalid_request_error",
            "input length and `max_tokens` exceed context limit: 199000 + 2048 > 200000",
        ),
        error(400, "invalid_request_error", "messages: text content blocks must be non-empty"),
        error(413, "request_too_large", "Request exceeds the maximum size"),
    ],
)
def test_what_is_wrong_with_one_prompt_is_recorded_and_the_others_go_on(
    tmp_path: Path, refusal: Response
) -> None:
    completions, calls = served(
        tmp_path, lambda call: refusal if call.prompt == "bad" else None, [request("bad"), request("good")]
    )
    bad, good = sorted(completions, key=lambda completion: completion.request_id)
    assert bad.error_type == "bad_request"
    assert bad.provider_request_id == "req_1"
    assert good.text == answer_to("good")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        (error(401, "authentication_error", f"invalid key {KEY}"), "check `api_key`"),
        (error(403, "permission_error"), "check what `api_key` is allowed"),
        (error(404, "not_found_error", "model: claude-9"), "check the model's `name`"),
        (
            error(429, "rate_limit_error", details={"error_code": "enforced_spend_limit_reached"}),
            "raise it in the Claude Console",
        ),
        (error(402, "billing_error"), "raise it in the Claude Console"),
        (
            error(
                400, "invalid_request_error", "You have reached your specified API usage limits. You will..."
            ),
            "raise it in the Claude Console",
        ),
        (
            error(
                400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API."
            ),
            "raise it in the Claude Console",
        ),
        (
            error(400, "invalid_request_error", "`temperature` is deprecated for this model."),
            "change or remove `temperature` of the entry claude-3-5-sonnet",
        ),
        (
            error(400, "invalid_request_error", "max_tokens: 9999 > 8192, which is the maximum allowed"),
            "change or remove `max_tokens` of the entry claude-3-5-sonnet",
        ),
    ],
)
def test_what_no_request_can_pass_stops_the_lane_with_the_fix(
    tmp_path: Path, refusal: Response, fix: str
) -> None:
    with pytest.raises(LaneError) as stopped:
        served(tmp_path, lambda call: refusal, (request(f"prompt {n}") for n in range(100)))
    assert fix in str(stopped.value)
    assert KEY not in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert len(log(tmp_path)) < 20  # those in flight together


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_server() -> None:
    with pytest.raises(TypeError):
        classify(TypeError("no such argument"))


def test_the_key_is_masked_where_a_server_repeats_it(tmp_path: Path) -> None:
    (completion,), _ = served(tmp_path, lambda call: error(422, "invalid_request_error", f"Bearer {KEY}?"))
    assert completion.error == "HTTP 422 invalid_request_error: Bearer ***?"


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="API key") as refused:
        served(tmp_path, lambda call: None, api_key=f"{KEY}…")
    assert KEY not in str(refused.value)


def test_the_quota_in_the_headers_is_kept_to(tmp_path: Path) -> None:
    """The server takes 2 requests and names the moment when it takes the next 2."""
    spent = {
        "date": "Sat, 31 Jan 2026 10:00:00 GMT",
        "anthropic-ratelimit-requests-limit": "2",
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": "2026-01-31T10:00:50Z",
    }
    served(
        tmp_path,
        lambda call: Response(message(), 200, spent),
        [request("1"), request("2")],
        max_concurrency=1,
    )
    first, second = log(tmp_path)
    assert first["wait"] < 20 < second["wait"] <= 50


def test_a_long_pause_is_told(tmp_path: Path) -> None:
    notes: list[str] = []

    async def main() -> None:
        busy = Response({}, 429, {"retry-after": "30"})
        async with FaultServer(ANTHROPIC, lambda call: busy if call.attempt == 1 else None) as server:
            await ask(context(config(server.url), tmp_path, notes), [request()])

    run_fast(main())
    assert notes == ["claude: the server asks to wait; going on in 30 s"]


def test_as_many_requests_are_in_flight_as_the_config_allows(tmp_path: Path) -> None:
    async def main() -> int:
        async with FaultServer(ANTHROPIC, lambda call: Response(message(), delay=50)) as server:
            await ask(
                context(config(server.url, max_concurrency=150), tmp_path),
                [request(f"prompt {n}") for n in range(300)],
            )
            return server.most_at_once

    assert run_fast(main()) == 150


CHAOS: list[tuple[float, Response | Fault]] = [
    (0.10, Response({"type": "error", "error": {"type": "rate_limit_error"}}, 429, {"retry-after": "1"})),
    (0.15, error(500, "api_error")),
    (0.17, Fault.RESET),
    (0.19, Fault.HANG),
    (0.20, Response("<html>", 200)),
    (0.21, Response(b'{"type": "mess')),
]


def chaos(call: Call) -> Response | Fault | None:
    """10% 429, 5% 5xx, 2% resets, 2% hangs, 2% garbage: always the same for an attempt at a prompt."""
    digest = hashlib.blake2b(f"{call.prompt} {call.attempt}".encode()).digest()
    draw = int.from_bytes(digest[:4], "big") / 2**32
    return next((fault for share, fault in CHAOS if draw < share), None)


def test_a_thousand_prompts_are_each_answered_once_through_chaos(tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(1000)]
    completions, calls = served(tmp_path, chaos, map(request, prompts), timeout=50.0)

    assert Counter(completion.request_id for completion in completions) == Counter(
        f"id of {prompt}" for prompt in prompts
    )
    assert all(
        completion.text == answer_to(completion.request_id.removeprefix("id of "))
        for completion in completions
    )
    answered = Counter(call.prompt for call in calls if chaos(call) is None)
    assert answered == Counter(prompts)
    assert len(calls) > 1150


def test_the_wire_is_that_of_a_server_written_elsewhere(tmp_path: Path, llmock: LLMock) -> None:
    llmock.fail(529, times=1)
    asked = [request(f"prompt {n}", temperature=0.7) for n in range(20)]
    completions = run_fast(ask(context(config(llmock.base_url("anthropic")), tmp_path), asked), speed=20)
    assert {completion.request_id for completion in completions} == {one.request_id for one in asked}
    assert all(completion.text and completion.usage.output_tokens for completion in completions)
    assert len(llmock.requests) == len(log(tmp_path)) == 21


def test_rate_limits_of_a_server_written_elsewhere_are_waited_for(tmp_path: Path, llmock: LLMock) -> None:
    llmock.rate_limit(times=3, retry_after=0.2)
    (completion,) = run_fast(ask(context(config(llmock.base_url("anthropic")), tmp_path), [request()]), 1)
    assert completion.text
    assert completion.retry_count == 0
    assert len(llmock.requests) == len(log(tmp_path)) == 4
