"""Prompts x models x samples -> the requests to send, with content-addressed ids, grouped into lanes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii as _json_text
from typing import Any

from hallubench.accepts import accepted, check_parameters
from hallubench.config import Config, ModelConfig
from hallubench.engine_arguments import check_engine_arguments
from hallubench.errors import ConfigError
from hallubench.prices import check_prices
from hallubench.prompts import PromptFile
from hallubench.providers import check_type
from hallubench.text import printable
from hallubench.types import Prompt, Request, SamplingParams

ANSWER_ARGUMENTS = frozenset(
    {
        "chat_template",
        "hf_overrides",
        "load_format",
        "logprobs_mode",
        "quantization",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
    }
)
"""The vLLM engine arguments that change answers. The others change speed and memory only: a run that
goes on with, say, less `gpu_memory_utilization` must not ask everything again."""

BUDGETS = (
    "requests_per_minute",
    "burst",
    "input_tokens_per_minute",
    "output_tokens_per_minute",
    "max_concurrency",
    "max_cost_usd",
)
"""What an account has, and not one of the models on it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Entries that one opened provider answers: those of an API account, or of a loaded engine."""

    name: str
    entries: tuple[ModelConfig, ...]


@dataclass(frozen=True, slots=True)
class Lane:
    """What has one budget: an API account, or the accelerators here. Its groups run one after another."""

    name: str
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """How much there is to do."""

    prompts: int
    requests: int
    pending: tuple[int, ...]
    """Requests of each entry of `config.models`, in its order, that have no answer yet."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a config asks for, answered already or not."""

    config: Config
    prompts: PromptFile
    """Can be iterated again and again, by several threads at once."""
    lanes: tuple[Lane, ...]

    def requests(self, group: Group, answered: Container[str] = frozenset()) -> Iterator[Request]:
        """The group's requests that are not among `answered`, each made when it is drawn."""
        return group_requests(self.config, group, self.prompts, answered)

    def survey(self, answered: Container[str] = frozenset()) -> Survey:
        """Go through all requests once and count; the prompts are checked on the way.

        Raises:
            PromptError: a prompt that cannot be asked.
            ConfigError: an entry's system prompt meets a prompt with a system message of its own.
        """
        series = [_Series(self.config, entry) for entry in self.config.models]
        pending = [0] * len(series)
        prompts = 0
        for prompt in self.prompts:
            prompts += 1
            own_system_message = prompt.messages is not None and prompt.messages[0].role == "system"
            for index, one in enumerate(series):
                if own_system_message and self.config.models[index].system_prompt:
                    both = f"models[{index}].system_prompt and prompt {printable(prompt.id)!r}"
                    raise ConfigError(f"{both} each bring a system message; remove one of the two")
                for id_ in one.ids(prompt):
                    pending[index] += id_ not in answered
        requests = prompts * sum(entry.n for entry in self.config.models)
        return Survey(prompts=prompts, requests=requests, pending=tuple(pending))


def make_plan(config: Config, prompts: PromptFile) -> Plan:
    """What a config asks of some prompts.

    Raises:
        ConfigError: as `make_lanes` says.
    """
    return Plan(config, prompts, make_lanes(config))


def group_requests(
    config: Config, group: Group, prompts: Iterable[Prompt], answered: Container[str] = frozenset()
) -> Iterator[Request]:
    """A group's requests that are not among `answered`, each made when it is drawn.

    Prompts are the outer loop: what is asked of one prompt lies close together.
    """
    series = [_Series(config, entry) for entry in group.entries]
    for prompt in prompts:
        for one in series:
            yield from one.requests(prompt, answered)


def make_lanes(config: Config) -> tuple[Lane, ...]:
    """Group a config's entries into lanes and refuse what could not be asked.

    Needs no weights, no network and no SDK.

    Raises:
        ConfigError: an unknown `type`, a parameter that a model does not take, a `max_cost_usd` without
            prices, two entries that would ask exactly the same, or entries of one account that give it
            different budgets.
    """
    seen: dict[bytes, int] = {}
    lanes: dict[object, dict[object, list[ModelConfig]]] = {}
    for index, entry in enumerate(config.models):
        try:
            check_type(entry.type)
        except ConfigError as error:
            raise ConfigError(f"models[{index}].type: {error}") from None
        check_engine_arguments(entry, f"models[{index}]")
        check_parameters(entry, f"models[{index}]")
        check_prices(config, entry, f"models[{index}]")
        one = _Series(config, entry)
        if (twin := seen.setdefault(one.identity, index)) != index:
            raise ConfigError(f"models[{twin}] and models[{index}] ask exactly the same; remove one of them")
        lane, group = _lane_key(entry), _group_key(entry)
        if lane in lanes and entry.type != "local":
            _check_account(config, next(iter(lanes[lane].values()))[0], entry, index)
        lanes.setdefault(lane, {}).setdefault(group, []).append(entry)
    names = _distinct([_type_of(groups) for groups in lanes.values()])
    return tuple(
        Lane(name, tuple(Group(_group_name(entries), tuple(entries)) for entries in groups.values()))
        for name, groups in zip(names, lanes.values(), strict=True)
    )


