"""One writer at a time: a lock on an output folder that dies with its process."""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import suppress
from io import FileIO
from pathlib import Path

from hallubench.errors import StoreError
from hallubench.text import printable


def lock_folder(folder: Path, file_name: str) -> FileIO:
    """Lock a folder, by a file in it, until that is closed or this process dies.

    Raises:
        StoreError: it cannot be made or written, or another run holds it.
    """
    shown = printable(folder)
    try:
        path = folder / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{shown}: cannot be written: {problem}; choose another output folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = lock.read(20).decode() or "unknown"
        lock.close()
        raise StoreError(
            f"{shown}: another run (process {holder}) is writing it; wait for it, or choose another folder"
        ) from None
    except OSError as error:
        lock.close()
        raise StoreError(
            f"{shown}: cannot be locked: {error.strerror}; choose a folder on another disk"
        ) from None
    with suppress(OSError):  # on a full disk; the lock is held, nameless
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
    # A forked child shares the lock, and would keep it if it outlived this process.
    held = weakref.ref(lock)
    os.register_at_fork(after_in_child=lambda: _close(held()))
    return lock


def is_locked(folder: Path, file_name: str) -> bool:
    """Whether a run holds the lock. To find out, it is shared for an instant, in which no run can begin."""
    try:
        with (folder / file_name).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or a disk that knows no locks
        return False
    return False


def _close(file: FileIO | None) -> None:
    if file is not None:
        file.close()
