"""The files of a store: which of them count, and how one is written.

    OUTPUT/model=<percent-encoded>/part-<run_id>-<n>.parquet      what a run flushed
    OUTPUT/model=<percent-encoded>/merged-<run_id>-<n>.parquet    what took the place of several parts

A part is written under a temporary name, sealed, synced and renamed, and never changed. Its rows are in
`ORDER`, and no two of them answer the same request. A merged part names in its metadata the parts that it
takes the place of: they stop counting the moment it exists, even if the process dies before it removed them.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias
from urllib.parse import quote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hallubench.errors import DiskError, StoreError
from hallubench.schema import SCHEMA, valid_text
from hallubench.seal import seal
from hallubench.text import printable

Source: TypeAlias = Path | BinaryIO
"""Where a part is read from: its path or, held open, the file."""

ORDER = ("prompt_index", "temperature", "sample_index", "request_id")
MERGED = "merged-"
PART_NAME = re.compile(rf"(part-|{MERGED})(?P<run_id>.+)-(?P<number>\d+)\.parquet")
TEMPORARY_SUFFIX = ".writing"
"""Not .parquet: whoever reads `**/*.parquet` must not find half a file."""
REPLACES = b"hallubench_replaces"
MARK = b"hallubench_schema"
MODEL_FOLDERS = "model[-=]*"
LONGEST_FOLDER_NAME = 200
NULL_TO_HIVE = "__HIVE_DEFAULT_PARTITION__"
ROW_GROUP_BYTES = 32 * 2**20
"""Of a row group in memory."""
DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError)
"""What Arrow raises, by the place of the damage, when it reads a file that is not as it was written."""


def model_folder(model: str) -> str:
    """The name of a model's folder: never a path, and short enough for every file system.

    Readers of hive partitions take a model's name from `model=...`, even where the file has the column. A
    name that cannot stand there whole gets a folder that is no partition. It sorts before the others: polars
    judges by the first file whether there are partitions, and takes the column from the files if not.
    """
    encoded = quote(valid_text(model), safe="")
    if len(encoded) <= LONGEST_FOLDER_NAME and encoded != NULL_TO_HIVE:
        return f"model={encoded}"
    digest = hashlib.blake2b(encoded.encode(), digest_size=8).hexdigest()
    return f"model-{encoded[:LONGEST_FOLDER_NAME]}-{digest}"


def model_folders(folder: Path) -> list[Path]:
    """The model folders of a store, by name."""
    return sorted(path for path in folder.glob(MODEL_FOLDERS) if path.is_dir())


def part_paths(model_dir: Path) -> list[Path]:
    """All parts of a model's folder, by name, also those that no longer count."""
    return sorted(path for path in model_dir.iterdir() if PART_NAME.fullmatch(path.name))


def part_number(part: Path) -> int:
    """The number in a part's name; 0 if it has none."""
    name = PART_NAME.fullmatch(part.name)
    return int(name["number"]) if name else 0


def live_parts(model_dir: Path, *, damaged_too: bool = False) -> list[Path]:
    """The parts of a model's folder that count, by name.

    Args:
        model_dir: the folder.
        damaged_too: whether a merged part that does not open counts, as one that replaces nothing.

    Raises:
        StoreError: a merged part is damaged, or not ours.
    """
    paths = part_paths(model_dir)
    replaced: set[str] = set()
    for path in paths:
        if path.name.startswith(MERGED):
            with suppress(*[StoreError] if damaged_too else []):
                replaced.update(_metadata(path).get(REPLACES, b"").decode(errors="replace").split("/"))
    return [path for path in paths if path.name not in replaced]


@contextmanager
def held_parts(model_dir: Path, *, damaged_too: bool = False) -> Iterator[list[Source]]:
    """The parts of a model's folder that count, for a reader that is not the folder's writer.

    They are held open: the writer may merge them at any time, and an open file can be read although it is
    removed. Of a folder with more than `most_held_open` parts the paths are given instead.

    Args:
        model_dir: the folder.
        damaged_too: as for `live_parts`.

    Raises:
        StoreError: a merged part is damaged, or not ours; or the parts were not held open, and were merged
            before they were read.
    """
    while True:
        with ExitStack() as files:
            found = part_paths(model_dir)
            try:
                paths = live_parts(model_dir, damaged_too=damaged_too)
                hold = len(paths) <= most_held_open()
                sources: list[Source] = [
                    files.enter_context(path.open("rb")) if hold else path for path in paths
                ]
            except FileNotFoundError:
                continue  # merged since it was found
            # A listing made while files go can miss those that take their place.
            if set(found) <= set(part_paths(model_dir)):
                try:
                    yield sources
                except FileNotFoundError:
                    raise StoreError(f"{printable(model_dir)}: a run merged its parts; read again") from None
                return


