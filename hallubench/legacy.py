"""The store -> the JSON files that `run_pilot.py` wrote, for the tools that read them.

    layout       file                         holds
    runs         pilot_results_<time>.json    metadata, runs: [{model_config, results, completed_at}, ...]
    per-model    pilot_<model>_<time>.json    the same, of one model
    flat         pilot_results_<time>.json    metadata, results: what the annotation tools read

A run is what one entry of the config asked. Runs are in config order, their results in prompt order:

    {"prompt_id": "prompt_0001", "model": "Qwen/Qwen3-0.6B", "model_version": "c1899de289a0",
     "full_response": "Yes, ...", "tokens_used": {"input": 42, "output": 156, "total": 198},
     "token_logprobs": [{"token_position": 0, "top_tokens": ["Yes", ...], "top_logprobs": [-0.12, ...]}, ...],
     "sampling_params": {"temperature": 0.7, "seed": 42, "max_tokens": 2048},
     "timestamp": "2025-11-12T10:01:23.456789", "elapsed_seconds": 2.34, "run_id": "20251112-100057-a1b2c3",
     "prompt_category": "cve_existence", "is_synthetic_probe": false, "retry_count": 0,
     "finish_reason": "stop", "logprobs_mode": "raw_logprobs", "provider": "vllm", "options": {"logprobs": 5},
     "prompt_index": 0, "sample_index": 0, "request_id": "5c0f..."}

The last two lines are new: facts that the legacy format had no place for, enough to import the results
again as they were (`import_legacy.py`). All times are UTC.

The annotation tools read every pilot_*.json of a folder and know a result by (prompt_id, model). So an
export takes the place of earlier exports of the same store in its folder, and where a model was asked at
several temperatures or for several samples, the flat layout has a folder for each of them
(temperature-0.7, temperature-0.7-sample-1), to be annotated one at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, TypeAlias

import polars as pl
from pydantic import ValidationError

from hallubench.config import PROVIDER_OF_TYPE, Config, ModelConfig
from hallubench.errors import StoreError
from hallubench.export_folder import PROGRAM, alone_in, earlier_exports, replace_exports
from hallubench.plan import ANSWER_ARGUMENTS
from hallubench.result_text import COLUMNS, result_text
from hallubench.store import RUNS, iter_in_order, scan
from hallubench.text import printable

Layout: TypeAlias = Literal["runs", "per-model", "flat"]

SETTINGS: Mapping[str, pl.Expr] = {
    **{
        name: pl.col(name)
        for name in (
            "provider",
            "model",
            "temperature",
            "top_p",
            "top_k",
            "max_tokens",
            "system_prompt",
            "stop",
            "options",
        )
    },
    "seed": pl.col("seed") - pl.col("sample_index"),  # sample i is drawn with seed + i
}
"""What tells the entries of a config apart."""

SECRET_KEY = re.compile(
    r"(^|[_-])(api_?key|token|secret|password|authorization|credentials?)$", re.IGNORECASE
)
POSITIONS_AT_ONCE = 5_000
"""Token positions turned into text at a time: some 2 MB of it."""
LONGEST_NAME = 150
"""Of a model in a file's name, in bytes."""


