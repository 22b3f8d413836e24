"""Legacy JSON files -> the store: those of `run_pilot.py` and those of `export-json`, in any layout.

A file is gone through three times: for what it says of its runs, to check each result, and to import them.
Nothing is imported before all files were found good. Memory grows with the number of results, by some 200
bytes each, not with their length.

What is read is written down in `_runs/<run_id>.json`, unless the store has that record of its own:

{"run_id": "a1b2c3d4", "status": "imported", "started_at": ..., "ended_at": ..., "resumed": false,
 "config": {...}, "prompts": {"path": ..., "count": ...}, "counts": {"answered": 388, "failed": 5},
 "entries": [{"settings": {...}, "model_config": {...}}, ...],
 "imported": [{"file": ..., "sha256": ..., "at": ..., "by": "hallubench 0.1.0", "prompts": ...}]}

The times, the config and the prompts are those of the file, for all runs in it; `entries` says which
`model_config` asked with which settings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from hallubench.errors import ResultError, StoreError
from hallubench.legacy import find_entry, public, to_utc
from hallubench.legacy_file import LegacyFile, read_head, read_results
from hallubench.legacy_result import SEEDLESS, Prompts
from hallubench.prompts import PromptFile
from hallubench.provenance import new_run_id, write_record
from hallubench.redact import redact
from hallubench.store import Store, scan
from hallubench.text import printable
from hallubench.types import Request

FLUSH_ALTERNATIVES = 100_000
"""Alternative tokens that wait in memory: some 20 MB. Answers come faster here than from a model."""
IDENTITY: Mapping[str, pl.DataType] = {
    "model": pl.String(),
    "prompt_id": pl.String(),
    "sample_index": pl.Int32(),
    "temperature": pl.Float64(),
    "max_tokens": pl.Int64(),
    "seed": pl.Int64(),
    "timestamp": pl.Datetime("us", "UTC"),
    "elapsed_seconds": pl.Float64(),
}
"""Columns of the store. Two rows that agree in all of them are one result."""
FOUND: Mapping[str, pl.DataType] = {
    **IDENTITY,
    "request_id": pl.String(),
    "run_id": pl.String(),
    "answered": pl.Boolean(),
    "computed": pl.Boolean(),
}
"""What is kept of each result while its file is checked; `computed` says that the request_id is."""


@dataclass(frozen=True, slots=True)
class Import:
    """What became of the results of some files."""

    files: int
    results: int
    new: int
    """Those that the store did not have; with those that it had only failures or older answers for."""
    failed: int
    """The part of `new` that has an error in place of an answer."""
    known: int
    """Those that are in the store already, or came twice."""
    older: int
    """Those whose request has an answer, or a newer one, in the store or in a file."""
    without_zone: int
    """Those whose time has no zone, and is taken as UTC, where no exporter says that it is."""
    without_prompt: int
    """Those of an API whose prompt is unknown, so that `generate` will not know them again."""
    left_out: Mapping[str, int]
    """Fields that the store has no column for, and how many results had them."""


def import_json(paths: Sequence[Path], output: Path, *, prompts: Path | None = None, now: datetime) -> Import:
    """Put the results of legacy JSON files into a store, each once.

    Args:
        paths: the files.
        output: folder of the store; made if it does not exist.
        prompts: the prompts that were asked: for what the results do not say of theirs.
        now: names the parts that are written.

    Raises:
        ResultError: a file is not JSON, holds no results, or one that is not as it should be.
        PromptError: the prompts file cannot be read.
        StoreError: the folder cannot be used.
        DiskError: the disk is full or broken; importing again goes on.
    """
    asked = Prompts(prompts)
    source = {"at": now.isoformat(), "prompts": None if prompts is None else PromptFile(prompts).facts()}
    files = [read_head(path) for path in dict.fromkeys(paths)]
    checks = [_check(file, asked) for file in files]
    with Store(output, new_run_id(now)) as store:
        outcome = _choose(pl.concat([check.identities for check in checks]), output)
        ends = accumulate(check.identities.height for check in checks)
        outcomes = [
            outcome[end - check.identities.height : end] for end, check in zip(ends, checks, strict=True)
        ]
        for file, check, of_file in zip(files, checks, outcomes, strict=True):
            _write_records(store.runs_dir, file, check, of_file, source)
        waiting = 0
        for file, of_file in zip(files, outcomes, strict=True):
            for row, _, _ in compress(read_results(file, asked), of_file["new"]):
                store.append(row)
                waiting += len(row.completion.logprobs.top_tokens) if row.completion.logprobs else 0
                if store.is_due() or waiting >= FLUSH_ALTERNATIVES:
                    store.flush()
                    waiting = 0
        store.flush()
        _write_counts(store, outcome["run_id"])
    return Import(
        files=len(files),
        results=outcome.height,
        new=outcome.filter("new").height,
        failed=outcome.filter("new", ~pl.col("answered")).height,
        known=outcome.filter("known").height,
        older=outcome.filter(~pl.col("new"), ~pl.col("known")).height,
        without_zone=sum(check.without_zone for check in checks),
        without_prompt=sum(check.without_prompt for check in checks),
        left_out=sum((check.left_out for check in checks), Counter[str]()),
    )


def import_lines(result: Import, output: Path) -> Iterator[str]:
    """What `hallubench import-json` prints."""
    shown = printable(output, longest=1000)
    yield (
        f"{_counted(result.files, 'file')}, {_counted(result.results, 'result')}: {result.new} new "
        f"({result.failed} of them failed), {result.known} already there. Store: {shown}"
    )
    if result.older:
        yield f"Left out: {_counted(result.older, 'result')} whose request has an answer or a newer one."
    for name, count in result.left_out.items():
        yield f"Left out of {_counted(count, 'result')}: {printable(name, 60)}, which has no column."
    if result.without_zone:
        yield f"Times without a zone, in {_counted(result.without_zone, 'result')}, are taken as UTC."
    if result.without_prompt:
        yield (
            f"The prompts of {_counted(result.without_prompt, 'API result')} are unknown, so `hallubench "
            "generate` would ask them again. If it should not: import into a new folder, with --prompts FILE."
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


class _Check(NamedTuple):
    """What a file holds."""

    identities: pl.DataFrame
    """A row for each result: `IDENTITY`, request_id, run_id, answered, and whether the id was computed."""
    entries: Sequence[Mapping[str, Any]]
    """{"settings": ..., "model_config": ...} for each of the different settings, in the file's order."""
    without_zone: int
    without_prompt: int
    left_out: Counter[str]


