"""Asking one API provider directly, as the tests of each of them do. Their keys hold the word Secret."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fault_server import Behaviour, Call, FaultServer, Wire, run_fast

from hallubench.config import Config
from hallubench.providers import Context, open_provider
from hallubench.types import Completion, Message, Prompt, Request, SamplingParams

RUN_ID = "20260131T100123-a1b2c3"


def context(config: Config, folder: Path, notes: list[str] | None = None) -> Context:
    return Context(
        config=config,
        entries=config.models,
        run_id=RUN_ID,
        runs_dir=folder,
        record=lambda key, fact: None,
        notify=(notes if notes is not None else []).append,
    )


async def ask(context: Context, requests: Iterable[Request]) -> list[Completion]:
    async with (
        open_provider(context.entries[0].type, context) as provider,
        aclosing(provider.generate(requests)) as completions,
    ):
        return [completion async for completion in completions]


def request_to(
    provider: str,
    model: str,
    text: str = "Hello?",
    *,
    system: str | None = None,
    messages: tuple[Message, ...] | None = None,
    options: Mapping[str, Any] | None = None,
    **params: Any,
) -> Request:
    return Request(
        request_id=f"id of {text}",
        prompt=Prompt(id=text, index=0, text=None if messages else text, messages=messages),
        sample_index=0,
        provider=provider,
        model=model,
        system_prompt=system,
        params=SamplingParams(**({"max_tokens": 64} | params)),
        options=options or {},
    )


def served_by(
    wire: Wire,
    config_of: Callable[..., Config],
    question: Request,
    folder: Path,
    behave: Behaviour,
    requests: Iterable[Request] | None = None,
    **entry: Any,
) -> tuple[list[Completion], list[Call]]:
    """The completions of a server that behaves so, and the calls it saw: as many as the log has lines."""

    async def main() -> tuple[list[Completion], list[Call]]:
        async with FaultServer(wire, behave) as server:
            asked = context(config_of(server.url, **entry), folder)
            try:
                return await ask(asked, [question] if requests is None else requests), server.calls
            finally:
                assert len(log(folder)) == len(server.calls)

    return run_fast(main())


def log(folder: Path) -> list[dict[str, Any]]:
    text = "".join(path.read_text() for path in folder.glob(f"{RUN_ID}.attempts.jsonl"))
    assert "Secret" not in text
    return [json.loads(line) for line in text.splitlines()]