def export_json(
    folder: Path,
    *,
    output: Path | None = None,
    layout: Layout = "runs",
    logprob_tokens: int | None = 50,
    now: datetime,
) -> list[Path]:
    """Write a store as legacy JSON files; memory does not grow with the store.

    Args:
        folder: of the store.
        output: where the files go; `folder`/export/`layout` by default. Earlier exports of this store
            there, of whatever layout, are replaced once the new files are whole.
        layout: "runs", "per-model" or "flat"; see the top of this module.
        logprob_tokens: of how many tokens of an answer log-probabilities are written; None: of all.
        now: names the files.

    Returns:
        The files written.

    Raises:
        StoreError: the folder holds no answers, or `output` cannot be used.
        DiskError: the files cannot be written; earlier exports are still there.
    """
    records = _read_records(folder)
    try:
        runs = _find_runs(folder, records)
        metadata = _metadata(folder, records, runs)
    except FileNotFoundError:  # of more parts than `scan` can hold open
        raise StoreError(f"{printable(folder)}: a run merged its parts; read again") from None
    if not runs:
        raise StoreError(f"{printable(folder)}: holds no answers yet; run `hallubench generate` first")
    exporter = {
        "program": PROGRAM,
        "layout": layout,
        "logprob_tokens": "all" if logprob_tokens is None else logprob_tokens,
        "run_ids": _run_ids(runs),
        "entries": [{"settings": run.settings, "model_config": run.model_config} for run in runs],
    }
    head = {"exporter": exporter} | metadata
    target = folder / "export" / layout if output is None else output
    with alone_in(target):
        earlier = earlier_exports(target, {*_run_ids(runs), *(record["run_id"] for record in records)})
        files = _name_files(target, _contents(layout, runs), now, earlier)
        documents = {
            path: _document(folder, layout, logprob_tokens, head, shares) for path, shares in files.items()
        }
        replace_exports(target, earlier, documents)
    return list(files)


@dataclass(frozen=True, slots=True)
class _Run:
    """What one entry of a config asked, as far as the store has it."""

    settings: Mapping[str, Any]
    model_config: Mapping[str, Any]
    place: tuple[int, int]
    """Where its entry stands: in which record, newest first, and where in that config."""
    samples: Sequence[int]
    run_ids: Sequence[str]
    started_at: datetime | None
    completed_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Share:
    """What a file holds of a run."""

    run: _Run
    sample: int | None = None
    """Only this sample; None: all."""


def _read_records(folder: Path) -> list[dict[str, Any]]:
    """What the runs wrote about themselves, newest first. A broken record is left out: the rows suffice."""
    records = []
    for path in (folder / RUNS).glob("*.json"):
        try:
            record = public(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("config"), dict):
            records.append(record | {"run_id": path.stem})
    # Names sort by their start, but for those of imported runs.
    return sorted(records, key=lambda record: (_started(record), record["run_id"]), reverse=True)


def _started(record: Mapping[str, Any]) -> datetime:
    return to_utc(record.get("started_at")) or datetime.min.replace(tzinfo=UTC)


