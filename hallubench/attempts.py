"""The log of attempts: `_runs/<run_id>.attempts.jsonl`, one line for every call that was made.

    {"request_id": "9f2c...", "attempt": 2, "sent_at": "2026-01-31T10:01:23.456789+00:00", "wait": 1.07,
     "seconds": 0.84, "status": 529, "exception": "InternalServerError", "provider_request_id": "req_01"}

It holds no prompt, no answer and no key.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from hallubench.errors import DiskError


class AttemptLog:
    """Appends lines to a file, several of them to the same file if they like. Used with `with`.

    Each line is one write, which costs microseconds and leaves nothing in memory for a crash to
    lose; the file is synced when the block ends.

    Raises:
        DiskError: the file cannot be written. No half line stays behind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._failed(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.fsync(self._file)
        except OSError as failure:
            raise self._failed(failure) from None
        finally:
            os.close(self._file)

    def write(
        self,
        *,
        request_id: str,
        attempt: int,
        sent_at: datetime,
        wait: float,
        seconds: float,
        status: int | None,
        exception: str | None,
        provider_request_id: str | None,
    ) -> None:
        """Add the line of one attempt.

        Args:
            request_id: what was asked.
            attempt: counted from 1.
            sent_at: aware, UTC.
            wait: seconds before it: backoff, budget and pause; 0 if it went out at once.
            seconds: from sending it to its end.
            status: HTTP status; None if it ended without one.
            exception: class of the exception that ended it; None if it was answered.
            provider_request_id: the server's name for it.
        """
        line = {
            "request_id": request_id,
            "attempt": attempt,
            "sent_at": sent_at.isoformat(),
            "wait": round(wait, 6),
            "seconds": round(seconds, 6),
            "status": status,
            "exception": exception,
            "provider_request_id": provider_request_id,
        }
        data = json.dumps(line).encode() + b"\n"
        try:
            written = os.write(self._file, data)
            if written < len(data):  # the disk is full
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError("no space left")
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> DiskError:
        return DiskError(f"cannot write {self._path}: {error.strerror or error}; free space, then run again")
