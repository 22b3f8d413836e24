"""The Parquet store: an append-only log of rows.

The row of a request that counts is its answer or, while it has none, its newest error.

At every instant every file of `polars.scan_parquet("OUTPUT/**/*.parquet", hive_partitioning=True)` is whole
and no answer is missing; only while parts are merged, a row can be there twice, or a file be gone between
listing and reading. `scan` has neither. What was flushed survives `kill -9`. One writer at a time, by a lock
that dies with its process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl
import pyarrow as pa

from hallubench.errors import DiskError, StoreError
from hallubench.lock import lock_folder
from hallubench.parts import (
    PART_NAME,
    Source,
    check_part,
    held_parts,
    live_parts,
    model_folder,
    model_folders,
    most_held_open,
    part_number,
    part_paths,
    remove_remains,
    scan_parts,
    write_part,
)
from hallubench.rows import outdated_rows, read_in_order
from hallubench.schema import SCHEMA, Row, to_table
from hallubench.text import printable

RUNS = "_runs"
"""The folder beside those of the models that tells what produced them."""
LOCK = f"{RUNS}/.lock"
FLUSH_SECONDS = 1.0
"""How long an answer waits for others to be written with it: the most that `kill -9` can take."""
FLUSH_ROWS = 5_000
FLUSH_ALTERNATIVES = 1_000_000
"""Alternative tokens that may wait in memory: about 100 MB."""
SMALL_PART_BYTES = 512 * 2**10
MOST_SMALL_PARTS = 64
"""A model's folder with more of them has them merged: a slow run must not leave 100,000 files. Larger parts
wait for the end of the run: merging them would hold up answers for longer than a flush may take."""


class Store:
    """The one writer of a folder; used with `with`, whose end writes what is left and compacts.

    If the block ends with an exception, only what is left is written, so that an interrupt takes no longer;
    the end of the next run compacts. Parts that cannot be merged, for want of room, stay as they are.

    Args:
        folder: of the store; made if there is none.
        run_id: a part of the parts' names.
        clock: tells how long rows have waited, in seconds.
        notify: told, in one line, if parts could not be merged at the end.

    Raises:
        StoreError: the folder cannot be written, is not a store, or another run is writing it.
        DiskError: (later) a write failed. Rows not written stay and are tried again by the next flush.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder = folder
        self.runs_dir = folder / RUNS
        self._run_id = run_id
        self._clock = clock
        self._notify = notify
        self._waiting: dict[str, dict[str, Row]] = {}
        self._count = 0
        self._alternatives = 0
        self._oldest = 0.0
        self._number = 0
        self._small: dict[Path, list[Path]] = {}

    def __enter__(self) -> Self:
        if _exists(self.folder):
            check_ours(self.folder, may_be_empty=True)
        self._lock = lock_folder(self.folder, LOCK)
        try:
            for model_dir in model_folders(self.folder):
                remove_remains(model_dir)
                # No name is ever used again: a merged part would take it for one it replaced.
                self._number = max([self._number, *map(part_number, part_paths(model_dir))])
        except OSError as error:
            self._lock.close()
            raise StoreError(
                f"{printable(self.folder)}: cannot be written: {error.strerror}; choose another output folder"
            ) from None
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
            if error is None:
                self._compact()
        finally:
            self._lock.close()

    def append(self, row: Row) -> None:
        """Take a row; it is on disk after the next `flush`."""
        if not self._count:
            self._oldest = self._clock()
        rows = self._waiting.setdefault(row.request.model, {})
        earlier = rows.get(row.request.request_id)
        if earlier is None or earlier.completion.error is not None or row.completion.error is None:
            rows[row.request.request_id] = row
        self._count += 1
        for logprobs in (row.completion.logprobs, row.completion.prompt_logprobs):
            self._alternatives += 0 if logprobs is None else len(logprobs.top_tokens)

    def is_due(self) -> bool:
        """Whether enough rows wait, or one for long enough."""
        return (
            self._count >= FLUSH_ROWS
            or self._alternatives >= FLUSH_ALTERNATIVES
            or (self._count > 0 and self._clock() - self._oldest >= FLUSH_SECONDS)
        )

    def flush(self) -> None:
        """Write the waiting rows, a part for each model."""
        for model, waiting in list(self._waiting.items()):
            model_dir = self.folder / model_folder(model)
            part = self._new_part(model_dir, "part")
            write_part(part, [to_table(sorted(waiting.values(), key=_place))])
            del self._waiting[model]
            self._keep_few(part)
        self._count = self._alternatives = 0

    def _compact(self) -> None:
        for model_dir in model_folders(self.folder):
            if len(parts := live_parts(model_dir)) > 1:
                try:
                    self._merge(model_dir, parts)
                except DiskError as error:
                    self._notify(f"All answers are written; only merging their files did not work: {error}")

    def _keep_few(self, part: Path) -> None:
        """Merge the small parts beside a new part if they have become too many."""
        model_dir = part.parent
        if model_dir not in self._small:
            self._small[model_dir] = [path for path in live_parts(model_dir) if _is_small(path)]
        elif _is_small(part):
            self._small[model_dir].append(part)
        if len(self._small[model_dir]) > MOST_SMALL_PARTS:
            small, self._small[model_dir] = self._small[model_dir], []
            with suppress(DiskError):  # no room for a second copy of them: they wait for the end of the run
                merged = self._merge(model_dir, small)
                self._small[model_dir] = [merged] if _is_small(merged) else []

    def _merge(self, model_dir: Path, parts: Sequence[Path]) -> Path:
        """Write parts as one: in order, without rows that no longer count."""
        merged = self._new_part(model_dir, "merged")
        write_part(merged, read_in_order(parts), replaces=parts)
        for path in parts:
            with suppress(OSError):  # it no longer counts; the next run tries again
                path.unlink()
        pa.default_memory_pool().release_unused()  # malloc keeps what it was asked for in small pieces
        return merged

    def _new_part(self, model_dir: Path, kind: str) -> Path:
        self._number += 1
        return model_dir / f"{kind}-{self._run_id}-{self._number:06d}.parquet"


