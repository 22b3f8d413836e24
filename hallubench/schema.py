"""The columns of the store, each described, and completions on their way into them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from hallubench.types import Completion, Logprobs, Request

SCHEMA_VERSION = "1"


class Row(NamedTuple):
    """A request with its completion: one row of the store."""

    run_id: str
    request: Request
    completion: Completion
    cost_usd: float | None


def _column(name: str, kind: pa.DataType, description: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


_TEXT = pa.string()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))

COLUMNS = [
    _column("run_id", _TEXT, "The run that wrote the row; described in _runs/<run_id>.json"),
    _column("request_id", _TEXT, "20 hex digits over all that determines the answer; unique in the store"),
    _column("prompt_id", _TEXT, "The prompt's id"),
    _column("prompt_index", pa.int32(), "The prompt's place in the prompts file, from 0"),
    _column("sample_index", pa.int32(), "Which of the entry's n samples, from 0"),
    _column("provider", _TEXT, "What answered: vllm, anthropic, gemini, echo, ..."),
    _column("model", _TEXT, "The model's name in the config"),
    _column("model_version", _TEXT, "Hub commit, hash of local weights, or the server's name for the model"),
    _column("prompt", _TEXT, "Text of a plain prompt; null for a chat prompt"),
    _column("messages", _MESSAGES, "Turns of a chat prompt; null for a plain prompt"),
    _column("system_prompt", _TEXT, "The entry's system prompt"),
    _column("full_response", _TEXT, 'The answer, "" if the model said nothing; null where `error` is set'),
    _column("reasoning", _TEXT, "Reasoning text, where the provider shows it"),
    _column("finish_reason", _TEXT, "stop, length, content_filter, error or other"),
    _column("provider_finish_reason", _TEXT, "The provider's own word for it"),
    _column("error", _TEXT, "Why there is no answer; null where there is one"),
    _column("error_type", _TEXT, "Class of the error"),
    _column("retry_count", pa.int32(), "Attempts after the first"),
    _column("temperature", pa.float64(), "As sent; null: not sent, the provider's default held"),
    _column("top_p", pa.float64(), "As sent; null: not sent"),
    _column("top_k", pa.int64(), "As sent; null: not sent"),
    _column("max_tokens", pa.int64(), "Longest answer allowed, in tokens"),
    _column("stop", pa.list_(_TEXT), "Texts that end the answer; null: none"),
    _column("seed", pa.int64(), "As sent; null: not sent"),
    _column("options", _TEXT, "JSON object: every other setting that shapes the answer; null: none"),
    _column("input_tokens", pa.int64(), "Tokens of the prompt, as the provider counts"),
    _column("output_tokens", pa.int64(), "Tokens of the answer, reasoning included"),
    _column("cached_tokens", pa.int64(), "The part of input_tokens served from a cache"),
    _column("reasoning_tokens", pa.int64(), "The part of output_tokens spent on reasoning"),
    _column("timestamp", pa.timestamp("us", tz="UTC"), "When the completion was whole"),
    _column("elapsed_seconds", pa.float64(), "From sending to the whole answer, without queueing here"),
    _column("cost_usd", pa.float64(), "By the config's prices; null: none given"),
    _column("provider_request_id", _TEXT, "The provider's own id of the request"),
    _column("prompt_category", _TEXT, "The prompt's category"),
    _column("is_synthetic_probe", pa.bool_(), "Whether the prompt asks about something invented"),
    _column("gold_label", _TEXT, "JSON: the prompt's gold label as it came"),
    _column("gold_refs", pa.list_(_TEXT), "The prompt's references"),
    _column("original_id", _TEXT, "The prompt's id where it came from"),
    _column("prompt_extra", _TEXT, "JSON object: the prompt's other fields; null: none"),
    _column("logprobs_mode", _TEXT, "raw_logprobs or processed_logprobs (after temperature)"),
]
for _prefix, _what in (("output", "answer"), ("prompt", "prompt")):
    COLUMNS += [
        _column(f"{_prefix}_token_ids", pa.list_(pa.int32()), f"Tokens of the {_what}, by id"),
        _column(f"{_prefix}_token_texts", pa.list_(_TEXT), "Their texts"),
        _column(
            f"{_prefix}_logprobs",
            pa.list_(pa.float32()),
            "Their log-probabilities (natural); null for a first prompt token",
        ),
        _column(
            f"{_prefix}_ranks", pa.list_(pa.int32()), "Their ranks in the vocabulary, 1 is the most probable"
        ),
        _column(
            f"{_prefix}_top_token_ids",
            pa.list_(pa.list_(pa.int32())),
            "At each token, the most probable ones, best first",
        ),
        _column(f"{_prefix}_top_tokens", pa.list_(pa.list_(_TEXT)), "The texts of these"),
        _column(
            f"{_prefix}_top_logprobs", pa.list_(pa.list_(pa.float32())), "The log-probabilities of these"
        ),
    ]

SCHEMA = pa.schema(COLUMNS, metadata={"hallubench_schema": SCHEMA_VERSION})


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows -> one table of the store's schema.

    Text that is not valid Unicode (a lone surrogate, as broken JSON can hold) gets U+FFFD in its
    place, since Parquet stores UTF-8.
    """
    arrays = {
        name: _array([read(row) for row in rows], SCHEMA.field(name).type) for name, read in _READ.items()
    }
    arrays |= _logprob_arrays("output", [row.completion.logprobs for row in rows])
    arrays |= _logprob_arrays("prompt", [row.completion.prompt_logprobs for row in rows])
    return pa.table([arrays[name] for name in SCHEMA.names], schema=SCHEMA)


