"""Gemini by both SDKs: every test runs over each of them, unless it names one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asking import ask, context, log, request_to, served_by
from fault_server import GEMINI, Call, Fault, FaultServer, Response, answer_to, run_fast
from llmock.pytest_plugin import LLMock

from hallubench.config import Config
from hallubench.errors import ConfigError, LaneError
from hallubench.providers import open_provider
from hallubench.types import Message

pytestmark = pytest.mark.slow

KEY = "AIzaSySecretSecretSecret"
SDKS = ("google-generativeai", "google-genai")


@pytest.fixture(params=SDKS)
def sdk(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(base_url: str, **entry: Any) -> Config:
    model = {"name": "gemini-1.5-pro", "type": "gemini", "api_key": KEY, "base_url": base_url} | entry
    return Config.model_validate(
        {"requests_per_minute": None, "timeout": 100.0, "seed": None, "models": [model]}
    )


question = partial(request_to, "gemini", "gemini-1.5-pro")
served = partial(served_by, GEMINI, config, question())


def response(**candidate: Any) -> dict[str, Any]:
    content = {"role": "model", "parts": [{"text": "Hi."}]}
    return {
        "candidates": [{"content": content, "finishReason": "STOP", "index": 0} | candidate],
        "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 5, "totalTokenCount": 12},
        "modelVersion": "gemini-1.5-pro-002",
        "responseId": "resp_1",
    }


def error(status: int, code: str = "...", message: str = "...", *details: Mapping[str, Any]) -> Response:
    return Response(
        {"error": {"code": status, "message": message, "status": code, "details": list(details)}}, status
    )


def retry_info(delay: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


def quota_failure(*quota_ids: str) -> dict[str, Any]:
    violations = [{"quotaMetric": "generate_content", "quotaId": id_} for id_ in quota_ids]
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations}


def test_an_answer_keeps_everything_the_server_tells(tmp_path: Path, sdk: str) -> None:
    thought = {"text": "Hm.", "thought": True}
    body = response(content={"role": "model", "parts": [thought, {"text": "Hello, "}, {"text": "you."}]})
    body["usageMetadata"] = {
        "promptTokenCount": 100,
        "cachedContentTokenCount": 90,
        "candidatesTokenCount": 5,
        "thoughtsTokenCount": 40,
        "totalTokenCount": 145,
    }
    (completion,), _ = served(tmp_path, lambda call: Response(body), sdk=sdk)
    assert completion.text == "Hello, you."
    assert completion.reasoning == "Hm."
    assert (completion.finish_reason, completion.provider_finish_reason) == ("stop", "STOP")
    assert completion.usage.input_tokens == 100
    assert completion.usage.cached_tokens == 90
    assert completion.usage.output_tokens == 45
    assert completion.usage.reasoning_tokens == 40
    assert completion.model_version == "gemini-1.5-pro-002"
    assert completion.provider_request_id == "resp_1"
    assert completion.logprobs is None


@pytest.mark.parametrize(
    ("word", "finish_reason"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("RECITATION", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("LANGUAGE", "other"),
        ("A_REASON_OF_TOMORROW", "other"),
    ],
)
def test_a_finish_reason_is_kept_beside_its_standard_name(
    tmp_path: Path, sdk: str, word: str, finish_reason: str
) -> None:
    (completion,), _ = served(tmp_path, lambda call: Response(response(finishReason=word)), sdk=sdk)
    assert completion.text == "Hi."
    assert completion.provider_finish_reason == word
    assert completion.finish_reason == finish_reason


def test_an_answer_cut_by_the_safety_filter_is_an_answer_with_or_without_text(
    tmp_path: Path, sdk: str
) -> None:
    silent = {"candidates": [{"finishReason": "SAFETY"}], "usageMetadata": {"promptTokenCount": 7}}
    bodies = {"spoken": response(finishReason="SAFETY"), "silent": silent}
    completions, _ = served(
        tmp_path, lambda call: Response(bodies[call.prompt]), map(question, bodies), sdk=sdk
    )
    answers = {c.request_id: (c.text, c.finish_reason, c.error) for c in completions}
    assert answers == {
        "id of spoken": ("Hi.", "content_filter", None),
        "id of silent": ("", "content_filter", None),
    }


def test_a_blocked_prompt_is_recorded_once_as_content_filter(tmp_path: Path, sdk: str) -> None:
    body = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "responseId": "resp_2"}
    (completion,), calls = served(tmp_path, lambda call: Response(body), sdk=sdk)
    assert completion.text is None
    assert completion.error == "the prompt was blocked: PROHIBITED_CONTENT"
    assert completion.error_type == "content_filter"
    assert completion.provider_request_id == "resp_2"
    assert len(calls) == 1
    assert log(tmp_path)[0]["status"] == 200


def test_log_probabilities_are_read_flat(tmp_path: Path, sdk: str) -> None:
    def token(text: str, id_: int, logprob: float) -> dict[str, Any]:
        return {"token": text, "tokenId": id_, "logProbability": logprob}

    result = {
        "chosenCandidates": [token("b", 2, -1.5), {"token": "?", "logProbability": -9.0}],
        "topCandidates": [
            {"candidates": [token("a", 1, -0.5), token("b", 2, -1.5)]},
            {"candidates": [token("c", 3, -0.25)]},
        ],
    }
    (completion,), (call,) = served(
        tmp_path, lambda call: Response(response(logprobsResult=result)), [question(logprobs=2)], sdk=sdk
    )
    assert call.body["generationConfig"]["responseLogprobs"] is True
    assert call.body["generationConfig"]["logprobs"] == 2
    logprobs = completion.logprobs
    assert logprobs is not None
    assert list(logprobs.token_ids) == [2, -1]
    assert list(logprobs.tokens) == ["b", "?"]
    assert list(logprobs.logprobs) == [-1.5, -9.0]
    assert list(logprobs.ranks) == [2, 0]
    assert list(logprobs.top_offsets) == [0, 2, 3]
    assert list(logprobs.top_token_ids) == [1, 2, 3]
    assert list(logprobs.top_tokens) == ["a", "b", "c"]
    assert list(logprobs.top_logprobs) == [-0.5, -1.5, -0.25]
    assert completion.logprobs_mode is None


def test_a_chosen_token_alone_has_no_alternatives(tmp_path: Path, sdk: str) -> None:
    result = {"chosenCandidates": [{"token": "a"}]}
    (completion,), _ = served(
        tmp_path, lambda call: Response(response(logprobsResult=result)), [question(logprobs=0)], sdk=sdk
    )
    assert completion.logprobs is not None
    assert math.isnan(completion.logprobs.logprobs[0])
    assert list(completion.logprobs.top_offsets) == [0, 0]


def test_a_request_goes_out_with_all_its_settings(tmp_path: Path, sdk: str) -> None:
    safety = [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}]
    asked = question(
        system="Be brief.",
        messages=(
            Message("system", "Be kind."),
            Message("user", "Hi"),
            Message("assistant", "Yes?"),
            Message("user", "Why?"),
        ),
        temperature=0.0,
        top_p=0.5,
        top_k=40,
        stop=("END",),
        options={"safety_settings": safety},
    )
    _, (call,) = served(tmp_path, lambda call: None, [asked], options={"safety_settings": safety}, sdk=sdk)
    assert call.path.partition("?")[0] == "/v1beta/models/gemini-1.5-pro:generateContent"
    assert call.headers["x-goog-api-key"] == KEY
    assert KEY not in call.path
    assert call.body["contents"] == [
        {"role": "user", "parts": [{"text": "Hi"}]},
        {"role": "model", "parts": [{"text": "Yes?"}]},
        {"role": "user", "parts": [{"text": "Why?"}]},
    ]
    assert call.body["systemInstruction"]["parts"] == [{"text": "Be brief.\n\nBe kind."}]
    assert call.body["generationConfig"] == {
        "maxOutputTokens": 64,
        "temperature": 0.0,
        "topP": 0.5,
        "topK": 40,
        "stopSequences": ["END"],
    }
    (setting,) = call.body["safetySettings"]
    assert setting["category"] in ("HARM_CATEGORY_HARASSMENT", 7)  # JSON of protocol buffers takes numbers
    assert setting["threshold"] in ("BLOCK_NONE", 4)


def test_what_a_request_leaves_open_is_not_sent(tmp_path: Path, sdk: str) -> None:
    _, (call,) = served(tmp_path, lambda call: None, sdk=sdk)
    assert call.body["generationConfig"] == {"maxOutputTokens": 64}
    assert not call.body.keys() & {"systemInstruction", "safetySettings", "tools"}


def test_google_genai_sends_a_seed_and_thinking_settings(tmp_path: Path) -> None:
    thinking = {"thinking_budget": 128, "include_thoughts": True}
    asked = [question(seed=7, options={"thinking": thinking})]
    _, (call,) = served(
        tmp_path, lambda call: None, asked, options={"thinking": thinking}, sdk="google-genai"
    )
    assert call.body["generationConfig"]["seed"] == 7
    sent = call.body["generationConfig"]["thinkingConfig"]
    assert sent == thinking  # JSON of protocol buffers takes these names as it takes thinkingBudget


@pytest.mark.parametrize(
    ("sdk", "options", "problem"),
    [
        (
            "google-generativeai",
            {"safety_settings": [{"category": "X", "threshold": "OFF"}]},
            "sdk: google-genai",
        ),
        ("google-genai", {"thinking": {"thinking_bugdet": 0}}, "thinking_config.thinking_bugdet"),
        ("google-genai", {"safety_settings": "off"}, "safety_settings"),
    ],
)
def test_an_option_that_cannot_be_sent_is_refused_before_anything_is_asked(
    tmp_path: Path, sdk: str, options: Mapping[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        served(tmp_path, lambda call: None, options=options, sdk=sdk)
    assert problem in str(refused.value)


def test_a_seed_is_never_dropped_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"):
        run_fast(ask(context(config("http://127.0.0.1:9"), tmp_path), [question(seed=7)]))


def test_without_a_key_nothing_is_asked(tmp_path: Path, sdk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="GOOGLE_API_KEY"):
        served(tmp_path, lambda call: None, api_key=None, sdk=sdk)


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(tmp_path: Path, sdk: str) -> None:
    with pytest.raises(ConfigError, match="key") as refused:
        served(tmp_path, lambda call: None, api_key=f"{KEY}…", sdk=sdk)
    assert KEY not in str(refused.value)


HEALED: Mapping[str, tuple[Response | Fault, str]] = {
    "timeout": (error(408), "StatusError"),
    "conflict": (error(409), "StatusError"),
    "rate limit": (error(429, "RESOURCE_EXHAUSTED"), "StatusError"),
    "server error": (error(500, "INTERNAL"), "StatusError"),
    "bad gateway": (Response("<html>Bad gateway</html>", 502), "StatusError"),
    "a list of errors": (Response([{"error": {"code": 503, "message": "busy"}}], 503), "StatusError"),
    "deadline": (error(504, "DEADLINE_EXCEEDED"), "StatusError"),
    "reset": (Fault.RESET, "ConnectionError"),
    "cut": (Fault.CUT, "ConnectionError"),
    "hang": (Fault.HANG, "TimeoutError"),
    "truncated JSON": (Response(b'{"candidates": [{"con'), "MalformedError"),
    "not UTF-8": (Response(b'{"responseId": "\xff"}'), "MalformedError"),
    "empty": (Response(b""), "MalformedError"),
    "HTML": (Response("<html>Sign in to this network</html>"), "MalformedError"),
    "another JSON": (Response({"status": "fine"}), "MalformedError"),
    "a JSON list": (Response(b"[1, 2]"), "MalformedError"),
    "no candidates": (Response({"candidates": []}), "MalformedError"),
    "a bare candidate": (Response({"candidates": [{}]}), "MalformedError"),
}


@pytest.mark.parametrize(("fault", "exception"), HEALED.values(), ids=HEALED.keys())
def test_what_may_pass_is_tried_again(
    tmp_path: Path, sdk: str, fault: Response | Fault, exception: str
) -> None:
    (completion,), calls = served(tmp_path, lambda call: fault if call.attempt == 1 else None, sdk=sdk)
    assert completion.text == answer_to("Hello?")
    assert len(calls) == 2
    first, second = log(tmp_path)
    assert (first["exception"], second["exception"]) == (exception, None)
    assert first["status"] == (fault.status if isinstance(fault, Response) else None)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.HANG, Response("<html>"), error(500)])
def test_a_fault_that_stays_is_recorded_after_the_last_retry(
    tmp_path: Path, sdk: str, fault: Response | Fault
) -> None:
    (completion,), calls = served(tmp_path, lambda call: fault, sdk=sdk)
    assert completion.text is None
    assert completion.error is not None
    assert completion.error.startswith("Failed after 3 retries: ")
    assert len(calls) == 4


def test_the_delay_that_the_server_asks_for_is_waited_for(tmp_path: Path, sdk: str) -> None:
    busy = error(
        429,
        "RESOURCE_EXHAUSTED",
        "You exceeded your current quota, please check your plan and billing details.",
        quota_failure("GenerateRequestsPerMinutePerProjectPerModel"),
        retry_info("53.5s"),
    )
    (completion,), _ = served(tmp_path, lambda call: busy if call.attempt == 1 else None, sdk=sdk)
    assert completion.text == answer_to("Hello?")
    assert completion.retry_count == 0
    assert log(tmp_path)[1]["wait"] >= 53.5


@pytest.mark.parametrize(
    "refusal",
    [
        error(
            400, "INVALID_ARGUMENT", "The input token count (1200000) exceeds the maximum number of tokens"
        ),
        error(413, "INVALID_ARGUMENT", "Request payload size exceeds the limit"),
    ],
)
def test_what_is_wrong_with_one_prompt_is_recorded_and_the_others_go_on(
    tmp_path: Path, sdk: str, refusal: Response
) -> None:
    completions, calls = served(
        tmp_path,
        lambda call: refusal if call.prompt == "bad" else None,
        [question("bad"), question("good")],
        sdk=sdk,
    )
    bad, good = sorted(completions, key=lambda completion: completion.request_id)
    assert bad.error_type == "bad_request"
    assert good.text == answer_to("good")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        (error(401, "UNAUTHENTICATED", f"invalid key {KEY}"), "check `api_key`"),
        (error(403, "PERMISSION_DENIED"), "check what `api_key` is allowed"),
        (error(404, "NOT_FOUND", "models/gemini-9 is not found"), "check the model's `name`"),
        (
            error(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."),
            "check `api_key`",
        ),
        (error(400, "INVALID_ARGUMENT", "...", {"reason": "API_KEY_INVALID"}), "check `api_key`"),
        (error(400, "FAILED_PRECONDITION", "User location is not supported"), "Google AI Studio"),
        (
            error(400, "INVALID_ARGUMENT", "Logprobs is not enabled for models/gemini-9"),
            "change that setting",
        ),
        (
            error(
                429,
                "RESOURCE_EXHAUSTED",
                "You exceeded your current quota",
                quota_failure("GenerateRequestsPerDayPerProjectPerModel-FreeTier"),
                retry_info("20s"),
            ),
            "when the day's quota is renewed",
        ),
        (error(429, "RESOURCE_EXHAUSTED", "Quota exceeded for metric: m, limit: 0"), "raise the limit"),
        (
            error(429, "RESOURCE_EXHAUSTED", "Your project has exceeded its monthly spending cap."),
            "raise the limit",
        ),
    ],
)
def test_what_no_request_can_pass_stops_the_lane_with_the_fix(
    tmp_path: Path, sdk: str, refusal: Response, fix: str
) -> None:
    with pytest.raises(LaneError) as stopped:
        served(tmp_path, lambda call: refusal, [question()], sdk=sdk)
    assert fix in str(stopped.value)
    assert KEY not in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert len(log(tmp_path)) == 1


def test_the_key_is_masked_where_a_server_repeats_it(tmp_path: Path, sdk: str) -> None:
    refusal = error(422, "INVALID_ARGUMENT", f"key={KEY}?")
    (completion,), _ = served(tmp_path, lambda call: refusal, sdk=sdk)
    assert completion.error == "HTTP 422 INVALID_ARGUMENT: key=***?"


def test_two_accounts_are_asked_at_the_same_time_each_with_its_own_key(tmp_path: Path, sdk: str) -> None:
    async def main() -> list[list[Call]]:
        async with FaultServer(GEMINI) as one, FaultServer(GEMINI) as other:
            first = context(config(one.url, api_key="first-key", sdk=sdk), tmp_path)
            second = context(config(other.url, api_key="second-key", sdk=sdk), tmp_path)
            async with (
                open_provider("gemini", first) as provider,
                open_provider("gemini", replace(second, run_id="other")) as other_provider,
            ):
                for generate in (provider.generate, other_provider.generate):
                    async with aclosing(generate([question()])) as completions:
                        assert [c.text async for c in completions] == [answer_to("Hello?")]
            return [one.calls, other.calls]

    (first,), (second,) = run_fast(main())
    assert first.headers["x-goog-api-key"] == "first-key"
    assert second.headers["x-goog-api-key"] == "second-key"


def test_as_many_requests_are_in_flight_as_the_config_allows(tmp_path: Path, sdk: str) -> None:
    async def main() -> int:
        async with FaultServer(GEMINI, lambda call: Response(response(), delay=100)) as server:
            asked = [question(f"prompt {n}") for n in range(120)]
            await ask(
                context(config(server.url, max_concurrency=60, timeout=1000.0, sdk=sdk), tmp_path), asked
            )
            return server.most_at_once

    assert run_fast(main()) == 60


CHAOS: list[tuple[float, Response | Fault]] = [
    (0.10, error(429, "RESOURCE_EXHAUSTED", "...", retry_info("1s"))),
    (0.15, error(500)),
    (0.17, Fault.RESET),
    (0.19, Fault.HANG),
    (0.20, Response("<html>")),
    (0.21, Response(b'{"candidates": [{"con')),
]


def chaos(call: Call) -> Response | Fault | None:
    """10% 429, 5% 5xx, 2% resets, 2% hangs, 2% garbage: always the same for an attempt at a prompt."""
    digest = hashlib.blake2b(f"{call.prompt} {call.attempt}".encode()).digest()
    draw = int.from_bytes(digest[:4], "big") / 2**32
    return next((fault for share, fault in CHAOS if draw < share), None)


def test_every_prompt_is_answered_once_through_chaos(tmp_path: Path, sdk: str) -> None:
    prompts = [f"prompt {n}" for n in range(300)]
    completions, calls = served(tmp_path, chaos, map(question, prompts), max_concurrency=32, sdk=sdk)
    answers = {completion.request_id: completion.text for completion in completions}
    assert answers == {f"id of {prompt}": answer_to(prompt) for prompt in prompts}
    assert len(completions) == len(prompts)
    assert Counter(call.prompt for call in calls if chaos(call) is None) == Counter(prompts)
    assert len(calls) > 345


def test_the_wire_is_that_of_a_server_written_elsewhere(tmp_path: Path, sdk: str, llmock: LLMock) -> None:
    llmock.fail(503, times=1)
    asked = [question(f"prompt {n}", temperature=0.7) for n in range(20)]
    completions = run_fast(
        ask(context(config(llmock.base_url("gemini"), sdk=sdk), tmp_path), asked), speed=20
    )
    assert {completion.request_id for completion in completions} == {one.request_id for one in asked}
    assert all(completion.text and completion.usage.output_tokens for completion in completions)
    assert len(llmock.requests) == len(log(tmp_path)) == 21
