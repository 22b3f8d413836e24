"""A folder of exported files: each written whole, and none twice.

An export takes the place of earlier ones of the same store in its folder, so that a tool which reads
every file there gets no result twice. Which these are is written at the beginning of each file, and
nothing else in the folder is ever removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from hallubench.errors import DiskError, StoreError
from hallubench.text import printable

HEAD = '{\n  "metadata": {\n    "exporter": '
"""How every exported file begins; an object with the keys `program` and `run_ids` follows."""
PROGRAM = "hallubench"

_HEAD_CHARACTERS = 2**20
_WRITING = ".writing-"
_PATTERNS = ("pilot_*.json", "temperature-*/pilot_*.json")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder and hold it against other exports; remove what a killed one left half-written.

    Raises:
        StoreError: it cannot be made or read, or another export is writing there.
    """
    shown = printable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"{shown}: cannot be written: {error.strerror}; choose another --output") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(
                f"{shown}: another export is writing there; wait for it, or choose another --output"
            ) from None
        for pattern in _PATTERNS:
            for path in folder.glob(pattern.replace("pilot_", f"{_WRITING}pilot_")):
                with suppress(OSError):  # read-only: writing will tell
                    path.unlink()
        yield
    finally:
        os.close(descriptor)


def earlier_exports(folder: Path, run_ids: Set[str]) -> list[Path]:
    """The files in a folder that were exported from a store with one of these runs."""
    paths = (path for pattern in _PATTERNS for path in folder.glob(pattern))
    return [path for path in paths if not run_ids.isdisjoint(_exported_runs(path))]


def replace_exports(folder: Path, earlier: Iterable[Path], documents: Mapping[Path, Iterable[bytes]]) -> None:
    """Write new files piece by piece and, when all are whole, put them in the place of earlier ones.

    The earlier ones are removed first: to die in between leaves no export, which is noticed, instead
    of every result twice, which is not.

    Raises:
        DiskError: a file cannot be written; the earlier ones are still there.
    """
    temporary = {path: path.with_name(_WRITING + path.name) for path in documents}
    try:
        for path, pieces in documents.items():
            path.parent.mkdir(exist_ok=True)
            with temporary[path].open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
        for path in earlier:
            path.unlink(missing_ok=True)
        for path in documents:
            temporary[path].replace(path)
    except OSError as error:
        raise DiskError(
            f"{printable(folder)}: cannot be written: {error.strerror}; make room, or choose another --output"
        ) from error
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _exported_runs(path: Path) -> frozenset[str]:
    try:
        with path.open(encoding="utf-8") as file:
            head = file.read(_HEAD_CHARACTERS)
        if head.startswith(HEAD):
            exporter, _ = json.JSONDecoder().raw_decode(head, len(HEAD))
            if exporter["program"] == PROGRAM:
                return frozenset(exporter["run_ids"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # whatever it is, it is not ours
    return frozenset()
