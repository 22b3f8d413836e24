"""A legacy JSON file: what it says of its runs, and its results one by one, however many there are.

    {"metadata": {...}, "runs": [{"model_config": {...}, "results": [...], "completed_at": ...}, ...]}
    {"metadata": {...}, "results": [...]}         the flat layout
    [...]                                         results and no more

The keys may stand in any order, so a file is gone through once for all but its results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from hallubench.config import ENV_VARIABLE, SHORTEST_SECRET
from hallubench.errors import ResultError
from hallubench.json_stream import JsonError, JsonStream
from hallubench.legacy import to_utc
from hallubench.legacy_result import (
    SEED,
    TEMPERATURE,
    Asker,
    LegacyResult,
    Part,
    Prompts,
    first_problem,
    read_result,
    to_row,
)
from hallubench.schema import Row
from hallubench.text import printable


class _Exporter(Part):
    entries: list[dict[str, dict[str, Any]]] = Field(default_factory=list)

    @field_validator("entries")
    @classmethod
    def _each_is_whole(cls, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if any(entry.keys() != {"settings", "model_config"} for entry in entries):
            raise ValueError("should each have settings and a model_config")
        return entries


class Metadata(Part):
    exporter: _Exporter = _Exporter()
    start_time: str | None = None
    end_time: str | None = None
    timezone: str | None = None
    config: dict[str, Any] | None = None
    total_prompts: int | None = None
    prompts_file: str | None = None
    resumed: bool | None = None

    @field_validator("start_time", "end_time")
    @classmethod
    def _is_a_time(cls, text: str | None) -> str | None:
        if text is not None and to_utc(text) is None:
            raise ValueError("should be a time such as 2025-11-12T10:01:23.456789")
        return text


@dataclass(frozen=True, slots=True)
class LegacyFile:
    path: Path
    sha256: str
    metadata: Metadata
    entries: Sequence[Mapping[str, Any]]
    """The `model_config` of each of its runs, "{}" where there is none; none in a flat file."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.metadata.config or {}

    @property
    def models(self) -> list[dict[str, Any]]:
        models = self.config.get("models")
        return [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []

    @property
    def secrets(self) -> frozenset[str]:
        keys = {entry.get("api_key") for entry in (*self.models, *self.entries)}
        return frozenset(
            key
            for key in keys
            if isinstance(key, str) and len(key) >= SHORTEST_SECRET and not ENV_VARIABLE.search(key)
        )


class _Piece(NamedTuple):
    kind: Literal["metadata", "run", "model_config", "result"]
    run: int | None
    """Which of the `runs`; None in a flat file."""
    place: str
    """For messages."""
    value: Any


def _pieces(path: Path) -> Iterator[_Piece]:
    """What matters of a file, one thing after another, in the file's order."""
    shown = printable(path)
    keys: list[str] = []

    def elements(name: str) -> Iterator[int]:
        if stream.peek() != "[":
            raise ResultError(f"{shown}: {name} is not a list; write one such as {name}: [...]")
        return stream.elements()

    def results(run: int | None, name: str) -> Iterator[_Piece]:
        for index in elements(name):
            yield _Piece("result", run, f"{shown}: {name}[{index}]", stream.value())

    def one_run(run: int) -> Iterator[_Piece]:
        place = f"runs[{run}]"
        if stream.peek() != "{":
            raise ResultError(f"{shown}: {place} is not an object; write model_config and results in one")
        yield _Piece("run", run, f"{shown}: {place}", None)
        for key in stream.members():
            match key:
                case "results":
                    yield from results(run, f"{place}.results")
                case "model_config":
                    yield _Piece("model_config", run, f"{shown}: {place}.model_config", stream.value())
                case _:
                    stream.value()

    with _reading(path), path.open(encoding="utf-8-sig") as file:
        stream = JsonStream(file)
        if stream.peek() == "[":
            yield from results(None, "results")
            keys.append("results")
        for key in () if keys else stream.members():
            keys.append(key)
            match key:
                case "results":
                    yield from results(None, "results")
                case "runs":
                    for run in elements("runs"):
                        yield from one_run(run)
                case "metadata":
                    yield _Piece("metadata", None, f"{shown}: metadata", stream.value())
                case _:
                    stream.value()
        stream.end()
    if not {"runs", "results"} & set(keys):
        held = ", ".join(printable(key, 60) for key in keys[:8]) or "nothing"
        raise ResultError(f"{shown}: holds neither runs nor results, but {held}; give a file of results")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    shown = printable(path)
    try:
        yield
    except JsonError as error:
        raise ResultError(f"{shown}: {printable(error)}; correct it there, or get the whole file") from None
    except UnicodeDecodeError:
        raise ResultError(f"{shown}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise ResultError(f"{shown}: cannot be read: {error.strerror}; check the path") from None


def read_head(path: Path) -> LegacyFile:
    """Go through a file once, and leave its results out."""
    metadata = Metadata()
    entries: dict[int, Mapping[str, Any]] = {}
    for kind, run, place, value in _pieces(path):
        if kind == "metadata":
            try:
                metadata = Metadata.model_validate(value)
            except ValidationError as error:
                raise ResultError(f"{place}{first_problem(error)}") from None
        elif run is not None and kind != "result":
            if value is not None and not isinstance(value, dict):
                raise ResultError(f"{place}: is not an object; write the entry of the config that asked")
            entries[run] = value or {}
    with _reading(path), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return LegacyFile(path, sha256, metadata, list(entries.values()))


class Found(NamedTuple):
    """A result, on its way into the store."""

    row: Row
    result: LegacyResult
    entry: Mapping[str, Any]
    """The entry that asked; empty if the file does not say."""


def read_results(file: LegacyFile, asked: Prompts) -> Iterator[Found]:
    """Go through a file once more, result by result.

    Raises:
        ResultError: one is not as it should be.
    """
    seed = file.config.get("seed", SEED)
    common: dict[str, Any] = {
        "run_id": f"imported-{file.sha256[:12]}",
        "seed": seed if isinstance(seed, int) else None,
        "secrets": file.secrets,
    }
    for kind, run, place, value in _pieces(file.path):
        if kind == "result":
            result = read_result(value, place)
            entry = _entry_of(result, file) if run is None else file.entries[run]
            row = to_row(result, asked.of(result, place), Asker(entry=entry, **common), place)
            yield Found(row, result, entry)


def _entry_of(result: LegacyResult, file: LegacyFile) -> Mapping[str, Any]:
    """The entry that a result of a flat file is of; empty if there is more than one that it may be."""
    named = [entry for entry in file.models if entry.get("name") == result.model]
    if len(named) > 1 and result.sampling_params is not None:
        temperature = result.sampling_params.temperature
        named = [entry for entry in named if entry.get("temperature", TEMPERATURE) == temperature]
    return named[0] if len(named) == 1 else {}