def scan(folder: str | Path) -> pl.LazyFrame:
    """The store in a folder: one row for each request asked, its answer or else its newest error.

    It is the store as it was at this call, also while a run goes on writing. Columns are read only when they
    are used. The frame holds the files open until it is collected by the garbage collector.

    Raises:
        StoreError: there is no store in the folder.
    """
    folder = Path(folder)
    check_ours(folder)
    frames = []
    room = most_held_open()
    for model_dir in model_folders(folder):
        with held_parts(model_dir) as parts:
            room -= len(parts)
            sources = parts if room >= 0 else live_parts(model_dir)
            if sources:
                frames.append(only_what_counts(sources))
    return pl.concat(frames) if frames else pl.LazyFrame(SCHEMA.empty_table())


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
        with held_parts(model_dir) as parts:
            yield from read_in_order(parts, where=where, columns=columns)


def answered_ids(folder: Path) -> Set[str]:
    """Ids of the requests that have an answer; empty where there is no store yet.

    Raises:
        StoreError: the folder is a file, or holds Parquet that is not ours.
    """
    if not _exists(folder):
        return set()
    check_ours(folder, may_be_empty=True)
    answered: set[str] = set()
    for model_dir in model_folders(folder):
        with held_parts(model_dir) as parts:
            if parts:
                rows = scan_parts(parts)
                ids = rows.filter(pl.col("error").is_null()).select("request_id").collect()
                answered.update(ids.to_series())
    return answered


def compact(folder: Path, run_id: str, notify: Callable[[str], None]) -> None:
    """Merge what a killed run left unmerged, unless another run is writing or the folder is read-only.

    Args:
        folder: of a store.
        run_id: a part of the new parts' names.
        notify: told, in one line, what did not work.
    """
    if any(len(list(model_dir.iterdir())) > 1 for model_dir in model_folders(folder)):
        with suppress(StoreError), Store(folder, run_id, notify=notify):
            pass


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
    check_is_folder(folder)
    model_dirs = set(model_folders(folder))
    places: set[Path] = set()
    for path in folder.rglob("*.parquet"):
        if path.parent not in model_dirs or not PART_NAME.fullmatch(path.name):
            raise StoreError(f"{printable(path)}: not written by hallubench; choose another output folder")
        if path.parent not in places:  # one tells for all
            with suppress(FileNotFoundError):  # merged since it was found
                check_part(path)
                places.add(path.parent)
    if not may_be_empty and not model_dirs and not (folder / RUNS).is_dir():
        raise no_store(folder)


def check_is_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        StoreError: it does not exist, or is a file.
    """
    shown = printable(folder)
    if not _exists(folder):
        raise StoreError(f"{shown}: no such folder; give the output folder of a run")
    if not folder.is_dir():
        raise StoreError(f"{shown}: is a file; give the output folder of a run")


def no_store(folder: Path) -> StoreError:
    """What to raise for a folder without a store."""
    return StoreError(f"{printable(folder)}: holds no answers of hallubench; give the output folder of a run")


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError as error:
        raise StoreError(
            f"{printable(folder)}: cannot be read: {error.strerror}; choose another output folder"
        ) from None


def only_what_counts(parts: Sequence[Source]) -> pl.LazyFrame:
    """The rows of parts without those outdated; where there are none, nothing stands in a query's way."""
    rows = scan_parts(parts)
    outdated = outdated_rows(parts)
    if all(numbers.is_empty() for numbers in outdated):
        return rows
    whole = [part for part, numbers in zip(parts, outdated, strict=True) if numbers.is_empty()]
    frames = [scan_parts(whole)] if whole else []
    for part, numbers in zip(parts, outdated, strict=True):
        if not numbers.is_empty():
            numbered = scan_parts([part]).with_row_index("_row")
            frames.append(numbered.filter(~pl.col("_row").is_in(numbers.implode())).drop("_row"))
    return pl.concat(frames)


def _is_small(part: Path) -> bool:
    return part.stat().st_size < SMALL_PART_BYTES


def _place(row: Row) -> tuple[int, float, int, str]:
    """Where a row stands in `ORDER`; null comes first."""
    request = row.request
    temperature = -math.inf if request.params.temperature is None else request.params.temperature
    return request.prompt.index, temperature, request.sample_index, request.request_id