def _check(file: LegacyFile, asked: Prompts) -> _Check:
    columns: dict[str, list[Any]] = {name: [] for name in FOUND}
    entries = {_key(entry["settings"]): public(entry) for entry in file.metadata.exporter.entries}
    without_zone = without_prompt = 0
    left_out: Counter[str] = Counter()
    for row, result, entry in read_results(file, asked):
        request, completion = row.request, row.completion
        computed = result.request_id is None
        values = (
            request.model,
            request.prompt.id,
            request.sample_index,
            request.params.temperature,
            request.params.max_tokens,
            request.params.seed,
            completion.timestamp,
            completion.elapsed_seconds,
            request.request_id,
            row.run_id,
            completion.error is None,
            computed,
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        if (key := _key(settings := _settings(request))) not in entries:
            certain = entry if entry and (computed or file.entries) else None
            known = certain or find_entry(settings, [{"config": public(dict(file.config))}])[1]
            entries[key] = {"settings": settings, "model_config": public(dict(known))}
        without_zone += file.metadata.timezone != "UTC" and _has_no_zone(result.timestamp)
        unasked = request.prompt.text is None and request.prompt.messages is None
        without_prompt += computed and unasked and request.provider in SEEDLESS
        left_out.update(list(result.model_extra or ()))
    if not columns["request_id"]:
        raise ResultError(f"{printable(file.path)}: holds no results; give a file of results")
    found = pl.DataFrame(columns, schema=FOUND)
    return _Check(found, list(entries.values()), without_zone, without_prompt, left_out)


def _settings(request: Request) -> dict[str, Any]:
    """What the exporter tells entries apart by, as the store will have it."""
    params = request.params
    return {
        "provider": request.provider,
        "model": request.model,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_tokens": params.max_tokens,
        "system_prompt": request.system_prompt,
        "stop": list(params.stop) or None,
        "options": json.dumps(request.options) if request.options else None,
        "seed": None if params.seed is None else params.seed - request.sample_index,
    }


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _has_no_zone(text: str) -> bool:
    return datetime.fromisoformat(text).tzinfo is None


def _choose(found: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """Say of each result whether it is `new` to the store, or `known`.

    Of all results of a request one counts: an answer before an error, then the newest, then the first.

    Raises:
        ResultError: a result is there under two ids.
    """
    stored = (
        scan(folder)
        .join(found.lazy().select("prompt_id").unique(), on="prompt_id", how="semi")
        .select(*IDENTITY, "request_id", answered=pl.col("error").is_null(), computed=pl.lit(False))
        .collect(engine="streaming")
    )
    every = pl.concat([stored, found.select(stored.columns)]).with_row_index("order")
    asked_otherwise = (
        every.group_by(*IDENTITY)
        .agg(pl.col("request_id").n_unique(), pl.col("computed").any())
        .filter("computed", pl.col("request_id") > 1)
    )
    if not asked_otherwise.is_empty():
        first = asked_otherwise.sort("model", "prompt_id").row(0, named=True)
        model, prompt_id = printable(first["model"]), printable(repr(first["prompt_id"]))
        raise ResultError(
            f"{printable(folder)}: an answer of {model} to {prompt_id} comes twice, once without its "
            "prompt's text or its config; import all files with the same --prompts into a new folder"
        )
    best = every.sort("answered", "timestamp", "order", descending=[True, True, False]).unique(
        "request_id", keep="first", maintain_order=True
    )
    outcome = found.with_row_index("order", offset=stored.height).join(
        best.select("request_id", best_order="order", best_timestamp="timestamp", best_answered="answered"),
        on="request_id",
        how="left",
        maintain_order="left",
    )
    same = pl.col("timestamp").eq(pl.col("best_timestamp")) & pl.col("answered").eq(pl.col("best_answered"))
    new = pl.col("order") == pl.col("best_order")
    return outcome.select("run_id", "answered", new=new, known=~new & same)


def _write_records(
    runs_dir: Path, file: LegacyFile, check: _Check, outcome: pl.DataFrame, source: dict[str, Any]
) -> None:
    """Write down where the results of a file come from, for each run that it has results of."""
    metadata = file.metadata
    entries = [_without_secrets(entry, file) for entry in check.entries]
    config = _without_secrets(file.config, file)
    config.setdefault("models", [entry["model_config"] for entry in entries])
    imported = {"file": str(file.path), "sha256": file.sha256, "by": f"hallubench {version('hallubench')}"}
    for run_id, brings_new in (
        outcome.group_by("run_id", maintain_order=True).agg(pl.col("new").any()).iter_rows()
    ):
        record = _read_record(runs_dir, run_id) or {
            "run_id": run_id,
            "status": "imported",
            "started_at": _utc(metadata.start_time),
            "ended_at": _utc(metadata.end_time),
            "resumed": bool(metadata.resumed),
            "config": config,
            "prompts": {"path": metadata.prompts_file, "count": metadata.total_prompts},
            "counts": {},
            "entries": [],
            "imported": [],
        }
        if record.get("status") == "imported":
            added = [entry for entry in entries if entry not in record["entries"]]
            if added or brings_new:
                record["entries"] += added
                record["imported"].append(imported | source)
                write_record(runs_dir / f"{run_id}.json", record)


def _write_counts(store: Store, run_ids: pl.Series) -> None:
    """Write into the records of imported runs how many rows are theirs."""
    counted = (
        scan(store.folder)
        .filter(pl.col("run_id").is_in(run_ids.unique().implode()))
        .group_by("run_id")
        .agg(answered=pl.col("error").is_null().sum(), failed=pl.col("error").is_not_null().sum())
        .collect(engine="streaming")
    )
    for row in counted.iter_rows(named=True):
        run_id = row.pop("run_id")
        record = _read_record(store.runs_dir, run_id) or {}
        if record.get("status") == "imported" and record["counts"] != row:
            write_record(store.runs_dir / f"{run_id}.json", record | {"counts": row})


def _read_record(runs_dir: Path, run_id: str) -> dict[str, Any] | None:
    """The record that the store has of a run, if it has one."""
    path = runs_dir / f"{run_id}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{printable(path)}: cannot be read ({printable(error, 80)}); move it out of the folder"
        ) from None
    return record


def _without_secrets(value: Mapping[str, Any], file: LegacyFile) -> dict[str, Any]:
    """`value` as a record may hold it."""
    plain: dict[str, Any] = json.loads(redact(json.dumps(public(dict(value))), file.secrets))
    return plain


def _utc(text: str | None) -> str | None:
    moment = to_utc(text)
    return None if moment is None else moment.astimezone(UTC).isoformat()
