"""What a provider is: one method. Each SDK lives in one file of this package.

A provider from another package arrives by an entry point in the group `hallubench.providers`,
whose name is the `type` written in a config and whose object is called like those of `BUILTIN`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hallubench.errors import ConfigError
from hallubench.types import Completion, Request

if TYPE_CHECKING:
    from hallubench.config import Config, ModelConfig


ENTRY_POINTS = "hallubench.providers"


class Provider(Protocol):
    """Answers requests.

    `generate` draws lazily from `requests`, yields exactly one `Completion` for each, in the order
    they finish, joined by `request_id`. A request that failed is a Completion with `error` set. It
    raises `LaneError` only when nothing more can be asked (bad key, unknown model); requests drawn and
    not yielded then stay pending. After an `EngineDied` they go to a provider that is opened anew, once.
    """

    def generate(self, requests: Iterable[Request]) -> AsyncGenerator[Completion, None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a provider is opened with."""

    config: Config
    entries: Sequence[ModelConfig]
    """The config's entries that it answers: one account's, or those that share one loaded engine."""
    run_id: str
    runs_dir: Path
    """`OUTPUT/_runs`: where its log goes."""
    record: Callable[[str, object], None]
    """Adds a fact under a key to the run's provenance record."""
    notify: Callable[[str], None]
    """Shows the user one line."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the run shall end soon: start nothing new, finish what is in flight."""


class OpenProvider(Protocol):
    """What a `type` stands for: opens a provider and closes it at the end of the block."""

    def __call__(self, context: Context) -> AbstractAsyncContextManager[Provider]: ...


BUILTIN = {
    "local": "hallubench.providers.vllm:open_vllm",
    "claude": "hallubench.providers.anthropic:open_anthropic",
    "gemini": "hallubench.providers.gemini:open_gemini",
    "openai": "hallubench.providers.openai:open_openai",
    "echo": "hallubench.providers.echo:open_echo",
}


def open_provider(type_: str, context: Context) -> AbstractAsyncContextManager[Provider]:
    """Open the provider that a config's `type` stands for; use it with `async with`."""
    if type_ in BUILTIN:
        module, _, name = BUILTIN[type_].partition(":")
        opener: OpenProvider = getattr(import_module(module), name)
    else:
        (entry_point,) = entry_points(group=ENTRY_POINTS, name=type_)
        opener = entry_point.load()
    return opener(context)


def check_type(type_: str) -> None:
    """Refuse a `type` for which there is no provider; imports nothing of it.

    Raises:
        ConfigError: neither built in nor installed.
    """
    if type_ not in BUILTIN and not entry_points(group=ENTRY_POINTS, name=type_):
        known = sorted({*BUILTIN, *entry_points(group=ENTRY_POINTS).names})
        raise ConfigError(f"no provider is called {type_!r}; write one of {', '.join(known)}")
