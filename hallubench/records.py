"""What the records in `_runs/` say of the rows of a store, and whether these are there.

An answer goes from a store only when `generate --fresh` sets it aside, which the record of that run says.
So a run that has ended has as many answers as its record counts. Fewer errors are no fault: an error goes
when a later run asks its request again. A failed run may have failed to write its last answers, and the
record of a killed run counts nothing: of these nothing can be missed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from hallubench.findings import Finding, Remedy
from hallubench.provenance import Status
from hallubench.store import RUNS

Record: TypeAlias = Mapping[str, Any]
Records: TypeAlias = Mapping[str, Record | None]
"""By run id; None for a record that cannot be read."""

ASKED = frozenset(get_args(Status))
"""How a record's `status` says that its run asked what it stored; others are "imported" and `LOST`."""
LOST = "lost"
"""The status in a record that says no more than that the true one is gone."""
MISSING_ANSWERS = "missing_answers"
"""The key of a record under which a repair notes how many of its run's answers are gone."""
ATTEMPTS = ".attempts.jsonl"


def record_path(folder: Path, run_id: str) -> Path:
    """Where a run's record is."""
    return folder / RUNS / f"{run_id}.json"


def read_records(folder: Path) -> Records:
    """The records of a store's runs."""
    return {path.stem: _read(path) for path in sorted((folder / RUNS).glob("*.json"))}


def asked_runs(records: Records) -> frozenset[str]:
    """The runs whose rows have the ids that follow from what they asked."""
    return frozenset(run_id for run_id, record in records.items() if record and record["status"] in ASKED)


def running(records: Records) -> frozenset[str]:
    """The runs whose record has no end."""
    return frozenset(run_id for run_id, record in records.items() if record and record["status"] == "running")


def check_records(folder: Path, records: Records, rows: Mapping[str, int]) -> Iterator[Finding]:
    """Which records cannot be read, or are not there.

    Args:
        folder: of the store.
        records: as they are.
        rows: how many each run has in the store.
    """
    for run_id, record in records.items():
        if record is None:
            yield Finding(record_path(folder, run_id), "cannot be read", Remedy.NOTE_LOST_RECORD)
        elif record["status"] == LOST:
            yield Finding(record_path(folder, run_id), "was lost before an earlier repair", is_fault=False)
    for run_id in sorted(rows.keys() - records.keys()):
        what = f"is missing, and {rows[run_id]} rows are of this run"
        yield Finding(record_path(folder, run_id), what, Remedy.NOTE_LOST_RECORD)


def missing_answers(record: Record, answers: int, records: Records) -> int:
    """How many answers of a run are neither in the store nor known to have been moved out of it.

    Args:
        record: of the run, which has ended.
        answers: how many it has in the store.
        records: of all runs.
    """
    if any(_set_aside(record, other) for other in records.values() if other and other is not record):
        return 0
    counts = record.get("counts")
    answered = counts.get("answered") if isinstance(counts, dict) else 0
    known = record.get(MISSING_ANSWERS, 0)
    return answered - known - answers if isinstance(answered, int) and isinstance(known, int) else 0


def check_attempts(path: Path) -> Iterator[Finding]:
    """Whether all lines of a log of attempts can be read."""
    lines = broken = 0
    with path.open("rb") as file:
        for line in file:
            lines += 1
            broken += not is_attempt(line)
    if broken:
        yield Finding(path, f"{broken} of {lines} lines cannot be read", Remedy.SAVE_LINES)


def is_attempt(line: bytes) -> bool:
    """Whether a line of a log of attempts can be read, or is the last one, which a kill may cut."""
    try:
        return not line.endswith(b"\n") or isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read(path: Path) -> Record | None:
    try:
        record = json.loads(path.read_bytes())
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("status"), str) else None


def _set_aside(record: Record, other: Record) -> bool:
    """Whether another run, which began later, moved away what was there of a model that this one asked."""
    began_later = str(record.get("started_at")) <= str(other.get("started_at"))
    return bool(other.get("set_aside")) and began_later and not _models(record).isdisjoint(_models(other))


def _models(record: Record) -> frozenset[str]:
    try:
        return frozenset(entry["name"] for entry in record["config"]["models"])
    except (LookupError, TypeError):
        return frozenset()
