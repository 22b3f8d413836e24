"""A config file (JSON, YAML or TOML) -> a frozen `Config`. The legacy keys are all still keys.

{"prompts_file": "prompts.json", "output_dir": "results/pilot", "seed": 42,
 "models": [{"name": "Qwen/Qwen3-0.6B", "type": "local", "temperature": 0.7, "n": 5}]}
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from hallubench.errors import ConfigError
from hallubench.redact import redact
from hallubench.text import printable

PROVIDER_OF_TYPE = {"claude": "anthropic", "gemini": "gemini", "local": "vllm"}
"""What the store calls the provider of a `type`; a type that is not listed keeps its own name."""

KEY_VARIABLES = {
    "claude": "ANTHROPIC_API_KEY",
    "gemini": "GOOGLE_API_KEY",
    "openai": "OPENAI_API_KEY",
}
"""Where an entry without `api_key` finds one."""

BASE_URLS = {
    "claude": "https://api.anthropic.com",
    "gemini": "https://generativelanguage.googleapis.com",
    "openai": "https://api.openai.com/v1",
}
"""Where an entry without `base_url` is asked. The SDKs' own variables for that are not looked at: the run's
record would not say who answered."""

ENV_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

SECRET_NAME = re.compile(r"(?i)(^|_|-)(api[_-]?key|token|secret|password|authorization)$")
"""Keys that `engine` and `options` must not hold, as vLLM's `hf_token`: both are recorded."""
SHORTEST_SECRET = 8
"""A key that is shorter is made up ("EMPTY"), and may stand anywhere as a word."""

Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
MOST_VALUES = 1_000_000
"""In a config: ten lines of YAML can stand for more than there is memory for."""
USABLE_KEY = re.compile(r"[!-~]+")
"""What an HTTP header can carry, and no key has more than that."""

Parameter: TypeAlias = Literal["temperature", "top_p", "top_k", "seed", "logprobs", "prompt_logprobs"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())


