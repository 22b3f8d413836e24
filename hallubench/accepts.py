"""What each model family takes: the one table of it, which an entry's `accepts` overrules.

A parameter that would have to be left out in silence makes an answer something else than its row says.
So what an entry asks for and cannot have is refused; the config's own seed reaches those that take one.
"""

from __future__ import annotations

import re
from typing import get_args

from hallubench.config import ModelConfig, Parameter
from hallubench.errors import ConfigError
from hallubench.text import printable

SAMPLING: frozenset[Parameter] = frozenset({"temperature", "top_p", "top_k"})
EVERYTHING: frozenset[Parameter] = frozenset(get_args(Parameter))

CLAUDE = re.compile(r"claude-(?:[a-z]+-)?(?P<major>\d{1,2})(?:[-.](?P<minor>\d{1,2}))?(?!\d)")
"""claude-3-5-sonnet-20241022, claude-opus-4-20250514, claude-haiku-4-5: a date is no version."""
LAST_CLAUDE_WITH_SAMPLING = (4, 6)
FIRST_CLAUDE_WITH_TEMPERATURE_OR_TOP_P = (4, 0)
"""From this version on the API refuses the two together."""

OPTIONS = {
    "claude": ("thinking", "output_config"),
    "gemini": ("thinking", "safety_settings"),
    "openai": ("extra_body",),
    "local": (),
    "echo": (),
}
"""The keys of an entry's `options` that its type sends. Installed providers know their own."""


def accepted(entry: ModelConfig) -> frozenset[Parameter]:
    """The parameters that an entry's model takes, as far as they are not the same everywhere."""
    taken = _taken(entry)
    return frozenset(name for name in EVERYTHING if entry.accepts.get(name, name in taken))


def check_parameters(entry: ModelConfig, where: str) -> None:
    """Refuse what an entry asks for and cannot have.

    Args:
        entry: of a config.
        where: its place there, as "models[0]".

    Raises:
        ConfigError: it sets a parameter that its model does not take, or `accepts` names one that its
            type has no way to send.
    """
    name = printable(entry.name)
    for parameter, takes in entry.accepts.items():
        if takes and parameter not in sendable(entry):
            raise ConfigError(f"{where}.accepts.{parameter}: {_sender(entry)} cannot send it; remove it")
    for parameter in sorted(EVERYTHING - accepted(entry)):
        if getattr(entry, parameter) is not None:
            raise ConfigError(
                f"{where}.{parameter}: {name} does not take it; {_fix(entry, where, parameter)}"
            )
    _check_options(entry, where)
    overruled = entry.accepts.get("temperature") and entry.accepts.get("top_p")
    if (
        entry.temperature is not None
        and entry.top_p is not None
        and not overruled
        and (_claude_version(entry) or (0, 0)) >= FIRST_CLAUDE_WITH_TEMPERATURE_OR_TOP_P
    ):
        raise ConfigError(f"{where}.top_p: {name} does not take it beside `temperature`; remove one of them")


def _check_options(entry: ModelConfig, where: str) -> None:
    known = OPTIONS.get(entry.type, tuple(entry.options))
    for option in entry.options:
        shown = f"{where}.options.{printable(option)}"
        if option not in known:
            remedy = f"it sends {', '.join(known)}" if known else "remove it"
            raise ConfigError(f"{shown}: type {entry.type} does not send it; {remedy}")
        if option == "thinking" and entry.type == "gemini" and entry.sdk != "google-genai":
            raise ConfigError(f"{shown}: {_sender(entry)} cannot send it; write `sdk: google-genai`")


def sendable(entry: ModelConfig) -> frozenset[Parameter]:
    """The parameters that an entry's type has a way to send, whatever its model takes."""
    match entry.type, entry.sdk:
        case "claude", _:
            return SAMPLING
        case "gemini", "google-genai":
            return SAMPLING | {"seed", "logprobs"}
        case "gemini", _:
            return SAMPLING | {"logprobs"}
        case _:
            return EVERYTHING


def _taken(entry: ModelConfig) -> frozenset[Parameter]:
    if entry.type == "claude" and "claude" in entry.name:  # others may speak the same protocol
        version = _claude_version(entry)
        if version is None or version > LAST_CLAUDE_WITH_SAMPLING:
            return frozenset()
    return sendable(entry)


def _claude_version(entry: ModelConfig) -> tuple[int, int] | None:
    if entry.type != "claude" or not (found := CLAUDE.search(entry.name)):
        return None
    return int(found["major"]), int(found["minor"] or 0)


def _sender(entry: ModelConfig) -> str:
    return (entry.sdk or "google-generativeai") if entry.type == "gemini" else f"type {entry.type}"


def _fix(entry: ModelConfig, where: str, parameter: Parameter) -> str:
    if parameter in sendable(entry):
        return f"remove it, or if it does: {where}.accepts: {{{parameter}: true}}"
    if entry.type == "gemini" and parameter == "seed":
        return "remove it, or write `sdk: google-genai`, which can send it"
    return "remove it"
