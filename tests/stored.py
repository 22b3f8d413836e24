"""A store of answers that a test says word by word."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from hallubench.schema import Row
from hallubench.store import Store
from hallubench.types import (
    Completion,
    FinishReason,
    Logprobs,
    Message,
    Prompt,
    Request,
    SamplingParams,
    Usage,
)

RUN = "20261123-080000-a1b2c3"
QWEN = "Qwen/Qwen3-0.6B"
CLAUDE = "claude-haiku-4-5"


def answer(
    prompt_id: str = "p1",
    text: str = "Yes.",
    *,
    model: str = QWEN,
    temperature: float | None = 0.0,
    sample: int = 0,
    prompt: str | tuple[Message, ...] | None = "Does CVE-2021-44228 exist?",
    system_prompt: str | None = None,
    error: str | None = None,
    gold_label: Any = None,
    is_synthetic_probe: bool | None = None,
    finish_reason: FinishReason = "stop",
    reasoning: str | None = None,
    cost_usd: float | None = None,
    logprobs: Logprobs | None = None,
) -> Row:
    messages = prompt if isinstance(prompt, tuple) else None
    asked = (prompt_id, prompt, model, temperature, sample, system_prompt)
    request = Request(
        request_id=hashlib.blake2b(repr(asked).encode(), digest_size=10).hexdigest(),
        prompt=Prompt(
            id=prompt_id,
            index=0,
            text=None if isinstance(prompt, tuple) else prompt,
            messages=messages,
            category="cve_existence",
            is_synthetic_probe=is_synthetic_probe,
            gold_label=gold_label,
        ),
        sample_index=sample,
        provider="vllm",
        model=model,
        system_prompt=system_prompt,
        params=SamplingParams(max_tokens=64, temperature=temperature, seed=42 + sample),
    )
    completion = Completion(
        request_id=request.request_id,
        timestamp=datetime(2026, 11, 23, 8, 1, 23, tzinfo=UTC),
        elapsed_seconds=2.345,
        text=None if error else text,
        finish_reason="error" if error else finish_reason,
        reasoning=reasoning,
        usage=Usage() if error else Usage(input_tokens=42, output_tokens=7),
        logprobs=logprobs,
        error=error,
        error_type="timeout" if error else None,
    )
    return Row(RUN, request, completion, cost_usd)


def logprobs_of(*tokens: tuple[str, float], others: Sequence[tuple[str, float]] = ()) -> Logprobs:
    """Of chosen tokens with their probabilities; the alternatives are the token itself and `others`."""
    tops = [sorted([token, *others], key=itemgetter(1), reverse=True) for token in tokens]
    return Logprobs(
        token_ids=array("i", range(len(tokens))),
        tokens=[token for token, _ in tokens],
        logprobs=array("f", [math.log(probability) for _, probability in tokens]),
        ranks=array("i", [top.index(token) + 1 for top, token in zip(tops, tokens, strict=True)]),
        top_offsets=array("i", range(0, len(tokens) * (1 + len(others)) + 1, 1 + len(others))),
        top_token_ids=array("i", range(len(tokens) * (1 + len(others)))),
        top_tokens=[token for top in tops for token, _ in top],
        top_logprobs=array("f", [math.log(probability) for top in tops for _, probability in top]),
    )


def store(folder: Path, *rows: Row) -> Path:
    with Store(folder, RUN) as writer:
        for row in rows:
            writer.append(row)
    return folder
