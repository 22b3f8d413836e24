"""Whether a store is whole, what is wrong with it, and what a repair would do.

A store is whole if each part is sound (see `soundness.py`), each run whose rows are there left a record,
and each run that has ended has its answers there (see `records.py`). What a run leaves for the moment while
it goes on is no fault, and what a killed one left is none either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from hallubench.errors import StoreError
from hallubench.findings import Finding, Remedy, Report
from hallubench.lock import is_locked
from hallubench.parts import (
    MODEL_FOLDERS,
    PART_NAME,
    TEMPORARY_SUFFIX,
    Source,
    check_part,
    held_parts,
    live_parts,
    model_folders,
    part_paths,
)
from hallubench.provenance import TEMPORARY_SUFFIX as RECORD_SUFFIX
from hallubench.records import (
    ASKED,
    ATTEMPTS,
    Records,
    asked_runs,
    check_attempts,
    check_records,
    missing_answers,
    read_records,
    record_path,
    running,
)
from hallubench.soundness import inspect_part
from hallubench.store import LOCK, RUNS, check_is_folder, no_store, only_what_counts
from hallubench.text import printable

WRITTEN_FOR_OTHERS = ("export", "annotation")
"""Where `export-json` and `export-annotations` write unless told otherwise."""


def verify(folder: Path, *, alone: bool = False) -> Report:
    """Read a whole store, in flat memory, and say what is wrong with it.

    Args:
        folder: of the store.
        alone: whether the caller holds the store's lock, so that no run goes on.

    Raises:
        StoreError: there is no store in the folder, or one of another version, or it may not be read.
    """
    check_is_store(folder)
    try:
        return _Verification(folder, alone).report()
    except PermissionError as error:
        shown = printable(error.filename or folder)
        raise StoreError(f"{shown}: cannot be read: {error.strerror}; make it readable") from None


def check_is_store(folder: Path) -> None:
    """Refuse a folder without a store, however damaged.

    Raises:
        StoreError: it does not exist, is a file, or has neither records of runs nor a part that opens.
    """
    check_is_folder(folder)
    if (folder / RUNS).is_dir():
        return
    for model_dir in model_folders(folder):
        for path in part_paths(model_dir):
            with suppress(StoreError, FileNotFoundError):
                check_part(path)
                return
    raise no_store(folder)


@dataclass(slots=True)
class _Model:
    """What a model's folder holds."""

    findings: list[Finding] = field(default_factory=list)
    parts: int = 0
    rows: int = 0
    """In sound parts."""
    runs: list[tuple[str, int, int]] = field(default_factory=list)
    """The answers and the errors of each run, as far as they count."""
    replaced: set[Path] = field(default_factory=set)
    """Parts that were merged into others and are still there."""


