"""Make a damaged store whole again. Nothing is destroyed: what is changed or removed is kept beside it.

    OUTPUT.damaged-<time>/model=.../part-...parquet                  as it was
    OUTPUT.damaged-<time>/model=.../contradicting-part-...parquet    its rows that contradict themselves

Requests whose rows are lost, or contradict themselves, have no answer any more: `generate` asks them again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import polars as pl
import pyarrow as pa

from hallubench.errors import StoreError
from hallubench.findings import Finding, Remedy, Report
from hallubench.lock import lock_folder
from hallubench.parts import ORDER, model_folders, part_number, part_paths, write_part
from hallubench.provenance import write_record
from hallubench.records import LOST, MISSING_ANSWERS, asked_runs, is_attempt, read_records, record_path
from hallubench.soundness import goes_on, judge, model_folders_of, open_part, read_row_groups
from hallubench.store import LOCK
from hallubench.text import printable
from hallubench.verify import check_is_store, verify


def repair(folder: Path, now: datetime) -> tuple[list[Finding], Report, Path | None]:
    """Verify a store, and do what each finding says that a repair would do, until it is whole.

    Args:
        folder: of the store.
        now: names the folder where originals are kept.

    Returns:
        All that was found, the store as it is now, and where originals are kept; None if there are none.

    Raises:
        StoreError: there is no store in the folder, a run is writing it, or originals cannot be kept.
        DiskError: rows cannot be written; the originals are where they were.
    """
    check_is_store(folder)
    with lock_folder(folder, LOCK):
        mender = _Mender(folder, now)
        report = verify(folder, alone=True)
        found = dict.fromkeys(report.findings)
        done: set[Finding] = set()
        # What is mended brings more to light: parts that a damaged one replaced, answers that are missing.
        while todo := [finding for finding in report.findings if finding.remedy and finding not in done]:
            mender.mend(todo, report)
            done.update(todo)
            report = verify(folder, alone=True)
            found |= dict.fromkeys(report.findings)
    return list(found), report, mender.aside if mender.has_kept else None


class _Mender:
    """Does what findings ask for."""

    def __init__(self, folder: Path, now: datetime) -> None:
        place = folder.resolve()  # "." has no name to put another one beside
        self.aside = place.with_name(f"{place.name}.damaged-{now:%Y%m%d-%H%M%S}")
        self.has_kept = False
        """Whether anything is in `aside`."""
        self._folder = folder
        self._name = f"part-{now:%Y%m%d-%H%M%S}-repair"
        paths = [path for model_dir in model_folders(folder) for path in part_paths(model_dir)]
        self._number = max(map(part_number, paths), default=0)

    def mend(self, findings: Iterable[Finding], report: Report) -> None:
        for path, remedy in dict.fromkeys((finding.path, finding.remedy) for finding in findings):
            try:
                match remedy:
                    case Remedy.MOVE:
                        self._move(path)
                    case Remedy.SAVE_ROWS:
                        self._save_rows(path)
                    case Remedy.SAVE_LINES:
                        self._save_lines(path)
                    case Remedy.NOTE_LOST_RECORD:
                        self._note_lost_record(path)
                    case Remedy.NOTE_MISSING_ANSWERS:
                        self._note_missing_answers(path.stem, report.missing_answers[path.stem])
            except OSError as error:
                raise StoreError(
                    f"{printable(path)}: cannot be kept in {printable(self.aside)}: {error.strerror}; "
                    "make room there and make it writable, then repair again"
                ) from None

    def _place_aside(self, path: Path) -> Path:
        if not self.has_kept:
            self.aside.mkdir()  # never one that is there already
            self.has_kept = True
        place = self.aside / path.relative_to(self._folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _move(self, path: Path) -> None:
        shutil.move(path, self._place_aside(path))

    def _save_rows(self, path: Path) -> None:
        """Write the sound rows of a part, each where it belongs, and move the part aside."""
        salvage = _Salvage(path, asked_runs(read_records(self._folder)))
        for name in salvage.folders:
            for _, tables in groupby(salvage.sound_rows(name), key=itemgetter(0)):
                self._number += 1
                new = self._folder / name / f"{self._name}-{self._number:06d}.parquet"
                write_part(new, (table for _, table in tables))
        if salvage.has_contradictions:
            place = self._place_aside(path)
            write_part(place.with_name(f"contradicting-{path.name}"), salvage.contradicting_rows())
        self._move(path)

    def _save_lines(self, path: Path) -> None:
        shutil.copy2(path, self._place_aside(path))
        saved = path.with_name(f"{path.name}.writing")
        with path.open("rb") as lines, saved.open("wb") as file:
            file.writelines(line for line in lines if is_attempt(line))
        saved.replace(path)

    def _note_lost_record(self, path: Path) -> None:
        if path.exists():
            self._move(path)
        write_record(path, {"run_id": path.stem, "status": LOST, "counts": {}})

    def _note_missing_answers(self, run_id: str, count: int) -> None:
        path = record_path(self._folder, run_id)
        shutil.copy2(path, self._place_aside(path))
        record = dict(read_records(self._folder)[run_id] or {})
        write_record(path, record | {MISSING_ANSWERS: record.get(MISSING_ANSWERS, 0) + count})


class _Salvage:
    """What can be had of a damaged part. It is read anew for each thing asked, a row group at a time."""

    def __init__(self, path: Path, asked: frozenset[str]) -> None:
        self._path = path
        self._asked = asked
        self.folders: dict[str, None] = {}
        """Names of the folders where its sound rows belong."""
        self.has_contradictions = False
        hashes = [pl.Series(dtype=pl.UInt64)]
        for table, rows, sound in self._judged():
            del table
            self.folders |= dict.fromkeys(model_folders_of(rows).filter(sound).unique(maintain_order=True))
            self.has_contradictions |= not sound.all()
            hashes.append(rows["request_id"].hash())
        ids = pl.concat(hashes)
        self._repeats = ids.n_unique() < len(ids)

    def sound_rows(self, folder: str) -> Iterator[tuple[int, pa.Table]]:
        """Tables in order, each with the number of the part that it goes into: one, if the rows allow it."""
        number = 0
        last: pl.DataFrame | None = None
        for table, rows, sound in self._judged():
            open_ = (
                rows.select(ORDER).with_row_index("row").filter(sound & (model_folders_of(rows) == folder))
            )
            while not open_.is_empty():
                is_first = open_["request_id"].is_first_distinct()
                taken = open_.filter(is_first).sort(ORDER)
                open_ = open_.filter(~is_first)
                if last is not None and (self._repeats or not goes_on(taken, last)):
                    number += 1
                last = taken.tail(1)
                yield number, table.take(taken["row"].to_arrow())

    def contradicting_rows(self) -> Iterator[pa.Table]:
        for table, _, sound in self._judged():
            yield table.filter((~sound).to_arrow())

    def _judged(self) -> Iterator[tuple[pa.Table, pl.DataFrame, pl.Series]]:
        """The row groups that can be read, as tables and frames, and which of their rows are sound."""
        with open_part(self._path) as file:
            for table in read_row_groups(file):
                if table is not None:
                    rows = pl.DataFrame(table)
                    wrong = judge(rows, self._asked).contradictions.values()
                    yield table, rows, rows.select(~pl.any_horizontal(*wrong)).to_series()
