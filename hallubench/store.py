"""The Parquet store: an append-only log of rows.

The row of a request that counts is its answer or, while it has none, its newest error.

At every instant `polars.scan_parquet("OUTPUT/**/*.parquet", hive_partitioning=True)` can be read. What
was flushed survives `kill -9`. One writer at a time, by a lock that dies with its process.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl
import pyarrow as pa

from hallubench.errors import StoreError
from hallubench.parts import (
    Part,
    live_parts,
    model_folder,
    model_folders,
    remove_remains,
    write_part,
)
from hallubench.rows import newest, read_in_order, read_keys
from hallubench.schema import SCHEMA, Row, to_table
from hallubench.text import printable

RUNS = "_runs"
FLUSH_SECONDS = 1.0
"""How long an answer waits for others to be written with it: the most that `kill -9` can take."""
FLUSH_ROWS = 5_000
SMALL_PART_BYTES = 16 * 2**20
MOST_SMALL_PARTS = 64
"""A model's folder with more of them has them merged: a slow run must not leave 100,000 files."""


class Store:
    """The one writer of a folder; used with `with`, whose end writes what is left and compacts.

    Raises:
        StoreError: the folder cannot be written, is not a store, or another run is writing it.
        DiskError: (later) a write failed. Rows not written stay and are tried again by the next flush.
    """

    def __init__(self, folder: Path, run_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.runs_dir = folder / RUNS
        self._run_id = run_id
        self._clock = clock
        self._waiting: dict[str, list[Row]] = {}
        self._count = 0
        self._oldest = 0.0
        self._number = 0
        self._touched: set[Path] = set()

    def __enter__(self) -> Self:
        self._lock = _lock(self.folder)
        try:
            check_ours(self.folder)
            for model_dir in model_folders(self.folder):
                remove_remains(model_dir)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
            for model_dir in sorted(self._touched):
                self._compact(model_dir, live_parts(model_dir))
        finally:
            os.close(self._lock)

    def append(self, row: Row) -> None:
        """Take a row; it is on disk after the next `flush`."""
        if not self._count:
            self._oldest = self._clock()
        self._waiting.setdefault(row.request.model, []).append(row)
        self._count += 1

    def is_due(self) -> bool:
        """Whether enough rows wait, or one for long enough."""
        return self._count >= FLUSH_ROWS or (
            self._count > 0 and self._clock() - self._oldest >= FLUSH_SECONDS
        )

    def flush(self) -> None:
        """Write the waiting rows, a part for each model."""
        for model in list(self._waiting):
            model_dir = self.folder / model_folder(model)
            self._touched.add(model_dir)
            write_part(self._next_part(model_dir), iter([to_table(self._waiting[model])]))
            self._count -= len(self._waiting.pop(model))
            small = [part for part in live_parts(model_dir) if part.path.stat().st_size < SMALL_PART_BYTES]
            if len(small) > MOST_SMALL_PARTS:
                self._compact(model_dir, small)

    def _compact(self, model_dir: Path, parts: Sequence[Part]) -> None:
        """Merge parts into one: sorted, without rows that no longer count."""
        if len(parts) < 2:
            return
        names = [part.path.name for part in parts]
        write_part(self._next_part(model_dir), read_in_order(parts), replaces=names)
        remove_remains(model_dir)

    def _next_part(self, model_dir: Path) -> Path:
        self._number += 1
        return model_dir / f"part-{self._run_id}-{self._number:06d}.parquet"


def scan(folder: str | Path) -> pl.LazyFrame:
    """The store in a folder: one row for each request asked, its answer or else its newest error.

    Columns are read only when they are used.

    Raises:
        StoreError: there is no store in the folder.
    """
    folder = Path(folder)
    check_ours(folder)
    frames = []
    for model_dir in model_folders(folder):
        if parts := live_parts(model_dir):
            frame = pl.scan_parquet([part.path for part in parts], hive_partitioning=False, glob=False)
            frames.append(frame if len(parts) == 1 else _only_newest(frame, parts))
    if not frames:
        return pl.LazyFrame(SCHEMA.empty_table())
    return pl.concat(frames)


def iter_in_order(
    folder: Path, *, where: pl.Expr | None = None, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of `scan` model by model, each model's by prompt, temperature and sample, in flat memory.

    Args:
        folder: of a store.
        where: which rows; an expression over columns that are not lists.
        columns: which columns; all of them by default.

    Raises:
        StoreError: there is no store in the folder.
    """
    check_ours(folder)
    for model_dir in model_folders(folder):
        yield from read_in_order(live_parts(model_dir), where=where, columns=columns)


def answered_ids(folder: Path) -> frozenset[str]:
    """Ids of the requests that have an answer; empty where there is no store yet.

    Raises:
        StoreError: the folder is a file, or holds Parquet that is not ours.
    """
    if not _exists(folder):
        return frozenset()
    check_ours(folder, may_be_empty=True)
    parts = [part.path for model_dir in model_folders(folder) for part in live_parts(model_dir)]
    if not parts:
        return frozenset()
    rows = pl.scan_parquet(parts, hive_partitioning=False, glob=False)
    return frozenset(rows.filter(pl.col("error").is_null()).select("request_id").collect().to_series())


def set_aside(folder: Path, models: set[str], now: datetime) -> Path | None:
    """Move what is stored of some models into a folder beside the store; None if there is nothing."""
    folder = folder.resolve()  # "." has no name to put another one beside
    found = [folder / model_folder(model) for model in sorted(models)]
    found = [model_dir for model_dir in found if model_dir.is_dir()]
    if not found:
        return None
    aside = folder.with_name(f"{folder.name}.before-{now:%Y%m%d-%H%M%S}")
    try:
        aside.mkdir()
        for model_dir in found:
            model_dir.rename(aside / model_dir.name)
    except OSError as error:
        raise StoreError(
            f"{printable(aside)}: earlier answers cannot be moved there: {error.strerror}"
        ) from None
    return aside


def check_ours(folder: Path, *, may_be_empty: bool = False) -> None:
    """Refuse a folder that is no store.

    Raises:
        StoreError: it does not exist, is a file, or holds Parquet files of somebody else.
    """
    shown = printable(folder)
    if not _exists(folder):
        raise StoreError(f"{shown}: no such folder; give the output folder of a run")
    if not folder.is_dir():
        raise StoreError(f"{shown}: is a file; give the output folder of a run")
    model_dirs = set(model_folders(folder))
    foreign = next((path for path in folder.rglob("*.parquet") if path.parent not in model_dirs), None)
    if foreign is not None:
        raise StoreError(f"{printable(foreign)}: not written by hallubench; choose another output folder")
    if not may_be_empty and not model_dirs and not (folder / RUNS).is_dir():
        raise StoreError(f"{shown}: holds no answers of hallubench; give the output folder of a run")
    for model_dir in model_dirs:
        live_parts(model_dir)


def _only_newest(frame: pl.LazyFrame, parts: Sequence[Part]) -> pl.LazyFrame:
    """Leave out rows that no longer count; where there are none, leave the frame as it is."""
    keys = read_keys(parts, ("request_id", "run_id", "timestamp", "error_type"))
    if keys.height == keys["request_id"].n_unique():
        return frame
    counting = newest(keys).select("request_id", "run_id")
    outdated = keys.select("request_id", "run_id").join(counting, on=["request_id", "run_id"], how="anti")
    return frame.join(outdated.lazy(), on=["request_id", "run_id"], how="anti", maintain_order="left")


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError as error:
        raise StoreError(
            f"{printable(folder)}: cannot be read: {error.strerror}; choose another output folder"
        ) from None


def _lock(folder: Path) -> int:
    """Lock a folder for as long as this process lives.

    Raises:
        StoreError: it cannot be made or written, or another run holds it.
    """
    shown = printable(folder)
    if _exists(folder) and not folder.is_dir():
        raise StoreError(f"{shown}: is a file; choose another output folder")
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / RUNS / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{shown}: cannot be written: {problem}; choose another output folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 20, 0).decode() or "unknown"
        os.close(lock)
        raise StoreError(
            f"{shown}: another run (process {holder}) is writing it; wait for it, or choose another folder"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