def valid_text(text: str) -> str:
    """`text` with U+FFFD in place of each lone surrogate."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_READ: Mapping[str, Callable[[Row], Any]] = {
    "run_id": lambda row: row.run_id,
    "request_id": lambda row: row.request.request_id,
    "prompt_id": lambda row: row.request.prompt.id,
    "prompt_index": lambda row: row.request.prompt.index,
    "sample_index": lambda row: row.request.sample_index,
    "provider": lambda row: row.request.provider,
    "model": lambda row: row.request.model,
    "model_version": lambda row: row.completion.model_version,
    "prompt": lambda row: row.request.prompt.text,
    "messages": lambda row: _messages(row.request),
    "system_prompt": lambda row: row.request.system_prompt,
    "full_response": lambda row: row.completion.text,
    "reasoning": lambda row: row.completion.reasoning,
    "finish_reason": lambda row: row.completion.finish_reason,
    "provider_finish_reason": lambda row: row.completion.provider_finish_reason,
    "error": lambda row: row.completion.error,
    "error_type": lambda row: row.completion.error_type,
    "retry_count": lambda row: row.completion.retry_count,
    "temperature": lambda row: row.request.params.temperature,
    "top_p": lambda row: row.request.params.top_p,
    "top_k": lambda row: row.request.params.top_k,
    "max_tokens": lambda row: row.request.params.max_tokens,
    "stop": lambda row: row.request.params.stop or None,
    "seed": lambda row: row.request.params.seed,
    "options": lambda row: _json(row.request.options or None),
    "input_tokens": lambda row: row.completion.usage.input_tokens,
    "output_tokens": lambda row: row.completion.usage.output_tokens,
    "cached_tokens": lambda row: row.completion.usage.cached_tokens,
    "reasoning_tokens": lambda row: row.completion.usage.reasoning_tokens,
    "timestamp": lambda row: row.completion.timestamp,
    "elapsed_seconds": lambda row: row.completion.elapsed_seconds,
    "cost_usd": lambda row: row.cost_usd,
    "provider_request_id": lambda row: row.completion.provider_request_id,
    "prompt_category": lambda row: row.request.prompt.category,
    "is_synthetic_probe": lambda row: row.request.prompt.is_synthetic_probe,
    "gold_label": lambda row: _json(row.request.prompt.gold_label),
    "gold_refs": lambda row: row.request.prompt.gold_refs,
    "original_id": lambda row: row.request.prompt.original_id,
    "prompt_extra": lambda row: _json(row.request.prompt.extra or None),
    "logprobs_mode": lambda row: row.completion.logprobs_mode,
}


def _messages(request: Request) -> list[dict[str, str]] | None:
    if request.prompt.messages is None:
        return None
    return [{"role": turn.role, "content": turn.content} for turn in request.prompt.messages]


def _json(value: Any) -> str | None:
    # ASCII escapes keep even a lone surrogate exactly as it came.
    return None if value is None else json.dumps(value, default=str)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([_valid(value) for value in values], kind)


def _valid(value: Any) -> Any:
    """A value of a column with `valid_text` for all text in it."""
    match value:
        case str():
            return valid_text(value)
        case list() | tuple():
            return [_valid(item) for item in value]
        case dict():
            return {key: _valid(item) for key, item in value.items()}
        case _:
            return value


def _logprob_arrays(prefix: str, rows: Sequence[Logprobs | None]) -> dict[str, pa.Array]:
    """Seven list columns out of flat buffers: one copy each, no Python object a number."""
    given = [row for row in rows if row is not None]
    missing = pa.array([row is None for row in rows]) if len(given) < len(rows) else None
    per_row = _offsets((0 if row is None else len(row.token_ids)) for row in rows)
    per_token = array("i", [0])
    for row in given:
        start = per_token[-1]
        per_token.extend(
            array("i", [start + offset for offset in row.top_offsets[1:]]) if start else row.top_offsets[1:]
        )

    def lists(offsets: array[int], values: pa.Array, mask: pa.Array | None = None) -> pa.Array:
        if len(values) != offsets[-1]:  # Arrow would read past the end
            raise ValueError(f"{prefix} log-probabilities: {len(values)} values where {offsets[-1]} belong")
        return pa.ListArray.from_arrays(_int32(offsets), values, mask=mask)

    def listed(values: pa.Array) -> pa.Array:
        return lists(per_row, values, missing)

    def nested(values: pa.Array) -> pa.Array:
        return listed(lists(per_token, values))

    logprobs = _float32(_joined("f", (row.logprobs for row in given)))
    top_logprobs = _float32(_joined("f", (row.top_logprobs for row in given)))
    ranks = _int32(_joined("i", (row.ranks for row in given)))
    top_token_ids = _int32(_joined("i", (row.top_token_ids for row in given)))
    token_ids = _int32(_joined("i", (row.token_ids for row in given)))
    return {
        f"{prefix}_token_ids": listed(_null_where(token_ids, pc.less(token_ids, 0))),
        f"{prefix}_token_texts": listed(
            _array(list(chain.from_iterable(row.tokens for row in given)), _TEXT)
        ),
        f"{prefix}_logprobs": listed(_null_where(logprobs, pc.is_nan(logprobs))),
        f"{prefix}_ranks": listed(_null_where(ranks, pc.equal(ranks, 0))),
        f"{prefix}_top_token_ids": nested(_null_where(top_token_ids, pc.less(top_token_ids, 0))),
        f"{prefix}_top_tokens": nested(
            _array(list(chain.from_iterable(row.top_tokens for row in given)), _TEXT)
        ),
        f"{prefix}_top_logprobs": nested(_null_where(top_logprobs, pc.is_nan(top_logprobs))),
    }


def _offsets(lengths: Iterable[int]) -> array[int]:
    offsets = array("i", [0])
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets


def _joined(code: str, parts: Iterable[array[Any]]) -> array[Any]:
    whole = array(code)
    for part in parts:
        whole.extend(part)
    return whole


def _int32(values: array[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _float32(values: array[float]) -> pa.Array:
    return pa.Array.from_buffers(pa.float32(), len(values), [None, pa.py_buffer(values)])


def _null_where(values: pa.Array, bad: pa.Array) -> pa.Array:
    return pc.if_else(bad, pa.scalar(None, values.type), values) if pc.any(bad).as_py() else values
