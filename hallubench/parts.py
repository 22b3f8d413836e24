"""The files of a store: which parts there are, which of them count, and how one is written.

    OUTPUT/model=<percent-encoded>/part-<run_id>-<n>.parquet

A part is written under a temporary name, synced and renamed, and never changed. A part that was merged
from others names them in its metadata, so that they stop counting the moment it exists, even if the
process dies before it has removed them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from hallubench.errors import DiskError, StoreError
from hallubench.schema import SCHEMA
from hallubench.text import printable

PART_NAME = re.compile(r"part-(?P<run_id>[0-9A-Za-z-]+)-(?P<number>\d+)\.parquet")
TEMPORARY_SUFFIX = ".writing"
"""Not .parquet: a reader's `*.parquet` must never meet a part that is not whole."""
REPLACES = b"hallubench_replaces"
MARK = b"hallubench_schema"
LONGEST_FOLDER_NAME = 200
ROW_GROUP_BYTES = 64 * 2**20
"""Of a row group in memory: what a reader of whole rows has to hold at least."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part and its footer."""

    path: Path
    metadata: pq.FileMetaData

    @property
    def replaces(self) -> frozenset[str]:
        """Names of the parts whose rows it took over."""
        names = (self.metadata.metadata or {}).get(REPLACES, b"").decode()
        return frozenset(names.split(",")) - {""}


def model_folder(model: str) -> str:
    """The name of a model's folder: never a path, and short enough for every file system."""
    encoded = quote(model, safe="", errors="surrogatepass")
    if len(encoded) > LONGEST_FOLDER_NAME:
        digest = hashlib.blake2b(model.encode(errors="surrogatepass"), digest_size=8).hexdigest()
        encoded = f"{encoded[:LONGEST_FOLDER_NAME]}-{digest}"
    return f"model={encoded}"


def model_folders(folder: Path) -> list[Path]:
    """The model folders of a store, by name."""
    return sorted(path for path in folder.glob("model=*") if path.is_dir())


def live_parts(model_dir: Path) -> list[Part]:
    """The parts of a model's folder that count, by name.

    Raises:
        StoreError: a file is not a whole part of a store.
    """
    while True:
        with suppress(FileNotFoundError):  # merged into another one since the folder was listed
            parts = [open_part(path) for path in sorted(model_dir.glob("*.parquet"))]
            break
    replaced = {name for part in parts for name in part.replaces}
    return [part for part in parts if part.path.name not in replaced]


def open_part(path: Path) -> Part:
    """Read a part's footer.

    Raises:
        StoreError: it is no Parquet file, or not one of ours.
        FileNotFoundError: it is gone.
    """
    try:
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{printable(path)}: not a whole Parquet file ({printable(error, 80)})") from None
    if not PART_NAME.fullmatch(path.name) or MARK not in (metadata.metadata or {}):
        raise StoreError(f"{printable(path)}: not written by hallubench; choose another output folder")
    return Part(path, metadata)


def remove_remains(model_dir: Path) -> None:
    """Finish what a killed run began: remove half-written files and parts merged into others."""
    for path in model_dir.glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
    live = {part.path for part in live_parts(model_dir)}
    for path in model_dir.glob("*.parquet"):
        if path not in live:
            path.unlink(missing_ok=True)


def write_part(path: Path, tables: Iterator[pa.Table], replaces: list[str] | None = None) -> None:
    """Write a part whole or not at all.

    Raises:
        DiskError: the disk is full, read-only or broken; nothing is left of the part.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with pq.ParquetWriter(file, SCHEMA, **_WRITER_OPTIONS) as writer:
                if replaces:
                    writer.add_key_value_metadata({REPLACES.decode(): ",".join(replaces)})
                for table in tables:
                    writer.write_table(table, row_group_size=rows_per_group(table))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        problem = error.strerror or error
        raise DiskError(
            f"{printable(path.parent)}: cannot be written: {problem}; make room, then run again"
        ) from error


def rows_per_group(table: pa.Table) -> int:
    """How many of a table's rows make a row group of about `ROW_GROUP_BYTES`."""
    return max(1, int(table.num_rows * ROW_GROUP_BYTES / max(table.nbytes, 1)))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leaves(of: Callable[[pa.DataType], bool]) -> list[str]:
    """Parquet paths of the columns whose innermost values are of a type."""
    paths = []
    for field in SCHEMA:
        kind, path = field.type, field.name
        while pa.types.is_list(kind):
            kind, path = kind.value_type, f"{path}.list.element"
        if of(kind):
            paths.append(path)
    return paths


# Measured on real answers with five alternatives a token: BYTE_STREAM_SPLIT is what compresses
# log-probabilities, a dictionary what compresses token texts and ids.
_WRITER_OPTIONS = {
    "compression": "zstd",
    "compression_level": 3,
    "use_byte_stream_split": _leaves(pa.types.is_float32),
    "use_dictionary": _leaves(lambda kind: not pa.types.is_floating(kind)),
    "write_page_index": True,
}
