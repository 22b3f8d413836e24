from __future__ import annotations

from typing import Any

import pytest

from hallubench.accepts import EVERYTHING, SAMPLING, accepted, check_parameters
from hallubench.config import ModelConfig
from hallubench.errors import ConfigError


def entry(name: str, type_: str = "claude", **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": name, "type": type_} | keys)


def asking(name: str, parameter: str) -> ModelConfig:
    return ModelConfig.model_validate({"name": name, "type": "claude", parameter: 1})


def refusal(entry: ModelConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        check_parameters(entry, "models[3]")
    return str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "claude-2.1",
        "claude-instant-1.2",
        "claude-3-opus-20240229",
        "claude-3-5-sonnet-20241022",
        "claude-3-7-sonnet-latest",
        "claude-opus-4-20250514",
        "claude-opus-4-1-20250805",
        "claude-sonnet-4-5",
        "claude-haiku-4-5-20251001",
        "claude-opus-4-6",
        "anthropic/claude-sonnet-4.6",
        "anthropic.claude-3-haiku-20240307-v1:0",
        "claude-sonnet-4@20250514",
    ],
)
def test_claude_up_to_the_4_6_line_takes_sampling_parameters(name: str) -> None:
    assert accepted(entry(name)) == SAMPLING


@pytest.mark.parametrize(
    "name",
    [
        "claude-opus-4-7",
        "claude-opus-4-10",
        "anthropic/claude-opus-4.8",
        "claude-sonnet-5",
        "claude-haiku-5-20261001",
        "claude-sonnet-5-1",
        "claude-opus-10",
        "claude-something-new",
        "my-claude",
    ],
)
@pytest.mark.parametrize("parameter", ["temperature", "top_p", "top_k"])
def test_newer_and_unknown_claude_rejects_them(name: str, parameter: str) -> None:
    assert accepted(entry(name)) == frozenset()
    said = refusal(asking(name, parameter))
    assert said.startswith(f"models[3].{parameter}: {name} does not take it; ")
    assert said.endswith(f"models[3].accepts: {{{parameter}: true}}")
    check_parameters(entry(name), "models[3]")


@pytest.mark.parametrize("name", ["claude-opus-4-1", "claude-sonnet-4-5"])
def test_claude_4_takes_temperature_or_top_p_and_not_both(name: str) -> None:
    check_parameters(entry(name, temperature=0.5), "models[3]")
    check_parameters(entry(name, top_p=0.5, top_k=5), "models[3]")
    both: dict[str, Any] = {"temperature": 0.5, "top_p": 0.5}
    assert "does not take it beside `temperature`; remove one" in refusal(entry(name, **both))
    check_parameters(entry(name, **both, accepts={"temperature": True, "top_p": True}), "models[3]")
    check_parameters(entry("claude-3-5-sonnet-20241022", **both), "models[3]")


@pytest.mark.parametrize("parameter", ["seed", "logprobs", "prompt_logprobs"])
def test_claude_has_no_seed_and_no_log_probabilities(parameter: str) -> None:
    name = "claude-3-5-sonnet-20241022"
    said = refusal(asking(name, parameter))
    assert said == f"models[3].{parameter}: {name} does not take it; remove it"
    said = refusal(entry(name, accepts={parameter: True}))
    assert said == f"models[3].accepts.{parameter}: type claude cannot send it; remove it"


def test_another_model_behind_anthropics_protocol_takes_what_can_be_sent() -> None:
    assert accepted(entry("Qwen/Qwen3-0.6B", base_url="http://127.0.0.1:8000")) == SAMPLING


def test_a_seed_for_gemini_needs_the_sdk_that_sends_it() -> None:
    gemini: dict[str, Any] = {"temperature": 0.7, "logprobs": 5, "seed": 1}
    assert refusal(entry("gemini-1.5-pro", "gemini", **gemini)).endswith(
        "remove it, or write `sdk: google-genai`, which can send it"
    )
    check_parameters(entry("gemini-1.5-pro", "gemini", sdk="google-genai", **gemini), "models[3]")
    assert "google-generativeai cannot send it" in refusal(
        entry("gemini-1.5-pro", "gemini", accepts={"seed": True})
    )
    assert "models[3].prompt_logprobs" in refusal(
        entry("gemini-1.5-pro", "gemini", sdk="google-genai", prompt_logprobs=1)
    )


@pytest.mark.parametrize("type_", ["local", "echo", "openai", "of-another-package"])
def test_the_other_types_take_everything(type_: str) -> None:
    everything: dict[str, Any] = dict.fromkeys(EVERYTHING, 1)
    assert accepted(entry("some-model", type_)) == EVERYTHING
    check_parameters(entry("some-model", type_, **everything), "models[3]")


def test_an_entry_overrules_the_table_both_ways() -> None:
    newer = entry("claude-opus-5", temperature=0.7, accepts={"temperature": True})
    assert accepted(newer) == {"temperature"}
    check_parameters(newer, "models[3]")
    reasoning = entry("o9", "openai", temperature=0.7, accepts={"temperature": False, "seed": False})
    assert accepted(reasoning) == EVERYTHING - {"temperature", "seed"}
    assert "models[3].temperature: o9 does not take it" in refusal(reasoning)


@pytest.mark.parametrize(
    ("type_", "options", "problem"),
    [
        (
            "claude",
            {"thinkin": {}},
            "thinkin: type claude does not send it; it sends thinking, output_config",
        ),
        ("openai", {"reasoning_effort": "low"}, "reasoning_effort: type openai does not send it"),
        ("local", {"min_p": 0.1}, "min_p: type local does not send it; remove it"),
        (
            "gemini",
            {"thinking": {}},
            "thinking: google-generativeai cannot send it; write `sdk: google-genai`",
        ),
    ],
)
def test_an_option_that_would_be_dropped_in_silence_is_refused(
    type_: str, options: dict[str, Any], problem: str
) -> None:
    assert refusal(entry("m", type_, options=options)).startswith(f"models[3].options.{problem}")


def test_an_installed_provider_knows_its_own_options() -> None:
    check_parameters(entry("m", "someone-elses", options={"anything": 1}), "models[0]")
