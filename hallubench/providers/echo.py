"""A provider without a model: deterministic, made-up answers and log-probabilities.

It tries out a config, a pipeline or a notebook without keys or weights. An answer is 32 words drawn
from a hash of the question and its sampling parameters, cut at `max_tokens`. The entry's `engine`
block can hold what `EchoEngine` names.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hallubench.errors import ConfigError, LaneError
from hallubench.providers import Context
from hallubench.types import Completion, Logprobs, Request, Usage

ANSWER_LENGTH = 32
WORDS = [
    f" {onset}{rest}"
    for onset in "bdfgklmnprstvwyz"
    for rest in ["a", "e", "i", "o", "u", "an", "en", "in", "on", "un", "ar", "er", "or", "al", "el", "ol"]
]
MOST_ALTERNATIVES = 20


class EchoEngine(BaseModel):
    """The `engine` block of an entry of type echo; nothing in it changes an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    delay: Annotated[float, Field(ge=0)] = 0.0
    """Seconds before each answer."""
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of requests that fail; always the same ones."""
    die_after: int | None = None
    """Answers after which the whole lane fails, as if an engine had died."""


@asynccontextmanager
async def open_echo(context: Context) -> AsyncIterator[EchoProvider]:
    """Open the provider; nothing is loaded.

    Raises:
        ConfigError: the `engine` block holds an unknown key or a wrong value.
    """
    (block,) = {tuple(sorted(entry.engine.items())) for entry in context.entries}
    try:
        yield EchoProvider(EchoEngine.model_validate(dict(block)))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(
            f"engine.{'.'.join(map(str, problem['loc']))} of type echo: {problem['msg']}"
        ) from None


class EchoProvider:
    """Answers one request after another."""

    def __init__(self, engine: EchoEngine) -> None:
        self._engine = engine

    async def generate(self, requests: Iterable[Request]) -> AsyncGenerator[Completion, None]:
        for answered, request in enumerate(requests):
            if answered == self._engine.die_after:
                raise LaneError(f"echo died after {answered} answers, as engine.die_after asks")
            await asyncio.sleep(self._engine.delay)
            yield self._complete(request)

    def _complete(self, request: Request) -> Completion:
        seed = f"{request.request_id} {request.messages}".encode()
        words = hashlib.blake2b(seed, digest_size=ANSWER_LENGTH).digest()
        if int.from_bytes(words[:4], "big") < self._engine.error_rate * 2**32:
            return Completion(
                request_id=request.request_id,
                timestamp=datetime.now(UTC),
                elapsed_seconds=self._engine.delay,
                finish_reason="error",
                error="echo failed, as engine.error_rate asks",
                error_type="echo",
            )
        spoken = words[: request.params.max_tokens]
        asked = prompt_words(request)
        return Completion(
            request_id=request.request_id,
            timestamp=datetime.now(UTC),
            elapsed_seconds=self._engine.delay,
            text="".join(WORDS[word] for word in spoken).lstrip(),
            finish_reason="stop" if spoken == words else "length",
            usage=Usage(input_tokens=len(asked), output_tokens=len(spoken)),
            model_version="echo-1",
            logprobs=made_up(spoken, [WORDS[word] for word in spoken], request.params.logprobs),
            prompt_logprobs=made_up(
                bytes(len(word) % 256 for word in asked), asked, request.params.prompt_logprobs, bare=1
            ),
            logprobs_mode="raw_logprobs",
        )


def prompt_words(request: Request) -> list[str]:
    """The conversation cut before each run of white space, as a crude tokenizer would."""
    return re.findall(r"\s*\S+|\s+$", "".join(turn["content"] for turn in request.messages))


def made_up(ids: bytes, tokens: list[str], k: int | None, *, bare: int = 0) -> Logprobs | None:
    """Log-probabilities out of the token ids alone, k alternatives a position; none for the first `bare`."""
    if k is None:
        return None
    given = ids[bare:]
    return Logprobs(
        token_ids=array("i", list(ids)),
        tokens=tokens,
        logprobs=array("f", [math.nan] * bare + [_LOGPROBS[word][word % 3] for word in given]),
        ranks=array("i", [0] * bare + [word % 3 + 1 for word in given]),
        top_offsets=array("i", [0] * bare + [k * position for position in range(len(given) + 1)]),
        top_token_ids=array("i", [id_ for word in given for id_ in _ALTERNATIVES[word][:k]]),
        top_tokens=[WORDS[id_] for word in given for id_ in _ALTERNATIVES[word][:k]],
        top_logprobs=array("f", [logprob for word in given for logprob in _LOGPROBS[word][:k]]),
    )


def _ladder(word: int) -> list[float]:
    """Log-probabilities of the best alternatives at a word: a geometric series that sums to less than 1."""
    best = 0.3 + 0.6 * word / 256
    return [math.log(best) + rank * math.log(1 - best) for rank in range(MOST_ALTERNATIVES)]


_LOGPROBS = [_ladder(word) for word in range(256)]
# The word itself stands at place word % 3, as its rank says.
_ALTERNATIVES = [[(word + rank - word % 3) % 256 for rank in range(MOST_ALTERNATIVES)] for word in range(256)]