def most_held_open() -> int:
    """Parts that a reader may hold open: a quarter of the files that its process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4


def scan_parts(sources: Sequence[Source]) -> pl.LazyFrame:
    """All rows of some parts, those that do not count included."""
    # The folder's name is not asked: the model column is in the file.
    return pl.scan_parquet(list(sources), hive_partitioning=False, glob=False)  # type: ignore[arg-type]


def check_part(path: Path) -> None:
    """Refuse a file that is not a part of a store of this version.

    Raises:
        StoreError: it is damaged, or not ours.
    """
    shown = printable(path)
    mark = _metadata(path).get(MARK) if PART_NAME.fullmatch(path.name) else None
    if mark is None:
        raise StoreError(f"{shown}: not written by hallubench; choose another output folder")
    if mark != SCHEMA.metadata[MARK]:
        raise StoreError(f"{shown}: written by another version of hallubench; choose another output folder")


def remove_remains(model_dir: Path) -> None:
    """Finish what a killed run began: remove half-written files and parts merged into others."""
    live = set(live_parts(model_dir))
    for path in model_dir.iterdir():
        half_written = path.name.endswith(f".parquet{TEMPORARY_SUFFIX}")
        if half_written or (PART_NAME.fullmatch(path.name) and path not in live):
            path.unlink()


def write_part(path: Path, tables: Iterable[pa.Table], replaces: Sequence[Path] = ()) -> None:
    """Write a part whole or not at all.

    Args:
        path: its name; there must be no such file yet.
        tables: its rows, in `ORDER`.
        replaces: parts of the same folder whose place it takes.

    Raises:
        DiskError: the disk is full, read-only or broken; nothing is left of the part.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
            _sync_folder(path.parent.parent)
        with temporary.open("x+b") as file:
            with pq.ParquetWriter(file, SCHEMA, **_WRITER_OPTIONS) as writer:
                if replaces:
                    # No file name has a slash in it.
                    writer.add_key_value_metadata(
                        {REPLACES.decode(): "/".join(part.name for part in replaces)}
                    )
                for table in tables:
                    writer.write_table(table, row_group_size=_rows_per_group(table))
                    del table  # or it would live until the next one is made
            seal(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        for remains in (temporary, path):  # a part whose name did not reach the disk is written again too
            with suppress(OSError):
                remains.unlink(missing_ok=True)
        remedy = _REMEDIES.get(error.errno, "make it writable")
        problem = printable(error.strerror or error)
        raise DiskError(
            f"{printable(path.parent)}: cannot be written: {problem}; {remedy}, then run again"
        ) from error


_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room",
    errno.EIO: "check the disk",
}


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        return pq.read_metadata(path).metadata or {}
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise StoreError(
            f"{printable(path)}: not a whole Parquet file ({printable(error, 80)}); move it out of the folder"
        ) from None


def _rows_per_group(table: pa.Table) -> int:
    groups = max(1, round(int(table.nbytes) / ROW_GROUP_BYTES))
    return max(1, math.ceil(int(table.num_rows) / groups))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leaves(of: Callable[[pa.DataType], bool], within: Callable[[str], bool] = lambda _: True) -> list[str]:
    """Parquet paths of the columns whose innermost values are of a type."""
    paths = []
    for field in SCHEMA:
        kind, path = field.type, field.name
        while pa.types.is_list(kind):
            kind, path = kind.value_type, f"{path}.list.element"
        if of(kind) and within(field.name):
            paths.append(path)
    return paths


# Measured with five alternatives a token: BYTE_STREAM_SPLIT is what compresses log-probabilities and token
# ids, a dictionary what compresses token texts and all the rest. On a real model's answers zstd 6 takes 3.6 %
# fewer bytes than zstd 3 for a fifth more time; zstd 12 takes 4.5 % fewer for more than twice the time.
_SPLIT = _leaves(pa.types.is_float32) + _leaves(pa.types.is_int32, lambda name: name.endswith("token_ids"))
_WRITER_OPTIONS = {
    "compression": "zstd",
    "compression_level": 6,
    "use_byte_stream_split": _SPLIT,
    "use_dictionary": [path for path in _leaves(lambda _: True) if path not in _SPLIT],
    # Nobody looks for a token by its least and greatest neighbour.
    "write_statistics": [path for path in _leaves(lambda _: True) if ".list." not in path],
    "write_page_index": True,
    # The seal tells that a bit flipped, these where: 0.1 % more bytes, and no time that could be measured.
    "write_page_checksum": True,
}