class _Limits(_Section):
    """What bounds an API account; on the config, or on an entry of `models`, which goes first."""

    requests_per_minute: Annotated[Finite, Field(gt=0)] | None = None
    """API: rate of the account, retries included; null for none."""
    burst: Count | None = None
    """API: requests that may go out at once after a pause."""
    input_tokens_per_minute: Annotated[Finite, Field(gt=0)] | None = None
    """API: tokens of prompts a minute."""
    output_tokens_per_minute: Annotated[Finite, Field(gt=0)] | None = None
    """API: tokens of answers a minute."""
    max_concurrency: Count | None = None
    """API: most requests in flight; not set: `async_settings.max_concurrency`, or what the server takes."""
    timeout: Annotated[Finite, Field(gt=0)] | None = None
    """API: seconds after which one attempt is given up."""
    max_cost_usd: Annotated[Finite, Field(gt=0)] | None = None
    """What one run may cost by `prices`; on an entry: what all on its account may."""

    @field_validator("burst", "timeout", mode="before")
    @classmethod
    def _there_always_is_one(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("cannot be null; write a number, or leave the key out")
        return value


class Price(_Section):
    """USD per million tokens."""

    input: Annotated[Finite, Field(ge=0)]
    """Tokens of prompts."""
    output: Annotated[Finite, Field(ge=0)]
    """Tokens of answers, reasoning included."""
    cached: Annotated[Finite, Field(ge=0)] | None = None
    """Tokens of prompts that the provider had in a cache; not set: as `input`."""


class AsyncSettings(_Section):
    """Legacy block of the API lanes."""

    max_concurrency: Count | None = None
    """Most requests in flight on one API account."""
    batch_size: Count | None = None
    """Accepted and without effect: requests are sent as soon as the budget allows, not in batches."""


class ModelConfig(_Limits):
    """One entry of `models`: a model asked with one set of sampling parameters."""

    name: Annotated[str, Field(min_length=1)]
    """The model's name: what the API is asked for, and `model` in the store."""
    type: Annotated[str, Field(min_length=1)]
    """"local" (vLLM), "echo" (no model: deterministic made-up answers), or an installed provider's name."""
    notes: str | None = None
    """Free text, kept in the run's record."""

    temperature: Annotated[Finite, Field(ge=0)] | None = None
    """0 is greedy. Not set: the provider's default (1.0 for local models)."""
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    """Nucleus sampling: the probability mass to draw from."""
    top_k: Count | None = None
    """Draw from the k most probable tokens only."""
    max_tokens: Count = 2048
    """Longest answer, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end the answer (not included in it)."""
    n: Annotated[Count, Field(le=1_000_000)] = 1
    """Answers a prompt; sample i is drawn with seed + i."""
    seed: Int64 | None = None
    """Seed of this entry; not set: the config's `seed`."""
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    """Sent before every prompt."""
    logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    """Alternatives recorded at each output token; local models: 5 where not set. Write null for none."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    """The same for the tokens of the prompt."""

    model_path: Annotated[str, Field(min_length=1)] | None = None
    """Local: folder with weights, or Hugging Face repository; not set: `name`."""
    device: Literal["cuda", "cpu"] | None = None
    """Local: where it must run; not set: a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Local: precision of the weights; "auto" is the model's own."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Local: commit, branch or tag of the Hugging Face repository."""
    trust_remote_code: bool = False
    """Local: run code that comes with the model. Only for repositories that you trust."""
    engine: Mapping[str, Any] = Field(default_factory=dict)
    """Local: further vLLM engine arguments, by vLLM's own names."""

    api_key: SecretStr | None = None
    """API: a literal or ${VARIABLE}; not set: ANTHROPIC_API_KEY, GOOGLE_API_KEY or OPENAI_API_KEY."""
    base_url: Annotated[str, Field(pattern="^https?://")] | None = None
    """API: another server that speaks the same protocol."""
    accepts: Mapping[Parameter, Annotated[bool, Field(strict=True)]] = Field(default_factory=dict)
    """What the model takes and what not, where `accepts.py` does not know it: {temperature: false}."""
    sdk: Literal["google-generativeai", "google-genai"] | None = None
    """Gemini: the package that asks; google-generativeai where not set."""

    options: Mapping[str, Any] = Field(default_factory=dict)
    """Settings that only this type of provider understands."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_local_models(cls, entry: Any) -> Any:
        if isinstance(entry, dict) and entry.get("type") == "local":
            return {"temperature": 1.0, "logprobs": 5, "prompt_logprobs": 5} | entry
        return entry

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_text_may_stand_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("engine")
    @classmethod
    def _engine_has_no_argument_with_a_key_of_its_own(cls, engine: Mapping[str, Any]) -> Mapping[str, Any]:
        own = {"model": "model_path", "max_logprobs": "logprobs"} | {
            name: name for name in ("dtype", "revision", "seed", "trust_remote_code", "device")
        }
        for argument in own.keys() & engine.keys():
            raise ValueError(f"write {own[argument]!r} on the model's entry instead of engine.{argument}")
        return engine

    @field_validator("engine", "options")
    @classmethod
    def _what_is_recorded_holds_no_secret(cls, block: Mapping[str, Any]) -> Mapping[str, Any]:
        if (name := next(_secret_names(block), None)) is not None:
            remedy = "export HF_TOKEN=..." if name == "hf_token" else "write a provider's key as `api_key`"
            raise ValueError(f"holds a secret, {printable(name)}, and is recorded; remove it there: {remedy}")
        return block

    @field_validator("base_url")
    @classmethod
    def _a_url_holds_no_secret(cls, url: str | None) -> str | None:
        if url is not None and re.search(r"[@?#]", url):
            raise ValueError("holds a user name, a query or a fragment; write the key as `api_key`")
        return None if url is None else url.rstrip("/")

    @property
    def provider(self) -> str:
        """What the store's `provider` column says."""
        return PROVIDER_OF_TYPE.get(self.type, self.type)

    @property
    def key(self) -> str | None:
        """API: the key in the entry, else the one in the environment."""
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        return os.environ.get(KEY_VARIABLES.get(self.type, "")) or None

    @property
    def secrets(self) -> frozenset[str]:
        """The key, if it is one that nothing written or shown may hold."""
        key = self.key or ""
        return (
            frozenset({key}) if len(key) >= SHORTEST_SECRET and not ENV_VARIABLE.search(key) else frozenset()
        )

    @property
    def weights(self) -> str:
        """Local: the folder or repository to load."""
        weights = self.model_path or self.name
        return str(Path(weights).expanduser()) if weights.startswith("~") else weights


class Config(_Limits):
    """What one experiment asks, of which models, and how."""

    description: str | None = None
    """Free text, kept in the run's record."""
    prompts_file: Annotated[str, Field(min_length=1)] | None = None
    """The prompts: JSON, JSONL, CSV or Parquet. Looked for here, then beside the config."""
    output_dir: Annotated[str, Field(min_length=1)] | None = None
    """The folder of the store."""
    num_prompts: Count | None = None
    """Ask only the first N prompts."""
    seed: Int64 | None = 42
    """Seed of every entry that has none of its own."""
    max_retries: Annotated[int, Field(ge=0, le=100, strict=True)] = 3
    """API: further tries after a failed one."""
    requests_per_minute: Annotated[Finite, Field(gt=0)] | None = 60.0
    burst: Count | None = 10
    timeout: Annotated[Finite, Field(gt=0)] | None = 600.0
    api_delay: Annotated[Finite, Field(ge=0)] | None = None
    """Accepted and without effect: `requests_per_minute` sets the pace."""
    async_settings: AsyncSettings = AsyncSettings()
    prices: Mapping[str, Price] = Field(default_factory=dict)
    """What models cost, by name or by a pattern such as "claude-opus-*"; see `prices.py`."""
    models: tuple[ModelConfig, ...]
    """The entries; the same name may stand several times with different settings."""

    @field_validator("models", mode="after")
    @classmethod
    def _asks_at_least_one_model(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        if not models:
            raise ValueError("is empty; add an entry with a name and a type")
        return models

    def limit(self, entry: ModelConfig, key: str) -> Any:
        """What holds for an entry: its own limit if it sets one, null included, else the config's."""
        if key in entry.model_fields_set:
            return getattr(entry, key)
        if key == "max_concurrency" and self.max_concurrency is None:
            return self.async_settings.max_concurrency
        return getattr(self, key)

    @model_validator(mode="after")
    def _keys_stand_in_api_key_alone(self) -> Self:
        recorded = self.to_json()
        sections = [(f"models[{place}]: ", entry) for place, entry in enumerate(recorded.pop("models"))]
        for where, section in (*sections, ("", recorded)) if self.secrets else ():
            if any(redact(text, self.secrets) != text for text in _strings(section)):
                raise ValueError(f"{where}the key stands outside `api_key`, where it is recorded; remove it")
        return self

    @property
    def secrets(self) -> frozenset[str]:
        """The keys of all entries: what nothing written or shown may hold."""
        return frozenset().union(*(entry.secrets for entry in self.models))

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values, only what was set, without the keys."""
        plain = self.model_dump(mode="json", exclude_unset=True, exclude={"models"})
        entries = [
            entry.model_dump(mode="json", exclude_unset=True, exclude={"api_key"}) for entry in self.models
        ]
        return plain | {"models": entries}


def load_config(
    path: str | Path,
    *,
    models: str | None = None,
    missing_env: Literal["error", "keep"] = "error",
    **overrides: Any,
) -> Config:
    """Read a config file.

    Args:
        path: a .json, .yaml, .yml or .toml file.
        models: a glob such as "Qwen/*"; only entries whose name matches are kept.
        missing_env: what a `${VARIABLE}` that is not set becomes: an error, or itself.
        overrides: values that stand in for the file's top-level keys; None leaves the file's.

    Raises:
        ConfigError: the file cannot be read or is not a valid config; one line that names the key.
    """
    path = Path(path)
    raw = _parse(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: the config must be a mapping with the key `models`")
    if isinstance(named := raw.get("prompts_file"), str) and not Path(named).exists():
        beside = path.parent / named
        raw["prompts_file"] = str(beside) if beside.exists() else named
    raw |= {key: value for key, value in overrides.items() if value is not None}
    if models is not None and isinstance(raw.get("models"), list):
        raw["models"] = _matching(path, raw["models"], models)
    try:
        return Config.model_validate(_expand(path, raw, missing_env))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a config") from None


def missing_variables(config: Config) -> list[str]:
    """Names of `${VARIABLES}` that were kept unexpanded, each once."""
    values = [entry.api_key.get_secret_value() for entry in config.models if entry.api_key]
    values += _strings(config.model_dump(exclude={"models"}))
    values += [text for entry in config.models for text in _strings(entry.model_dump(exclude={"api_key"}))]
    return list(dict.fromkeys(name for value in values for name in ENV_VARIABLE.findall(value)))


def _parse(path: Path) -> Any:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        match path.suffix.lower():
            case ".json":
                return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
            case ".yaml" | ".yml":
                document = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader underneath
                if _size(document, {}) > MOST_VALUES:
                    raise ValueError("its aliases stand for too much, or for themselves; write less")
                return document
            case ".toml":
                return tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}, line {line}: {printable(error.problem or 'not valid YAML')}") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError) as error:
        long = "set_int_max_str_digits" in str(error)  # advice for programmers
        problem = "a number has too many digits; write a smaller one" if long else printable(error)
        raise ConfigError(f"{path}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a config") from None
    raise ConfigError(f"{path}: a config is a .json, .yaml, .yml or .toml file")


def _size(value: Any, sizes: dict[int, float]) -> float:
    """How many values are in one, an alias counted as what it stands for; infinite for one in itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf
        children = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[id(value)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one mapping; remove one")
    return mapping


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice in one mapping; remove one",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _matching(path: Path, entries: list[Any], pattern: str) -> list[Any]:
    def name(entry: Any) -> str:
        return str(entry.get("name", "")) if isinstance(entry, dict) else ""

    kept = [entry for entry in entries if fnmatchcase(name(entry), pattern)]
    if not kept:
        names = ", ".join(dict.fromkeys(printable(name(entry)) for entry in entries))
        raise ConfigError(f"{path}: no model matches {pattern!r}; there are: {names}")
    return kept


def _expand(path: Path, value: Any, missing_env: str, key: str = "") -> Any:
    """`${NAME}` in any text becomes the environment variable's value."""
    match value:
        case str():

            def variable(found: re.Match[str]) -> str:
                if (text := os.environ.get(found[1])) is not None:
                    return text
                if missing_env == "keep":
                    return found[0]
                raise ConfigError(
                    f"{path}: {printable(key)}: the variable {found[1]} is not set; "
                    f"run: export {found[1]}=..."
                )

            return ENV_VARIABLE.sub(variable, value)
        case dict():
            return {
                k: _expand(path, v, missing_env, f"{key}.{k}" if key else str(k)) for k, v in value.items()
            }
        case list():
            return [_expand(path, v, missing_env, f"{key}[{i}]") for i, v in enumerate(value)]
        case float() if not math.isfinite(value):
            raise ConfigError(f"{path}: {printable(key)}: {value} is not a usable number")
    return value


def _secret_names(value: Any) -> Iterator[str]:
    """Keys at any depth that call their text a secret."""
    match value:
        case Mapping():
            for key, item in value.items():
                if isinstance(item, str) and SECRET_NAME.search(key):
                    yield key
                yield from _secret_names(item)
        case list() | tuple():
            for item in value:
                yield from _secret_names(item)


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for item in value.values():
                yield from _strings(item)
        case list() | tuple():
            for item in value:
                yield from _strings(item)


def _first_problem(error: ValidationError) -> str:
    """One line for the first thing that is wrong: `models[2].temprature: unknown key; did you mean ...?`."""
    problems = error.errors(include_url=False, include_input=False)
    problem = min(problems, key=lambda one: one["type"] == "missing")  # a misspelt key is missing, too
    parts = list(problem["loc"])
    where = _location(parts)
    if problem["type"] == "extra_forbidden":
        name = str(parts[-1])
        sections: dict[Any, type[_Section]] = {"models": ModelConfig, "prices": Price}
        section = Config if len(parts) == 1 else sections.get(parts[0], AsyncSettings)
        near = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.0)
        return f"{where}: unknown key; did you mean `{near[0]}`?"
    if problem["type"] == "missing":
        return f"{where}: this key is missing; add it"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return printable(f"{where}: {message[0].lower()}{message[1:]}" if where else message)


def _location(parts: list[int | str]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return printable(text)
