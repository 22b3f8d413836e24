"""A result of a legacy JSON file -> a row of the store.

The results of `run_pilot.py` and those of `export-json` are told apart by the `request_id`, which only
the latter bring. They also say all that they were asked with. Of the others it is known what the script did:

- Claude and Gemini were sent temperature and max_tokens. The seed in the file was not sent, and is null here.
- Local models were run by transformers, with `do_sample` where the temperature is not 0. Their
  log-probabilities are those after temperature, of the first 50 tokens; which tokens were chosen is unknown.
- A failed result has no `sampling_params`: it was asked as its `model_config` says.

Their `request_id` is computed from that. Of an API's answer it is the one that `generate` would ask with,
if the prompt's text is known, so that what is paid for is not asked again. An answer of transformers is
never taken for one of vLLM.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec.structs import replace
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hallubench.config import PROVIDER_OF_TYPE, Count, Finite, Int64
from hallubench.errors import ResultError
from hallubench.plan import request_id, settings_hash
from hallubench.prompts import PromptFile
from hallubench.redact import redact
from hallubench.schema import Row, valid_text
from hallubench.text import printable
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

LEGACY_PROVIDERS = PROVIDER_OF_TYPE | {"local": "transformers"}
UNKNOWN = "unknown"
"""The provider of a result whose file does not say the model's type."""
SEEDLESS = frozenset({"anthropic", "gemini"})
MAX_TOKENS = 2048
TEMPERATURE = 0.0
SEED = 42
"""What the script took where its config said nothing."""

