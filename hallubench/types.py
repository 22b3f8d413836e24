"""The values that travel: a `Prompt` becomes `Request`s, and each `Request` gets one `Completion`."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias

from msgspec import Struct

FinishReason: TypeAlias = Literal["stop", "length", "content_filter", "error", "other"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(Struct, frozen=True, kw_only=True):
    """One entry of a prompts file: either `text` (a plain prompt) or `messages` (a chat prompt).

    A Struct: planning makes a million of them, and a frozen dataclass takes ten times as long.
    """

    id: str
    index: int
    """Its place in the prompts file, from 0."""
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    category: str | None = None
    is_synthetic_probe: bool | None = None
    gold_label: Any = None
    """Any JSON value, kept as it came."""
    gold_refs: tuple[str, ...] | None = None
    original_id: str | None = None
    extra: Mapping[str, Any] = {}
    """Every other field of the entry, kept as it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn. None means: not sent, the provider's own default holds."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    """How many alternatives to record at each output token; None records no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to one model: what a provider is given."""

    request_id: str
    """Hash of everything that determines the answer; see `plan.request_id`."""
    prompt: Prompt
    sample_index: int
    provider: str
    model: str
    system_prompt: str | None
    params: SamplingParams
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model's entry that only its provider understands (thinking, safety settings)."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as role/content dicts, the system prompt first where there is one."""
        turns = self.prompt.messages or (Message("user", self.prompt.text or ""),)
        system = [Message("system", self.system_prompt)] if self.system_prompt else []
        return [{"role": turn.role, "content": turn.content} for turn in (*system, *turns)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts as the provider reports them; None where it reports none."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    """The part of `input_tokens` served from a cache."""
    reasoning_tokens: int | None = None
    """The part of `output_tokens` spent on reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities (natural logarithm) of T tokens, flat, as they go into Arrow.

    `token_ids`, `tokens`, `logprobs` and `ranks` have length T. The alternatives of all positions
    lie one after another, best first, in the `top_*` sequences; those of position t are the slice
    `top_offsets[t]:top_offsets[t + 1]` (`top_offsets` has length T + 1; an empty slice where the
    engine gives none, as for the first token of a prompt).
    """

    token_ids: array[int]
    """The chosen (or prompt) tokens; typecode "i". -1 where a provider names tokens only by text."""
    tokens: Sequence[str | None]
    """Their texts; None where unknown."""
    logprobs: array[float]
    """Typecode "f"; NaN where there is none (the first token of a prompt), stored as null."""
    ranks: array[int]
    """Rank of the chosen token in the vocabulary, 1 is best; 0 where unknown, stored as null."""
    top_offsets: array[int]
    top_token_ids: array[int]
    top_tokens: Sequence[str]
    top_logprobs: array[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came back for one request: an answer, or the error in its place; never both."""

    request_id: str
    timestamp: datetime
    """When it was whole (aware, UTC)."""
    elapsed_seconds: float
    """From sending the request to its answer, for the attempt that counted; queueing here excluded."""
    text: str | None = None
    """The answer, "" if the model said nothing; None if and only if `error` is set."""
    finish_reason: FinishReason | None = "stop"
    """None where nobody wrote it down: imported answers."""
    provider_finish_reason: str | None = None
    """The provider's own word for it."""
    reasoning: str | None = None
    usage: Usage = Usage()
    model_version: str | None = None
    """What answered: a hub commit, a hash of local weights, or the server's own name for it."""
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    logprobs_mode: str | None = None
    """"raw_logprobs" or "processed_logprobs" (after temperature and penalties)."""
    provider_request_id: str | None = None
    error: str | None = None
    error_type: str | None = None
    retry_count: int | None = 0
    """Attempts after the first; None where nobody wrote it down."""