def settings_hash(
    provider: str, model: str, system_prompt: str | None, params: SamplingParams, options: Mapping[str, Any]
) -> hashlib.blake2b:
    """Begin the hash of a request with what all requests of one entry have in common, apart from the seed."""
    settings = [
        provider,
        model,
        system_prompt,
        params.temperature,
        params.top_p,
        params.top_k,
        params.max_tokens,
        params.stop,
        options,
    ]
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(hashlib.blake2b(text.encode(), digest_size=16).digest(), digest_size=10)


def request_id(settings: hashlib.blake2b, prompt: Prompt, sample_index: int, seed: int | None) -> str:
    """20 hex digits (80 bits) over everything that determines an answer.

    The prompt's id is part of it: two prompts with the same text are two rows. Among 100 million
    requests, the chance that any two share an id is below 1 in 200 million.
    """
    if prompt.text is not None:
        asked = _json_text(prompt.text)
    else:
        asked = json.dumps([(turn.role, turn.content) for turn in prompt.messages or ()])
    # The text of a JSON list, put together by hand: json.dumps would take three quarters of a plan's time.
    content = f"[{_json_text(prompt.id)}, {asked}, {sample_index}, {'null' if seed is None else seed}]"
    whole = settings.copy()
    whole.update(content.encode())
    return whole.hexdigest()


class _Series:
    """The requests of one entry."""

    def __init__(self, config: Config, entry: ModelConfig) -> None:
        self._entry = entry
        self._options = _answer_options(entry)
        self._seed = entry.seed
        if entry.seed is None and "seed" in accepted(entry):
            self._seed = config.seed
        self._params = SamplingParams(
            max_tokens=entry.max_tokens,
            temperature=entry.temperature,
            top_p=entry.top_p,
            top_k=entry.top_k,
            stop=entry.stop,
            logprobs=entry.logprobs,
            prompt_logprobs=entry.prompt_logprobs,
        )
        self._settings = settings_hash(
            entry.provider, entry.name, entry.system_prompt, self._params, self._options
        )
        self.identity = self._settings.digest() + str(self._seed).encode()

    def ids(self, prompt: Prompt) -> Iterator[str]:
        settings, seed = self._settings, self._seed
        for sample_index in range(self._entry.n):
            yield request_id(settings, prompt, sample_index, None if seed is None else seed + sample_index)

    def requests(self, prompt: Prompt, answered: Container[str]) -> Iterator[Request]:
        for sample_index in range(self._entry.n):
            seed = None if self._seed is None else self._seed + sample_index
            id_ = request_id(self._settings, prompt, sample_index, seed)
            if id_ not in answered:
                yield Request(
                    request_id=id_,
                    prompt=prompt,
                    sample_index=sample_index,
                    provider=self._entry.provider,
                    model=self._entry.name,
                    system_prompt=self._entry.system_prompt,
                    params=replace(self._params, seed=seed),
                    options=self._options,
                )


def _answer_options(entry: ModelConfig) -> dict[str, Any]:
    """What shapes an answer and has no column of its own in the store; only what differs from the default."""
    options = dict(entry.options)
    if entry.dtype != "auto":
        options["dtype"] = entry.dtype
    if entry.revision is not None:
        options["revision"] = entry.revision
    options |= {key: value for key, value in entry.engine.items() if key in ANSWER_ARGUMENTS}
    if entry.logprobs is not None:
        options["logprobs"] = entry.logprobs
    if entry.prompt_logprobs is not None:
        options["prompt_logprobs"] = entry.prompt_logprobs
    # As the store will have them: JSON's keys are texts, and sort otherwise than numbers do.
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain


def _lane_key(entry: ModelConfig) -> object:
    if entry.type == "local":
        return "local"
    return entry.type, entry.key, entry.base_url


def _check_account(config: Config, first: ModelConfig, entry: ModelConfig, index: int) -> None:
    differing: dict[str, tuple[Any, Any]] = {"sdk": (first.sdk, entry.sdk)}
    differing |= {key: (config.limit(first, key), config.limit(entry, key)) for key in BUDGETS}
    for key, (one, other) in differing.items():
        if one != other:
            twin = next(place for place, one in enumerate(config.models) if one is first)
            remedy = (
                "write the same on both" if key == "sdk" else "write it on the config, or the same on both"
            )
            raise ConfigError(
                f"models[{twin}] and models[{index}] share one account and give it a different {key} "
                f"({_shown(one)} and {_shown(other)}); {remedy}"
            )


def _shown(value: float | str | None) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float | int) else value


def _group_key(entry: ModelConfig) -> object:
    engine = json.dumps(dict(entry.engine), sort_keys=True, default=str)
    if entry.type != "local":
        return engine
    return entry.weights, entry.revision, entry.dtype, entry.device, entry.trust_remote_code, engine


def _group_name(entries: list[ModelConfig]) -> str:
    return ", ".join(dict.fromkeys(entry.name for entry in entries))


def _type_of(groups: Mapping[object, list[ModelConfig]]) -> str:
    return next(iter(groups.values()))[0].type


def _distinct(names: list[str]) -> list[str]:
    """claude, claude -> claude, claude-2: two accounts of one provider are two lanes."""
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        distinct.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return distinct