Natural = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Tokens = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Name = Annotated[str, Field(min_length=1)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")]
Seconds = Annotated[float, Field(ge=0, lt=1e9, strict=True)]
Logprob = Annotated[float, Field(lt=math.inf, strict=True)]
"""Also minus infinity, which the script wrote of a probability that was rounded to 0."""


class Part(BaseModel):
    """Some values of a file, checked strictly; what else is there is ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class _Turn(Part):
    role: Literal["system", "user", "assistant"]
    content: str


class _TokensUsed(Part):
    input: Tokens | None = None
    output: Tokens | None = None


class _TokenLogprobs(Part):
    token_position: int
    top_tokens: list[str]
    top_logprobs: list[Logprob | None]


class _SamplingParams(Part):
    model_config = ConfigDict(extra="allow")

    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: Int64 | None = None
    seed: Int64 | None = None
    max_tokens: Count | None = None
    max_new_tokens: Count | None = None
    """What it is called of local models."""
    do_sample: bool | None = None


class LegacyResult(Part):
    """A result as it stands in a file; what else stands there is in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    prompt_id: Name
    model: Name
    model_version: str | None = None
    prompt: str | None = None
    messages: list[_Turn] | None = None
    prompt_index: Natural | None = None
    full_response: str | None = None
    tokens_used: _TokensUsed | None = None
    token_logprobs: list[_TokenLogprobs] | None = None
    sampling_params: _SamplingParams | None = None
    timestamp: str
    elapsed_seconds: Seconds
    run_id: FileName | None = None
    prompt_category: str | None = None
    is_synthetic_probe: bool | None = None
    retry_count: Natural | None = None
    error: Name | None = None
    error_type: str | None = None
    finish_reason: FinishReason | None = None
    logprobs_mode: str | None = None
    provider: Name | None = None
    system_prompt: str | None = None
    stop: list[str] | None = None
    options: dict[str, Any] | None = None
    sample_index: Natural = 0
    request_id: Annotated[str, Field(pattern=r"^[0-9a-f]{20}$")] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """What a file says of those who asked for its results."""

    run_id: str
    """Of results that bring none."""
    entry: Mapping[str, Any]
    """The `model_config`; empty if there is none."""
    seed: int | None = SEED
    """The config's."""
    secrets: frozenset[str] = frozenset()
    """API keys in the config: an error may repeat them."""


class Prompts:
    """The prompts that results answer: those of a prompts file, or what the results themselves say.

    Raises:
        PromptError: the file cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._prompts = {} if path is None else {prompt.id: prompt for prompt in PromptFile(path)}
        self._places: dict[str, int] = {}

    def of(self, result: LegacyResult, place: str) -> Prompt:
        """The prompt of a result.

        Raises:
            ResultError: it is not in the prompts file, or has another text there.
        """
        messages = tuple(Message(turn.role, turn.content) for turn in result.messages or ()) or None
        said = Prompt(
            id=result.prompt_id,
            # In the order of the file, where nothing better is known.
            index=self._places.setdefault(result.prompt_id, len(self._places)),
            text=None if messages else result.prompt or None,
            messages=messages,
            category=result.prompt_category,
            is_synthetic_probe=result.is_synthetic_probe,
        )
        if result.prompt_index is not None:
            said = replace(said, index=result.prompt_index)
        if self._path is None:
            return said
        found = self._prompts.get(result.prompt_id)
        file, shown = printable(self._path), printable(repr(result.prompt_id))
        if found is None:
            raise ResultError(f"{place}.prompt_id: {shown} is not in {file}; give the file that was asked")
        if result.prompt and result.prompt != _last_text(found):
            raise ResultError(
                f"{place}.prompt: {shown} has another text in {file}; give the file that was asked"
            )
        for name in ("category", "is_synthetic_probe"):
            if (value := getattr(said, name)) is not None:
                found = replace(found, **{name: value})
        return found


def read_result(value: Any, place: str) -> LegacyResult:
    """Check a result.

    Args:
        value: as it stands in the file.
        place: there, as "results.json: runs[2].results[17]".

    Raises:
        ResultError: it is no result; names the field.
    """
    if isinstance(value, dict):  # half a surrogate pair is replaced, as in all answers
        value = {
            valid_text(key): valid_text(item) if isinstance(item, str) else item
            for key, item in value.items()
        }
    try:
        result = LegacyResult.model_validate(value)
    except ValidationError as error:
        raise ResultError(f"{place}{first_problem(error)}") from None
    if result.error is None and result.full_response is None:
        raise ResultError(
            f'{place}.full_response: is missing; write the answer, "" if the model said nothing'
        )
    if result.error is not None and result.full_response:
        raise ResultError(f"{place}: has an error and a full_response; remove one of them")
    for index, position in enumerate(result.token_logprobs or ()):
        where = f"{place}.token_logprobs[{index}]"
        if position.token_position != index:
            raise ResultError(f"{where}.token_position: is {position.token_position}; write {index}")
        if len(position.top_tokens) != len(position.top_logprobs):
            raise ResultError(f"{where}: has not as many top_logprobs as top_tokens; write one for each")
    return result


def to_row(result: LegacyResult, prompt: Prompt, asker: Asker, place: str) -> Row:
    """The row that a result becomes.

    Raises:
        ResultError: it cannot be stored; names the field.
    """
    request = _request(result, prompt, asker, place)
    logprobs_mode = result.logprobs_mode
    if result.request_id is None and result.token_logprobs:
        logprobs_mode = "processed_logprobs"
    used = result.tokens_used or _TokensUsed()
    completion = Completion(
        request_id=request.request_id,
        timestamp=_timestamp(result.timestamp, place),
        elapsed_seconds=result.elapsed_seconds,
        text=result.full_response if result.error is None else None,
        finish_reason=result.finish_reason or (None if result.error is None else "error"),
        usage=Usage(input_tokens=used.input, output_tokens=used.output),
        # Of a failed result the model's own name stands in for the version of what did not answer.
        model_version=None if result.error and result.model_version == result.model else result.model_version,
        logprobs=_logprobs(result.token_logprobs) if result.token_logprobs else None,
        logprobs_mode=logprobs_mode,
        error=None if result.error is None else redact(result.error, asker.secrets),
        error_type=result.error_type,
        retry_count=result.retry_count,
    )
    return Row(result.run_id or asker.run_id, request, completion, None)


def _request(result: LegacyResult, prompt: Prompt, asker: Asker, place: str) -> Request:
    sent = result.sampling_params or _SamplingParams()
    temperature, seed = sent.temperature, sent.seed
    type_ = asker.entry.get("type")
    if result.request_id is None:
        provider = result.provider or LEGACY_PROVIDERS.get(str(type_), str(type_ or UNKNOWN))
        if result.sampling_params is None and asker.entry:
            temperature, seed = _temperature(asker.entry), asker.seed
        if provider in SEEDLESS:
            seed = None
    else:
        provider = result.provider or PROVIDER_OF_TYPE.get(str(type_), str(type_ or UNKNOWN))
    params = SamplingParams(
        max_tokens=sent.max_tokens or sent.max_new_tokens or MAX_TOKENS,
        temperature=temperature,
        top_p=sent.top_p,
        top_k=sent.top_k,
        stop=tuple(result.stop or ()),
        seed=seed,
    )
    options = (result.options or {}) | (sent.model_extra or {})
    if sent.do_sample is not None and sent.do_sample != bool(temperature):
        options["do_sample"] = sent.do_sample
    try:
        json.dumps(options, allow_nan=False)
    except ValueError:
        raise ResultError(f"{place}.sampling_params: holds a number that is not finite; write null") from None
    settings = settings_hash(provider, result.model, result.system_prompt, params, options)
    return Request(
        request_id=result.request_id or request_id(settings, prompt, result.sample_index, seed),
        prompt=prompt,
        sample_index=result.sample_index,
        provider=provider,
        model=result.model,
        system_prompt=result.system_prompt,
        params=params,
        options=options,
    )


def _temperature(entry: Mapping[str, Any]) -> float | None:
    value = entry.get("temperature", TEMPERATURE)
    return float(value) if isinstance(value, int | float) else None


def _logprobs(positions: Sequence[_TokenLogprobs]) -> Logprobs:
    """Of the chosen tokens nothing is known, of the alternatives no ids."""
    offsets = array("i", [0])
    for position in positions:
        offsets.append(offsets[-1] + len(position.top_tokens))
    numbers = (math.nan if value is None else value for at in positions for value in at.top_logprobs)
    return Logprobs(
        token_ids=array("i", [-1]) * len(positions),
        tokens=[None] * len(positions),
        logprobs=array("f", [math.nan]) * len(positions),
        ranks=array("i", [0]) * len(positions),
        top_offsets=offsets,
        top_token_ids=array("i", [-1]) * offsets[-1],
        top_tokens=[token for position in positions for token in position.top_tokens],
        top_logprobs=array("f", numbers),
    )


def _timestamp(text: str, place: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        shown = printable(text, 60)
        raise ResultError(
            f"{place}.timestamp: {shown} is no time; write one such as 2025-11-12T10:01:23.456789"
        ) from None


def _last_text(prompt: Prompt) -> str | None:
    """What stands as `prompt` in the flat layout."""
    turns = [turn.content for turn in prompt.messages or () if turn.role == "user"]
    return turns[-1] if turns else prompt.text


def first_problem(error: ValidationError) -> str:
    """What is wrong first, behind the place of what was checked: `.elapsed_seconds: should be ...`."""
    problem = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{where}: is missing; add it"
    _, _, message = problem["msg"].partition("should ")
    shown = printable(json.dumps(problem["input"], default=str), 60)
    return printable(f"{where}: should {message}, is {shown}; correct it")