def public(value: Any) -> Any:
    """`value` as strict JSON and UTF-8 can hold it, without what is kept under the name of a secret."""
    match value:
        case dict():
            return {public(key): public(item) for key, item in value.items() if not SECRET_KEY.search(key)}
        case list():
            return [public(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case str():
            return value.encode(errors="replace").decode()
    return value


def _find_runs(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[_Run]:
    """The runs of a store, in config order."""
    elapsed = pl.duration(microseconds=(pl.col("elapsed_seconds").fill_null(0) * 1e6).cast(pl.Int64))
    # In two steps: the values of a group are held until it is whole, and a group may have all rows.
    found = (
        scan(folder)
        .group_by(*(column.alias(name) for name, column in SETTINGS.items()), "sample_index", "run_id")
        .agg(started_at=(pl.col("timestamp") - elapsed).min(), completed_at=pl.col("timestamp").max())
        .collect(engine="streaming")
        .group_by(*SETTINGS)
        .agg(
            samples=pl.col("sample_index").unique().sort(),
            run_ids=pl.col("run_id").unique().sort(),
            started_at=pl.col("started_at").min(),
            completed_at=pl.col("completed_at").max(),
        )
        .sort("model", "temperature", "completed_at")
    )
    runs = []
    for row in found.iter_rows(named=True):
        settings = {name: row.pop(name) for name in SETTINGS}
        place, entry = find_entry(settings, records)
        runs.append(_Run(settings=settings, model_config=entry, place=place, **row))
    return sorted(runs, key=lambda run: run.place)


def find_entry(
    settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[tuple[int, int], Mapping[str, Any]]:
    """The entry that asked with these settings, as the newest record with it has it, and its place."""
    for number, record in enumerate(records):
        for index, imported in enumerate(_listed(record.get("entries"))):
            if isinstance(imported, dict) and imported.get("settings") == settings:
                return (number, index), imported["model_config"]
        for index, entry in enumerate(_listed(record["config"].get("models"))):
            if isinstance(entry, dict) and _asks_with(entry, record["config"], settings):
                return (number, index), entry
    return (len(records), 0), _made_entry(settings)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _made_entry(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry that asks with these settings."""
    types = {provider: type_ for type_, provider in PROVIDER_OF_TYPE.items()}
    sent = {name: settings[name] for name in SETTINGS if name in ModelConfig.model_fields}
    sent["options"], sent["engine"] = {}, {}
    for name, value in json.loads(settings["options"] or "{}").items():
        own_key = name in ("dtype", "revision", "logprobs", "prompt_logprobs")
        block = sent if own_key else sent["engine"] if name in ANSWER_ARGUMENTS else sent["options"]
        block[name] = value
    entry = {"name": settings["model"], "type": types.get(settings["provider"], settings["provider"])}
    return entry | {name: value for name, value in sent.items() if value not in (None, {})}


def _asks_with(entry: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    try:
        model = ModelConfig.model_validate({k: v for k, v in entry.items() if k in ModelConfig.model_fields})
    except ValidationError:
        return False
    asked = model.model_dump() | {"provider": model.provider, "model": model.name}
    asked |= {"stop": list(model.stop) or None, "options": settings["options"]}
    if settings["seed"] is None:
        asked["seed"] = None  # the provider takes none
    elif model.seed is None:
        asked["seed"] = config.get("seed", Config.model_fields["seed"].default)
    options = json.loads(settings["options"] or "{}")
    given = asked | dict(model.engine) | dict(model.options)
    return all(asked[name] == value for name, value in settings.items()) and all(
        given.get(name) == value for name, value in options.items()
    )


def _metadata(folder: Path, records: Sequence[Mapping[str, Any]], runs: Sequence[_Run]) -> dict[str, Any]:
    config: Mapping[str, Any] = {"models": [run.model_config for run in runs]}
    prompts: Any = None
    if records:
        config, prompts = records[0]["config"], records[0].get("prompts")
    if not isinstance(prompts, dict) or not isinstance(prompts.get("count"), int):
        ids = scan(folder).select(pl.col("prompt_id").n_unique())
        prompts = {"path": None, "count": ids.collect(engine="streaming").item()}
    starts = [run.started_at for run in runs] + [to_utc(record.get("started_at")) for record in records]
    ends = [run.completed_at for run in runs] + [to_utc(record.get("ended_at")) for record in records]
    return {
        "start_time": _legacy_time(min(filter(None, starts), default=None)),
        "end_time": _legacy_time(max(filter(None, ends), default=None)),
        "timezone": "UTC",
        "config": config,
        "total_prompts": prompts["count"],
        "prompts_file": config.get("prompts_file", prompts.get("path")),
        "resumed": _is_resumed(set(_run_ids(runs)), records),
    }


def _is_resumed(run_ids: Set[str], records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether more than one run answered. The legacy script had a run id for each model: its files say it."""
    imported = [record for record in records if "imported" in record and record["run_id"] in run_ids]
    own = len(run_ids) - len(imported)
    return any(record.get("resumed") is True for record in imported) or own + bool(imported) > 1


def _run_ids(runs: Sequence[_Run]) -> list[str]:
    return sorted({run_id for run in runs for run_id in run.run_ids})


def to_utc(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _legacy_time(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")


def _contents(layout: Layout, runs: Sequence[_Run]) -> dict[tuple[str, str], list[_Share]]:
    """What goes into each file, by its subfolder and by what it is named for."""
    match layout:
        case "runs":
            return {("", "results"): [_Share(run) for run in runs]}
        case "per-model":
            models = dict.fromkeys(run.settings["model"] for run in runs)
            return {
                ("", model): [_Share(run) for run in runs if run.settings["model"] == model]
                for model in models
            }
        case "flat":
            draws = [_Share(run, sample) for run in runs for sample in run.samples]
            if len(draws) == len({run.settings["model"] for run in runs}):
                return {("", "results"): draws}
            return _one_draw_per_model(draws, sampled=any(draw.sample for draw in draws))


def _one_draw_per_model(draws: Sequence[_Share], *, sampled: bool) -> dict[tuple[str, str], list[_Share]]:
    """Put draws into folders named for what tells them apart, so that none has a model twice."""
    folders: dict[tuple[str, str], list[_Share]] = {}
    for draw in draws:
        temperature = draw.run.settings["temperature"]
        name = f"temperature-{'default' if temperature is None else temperature}"
        name += f"-sample-{draw.sample}" if sampled else ""
        for number in count(1):
            draws_there = folders.setdefault((name if number == 1 else f"{name}-{number}", "results"), [])
            if all(other.run.settings["model"] != draw.run.settings["model"] for other in draws_there):
                draws_there.append(draw)
                break
    return folders


def _name_files(
    target: Path, contents: Mapping[tuple[str, str], list[_Share]], now: datetime, earlier: Sequence[Path]
) -> dict[Path, list[_Share]]:
    """A path for each file; a name that another model's file has, or somebody else's, gets a number."""
    files: dict[Path, list[_Share]] = {}
    taken: set[str] = set()  # without case, which some file systems ignore
    for (subfolder, model), shares in contents.items():
        for number in count(1):
            name = _file_name(model) if number == 1 else f"{_file_name(model)}-{number}"
            path = target / subfolder / f"pilot_{name}_{now:%Y%m%d_%H%M%S}.json"
            if str(path).casefold() not in taken and (path in earlier or not path.exists()):
                break
        taken.add(str(path).casefold())
        files[path] = shares
    return files


def _file_name(model: str) -> str:
    name = "".join(c if c.isprintable() and c not in '/:.\\<>"|?*' else "_" for c in model)
    return name.encode()[:LONGEST_NAME].decode(errors="ignore")


def _document(
    folder: Path,
    layout: Layout,
    logprob_tokens: int | None,
    metadata: Mapping[str, Any],
    shares: Iterable[_Share],
) -> Iterator[bytes]:
    """A file, piece by piece."""
    yield b'{\n  "metadata": ' + _json(metadata, 2)
    if layout == "flat":
        results = (_results(folder, share, logprob_tokens, with_prompt=True, indent=4) for share in shares)
        yield b',\n  "results": ['
        yield from _items(chain.from_iterable(results), 4)
    else:
        yield b',\n  "runs": ['
        for number, share in enumerate(shares):
            results_of_run = _results(folder, share, logprob_tokens, with_prompt=False, indent=8)
            yield b",\n    {" if number else b"\n    {"
            yield b'\n      "model_config": ' + _json(share.run.model_config, 6)
            yield b',\n      "results": ['
            yield from _items(results_of_run, 8)
            yield b'\n      ],\n      "completed_at": ' + _json(_legacy_time(share.run.completed_at), 6)
            yield b"\n    }"
    yield b"\n  ]\n}\n"


def _results(
    folder: Path, share: _Share, logprob_tokens: int | None, *, with_prompt: bool, indent: int
) -> Iterator[bytes]:
    asked = {name: column.eq_missing(share.run.settings[name]) for name, column in SETTINGS.items()}
    stop = pl.col("stop").eq_missing(pl.lit(share.run.settings["stop"], pl.List(pl.String)))
    del asked["stop"]  # a list: compared when the rows are here
    if share.sample is not None:
        asked["sample"] = pl.col("sample_index") == share.sample
    for table in iter_in_order(folder, where=pl.all_horizontal(*asked.values()), columns=COLUMNS):
        rows = pl.DataFrame(table).filter(stop)
        positions = rows.select(pl.col("output_top_tokens").list.len().sum()).item()
        for piece in rows.iter_slices(max(1, rows.height * POSITIONS_AT_ONCE // max(1, positions))):
            yield result_text(piece, logprob_tokens=logprob_tokens, with_prompt=with_prompt, indent=indent)


def _items(pieces: Iterable[bytes], indent: int) -> Iterator[bytes]:
    margin = b"\n" + b" " * indent
    for number, piece in enumerate(pieces):
        yield b"," + margin if number else margin
        yield piece


def _json(value: Any, indent: int) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + " " * indent).encode()