class _Verification:
    """One reading of a store."""

    def __init__(self, folder: Path, alone: bool) -> None:
        self._folder = folder
        self._alone = alone
        self._report = Report()
        self._rows: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self._leftovers: dict[Path, str] = {}
        """What a run leaves for the moment, or when it is killed."""

    def report(self) -> Report:
        before = read_records(self._folder)
        for model_dir in model_folders(self._folder):
            self._check_model(model_dir)
        rows_are_sound = not self._report.faults
        paths = sorted((self._folder / RUNS).glob("*"))
        records = read_records(self._folder)
        self._check_runs(before, records, rows_are_sound=rows_are_sound)
        self._check_files_of_runs(paths, records)
        self._look_for_strangers()
        self._report_leftovers()
        return self._report

    def _check_model(self, model_dir: Path) -> None:
        while True:
            try:
                model = self._read_model(model_dir)
                break
            except FileNotFoundError:  # merged, or set aside, since it was found
                if not model_dir.is_dir():
                    return
        report = self._report
        report.findings += model.findings
        report.parts += model.parts
        report.outdated += model.rows
        for run_id, answers, errors in model.runs:
            report.answers += answers
            report.errors += errors
            report.outdated -= answers + errors
            self._answers[run_id] += answers
            self._rows[run_id] += answers + errors
        self._leftovers |= dict.fromkeys(
            sorted(model.replaced), "was merged into another part, which a killed run left"
        )

    def _read_model(self, model_dir: Path) -> _Model:
        model = _Model()
        sound: list[Source] = []
        with held_parts(model_dir, damaged_too=True) as parts:
            asked = asked_runs(read_records(self._folder))
            for part in parts:
                path = part if isinstance(part, Path) else Path(part.name)
                rows, findings = inspect_part(part, path, asked)
                model.findings += findings
                if not any(finding.is_fault for finding in findings):
                    sound.append(part)
                    model.rows += rows
                if not isinstance(part, Path):
                    part.seek(0)  # polars reads an open file from where it stands
            model.parts = len(parts)
            if sound:
                has_error = pl.col("error").is_not_null()
                runs = (
                    only_what_counts(sound)
                    .group_by("run_id")
                    .agg(answers=has_error.not_().sum(), errors=has_error.sum())
                )
                model.runs = runs.collect(engine="streaming").rows()
        if len(sound) == len(parts):  # a damaged part gives its place back to those that it replaced
            with suppress(FileNotFoundError):
                model.replaced = {*part_paths(model_dir)} - {*live_parts(model_dir, damaged_too=True)}
        return model

    def _check_runs(self, before: Records, records: Records, *, rows_are_sound: bool) -> None:
        """Compare the records with the rows.

        Args:
            before: as they were before the rows were read: those of a run that had ended are all on disk.
            records: as they are.
            rows_are_sound: whether all rows could be counted.
        """
        self._report.findings += check_records(self._folder, records, self._rows)
        for run_id, record in before.items():
            if not rows_are_sound or record is None or record["status"] not in ASKED - {"running"}:
                continue
            missing = missing_answers(record, self._answers[run_id], records)
            path = record_path(self._folder, run_id)
            what = f"counts {missing} more answers than are here"
            if missing > 0 and record["status"] == "failed":
                self._note(path, f"{what}; they may not have been written")
            elif missing > 0 and self._is_written():
                self._note(path, f"{what}; the run that goes on may just have set them aside")
            elif missing > 0:
                self._report.missing_answers[run_id] = missing
                self._report.findings.append(Finding(path, what, Remedy.NOTE_MISSING_ANSWERS))
            elif not self._rows[run_id]:
                self._note(path, "no row that counts is of this run")
        self._look_for_killed_runs(records)

    def _look_for_killed_runs(self, records: Records) -> None:
        if not (without_end := running(records)):
            return
        is_written = self._is_written()
        now = running(read_records(self._folder))  # one of them may have ended before that was asked
        going_on = {max(now)} if now and is_written else set()
        for run_id in sorted((without_end & now) - going_on):
            self._note(record_path(self._folder, run_id), "has no end: the run was killed")

    def _check_files_of_runs(self, paths: Iterable[Path], records: Records) -> None:
        """Look at what lies beside the records."""
        known = {*records, *self._rows}
        for path in paths:
            if path.name.endswith(f".json{RECORD_SUFFIX}"):
                self._leftovers[path] = "is half a record, which a killed run left"
            elif path.name.endswith(ATTEMPTS):
                self._report.findings += check_attempts(path)
            elif path != self._folder / LOCK and not any(
                path.name.startswith(f"{run_id}.") for run_id in known
            ):
                self._note(path, "is not of a run of this store")

    def _look_for_strangers(self) -> None:
        """Look for files that no run writes."""
        for path in sorted(self._folder.rglob("*.parquet")):
            in_place = path.parent.parent == self._folder and path.parent.match(MODEL_FOLDERS)
            if not in_place or not PART_NAME.fullmatch(path.name):
                what = "is not of the store, and whoever reads **/*.parquet would read it"
                self._report.findings.append(Finding(path, what, Remedy.MOVE))
        for path in sorted(self._folder.iterdir()):
            known = path.name in (RUNS, *WRITTEN_FOR_OTHERS) or path.match(MODEL_FOLDERS)
            if not known and path.suffix != ".parquet":
                self._note(path, "is not of the store")
        for path in sorted(self._folder.glob(f"{MODEL_FOLDERS}/*")):
            if path.name.endswith(f".parquet{TEMPORARY_SUFFIX}"):
                self._leftovers[path] = "is half a part, which a killed run left"
            elif path.suffix != ".parquet":
                self._note(path, "is not of the store")

    def _report_leftovers(self) -> None:
        """Say what a killed run left; while one goes on, nobody can tell."""
        if self._leftovers and not self._is_written():
            for path, what in self._leftovers.items():
                if path.exists():  # or the run that had it has ended since
                    self._note(path, what, Remedy.MOVE)

    def _is_written(self) -> bool:
        return not self._alone and is_locked(self._folder, LOCK)

    def _note(self, path: Path, what: str, remedy: Remedy | None = None) -> None:
        self._report.findings.append(Finding(path, what, remedy, is_fault=False))
