from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hallubench.attempts import AttemptLog
from hallubench.errors import DiskError


def write(log: AttemptLog, request_id: str = "r1", attempt: int = 1) -> None:
    log.write(
        request_id=request_id,
        attempt=attempt,
        sent_at=datetime(2026, 1, 31, 10, 1, 23, 456789, tzinfo=UTC),
        wait=0.25,
        seconds=1.5,
        status=529,
        exception="InternalServerError",
        provider_request_id="req_01",
    )


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_attempt_is_one_line(tmp_path: Path) -> None:
    with AttemptLog(tmp_path / "log.jsonl") as log:
        write(log)

    assert read(tmp_path / "log.jsonl") == [
        {
            "request_id": "r1",
            "attempt": 1,
            "sent_at": "2026-01-31T10:01:23.456789+00:00",
            "wait": 0.25,
            "seconds": 1.5,
            "status": 529,
            "exception": "InternalServerError",
            "provider_request_id": "req_01",
        }
    ]


def test_lanes_may_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AttemptLog(path) as one, AttemptLog(path) as other:
        for attempt in (1, 2, 3):
            write(one, "r1", attempt)
            write(other, "r2", attempt)

    assert [line["request_id"] for line in read(path)] == ["r1", "r2"] * 3


def test_a_killed_process_leaves_every_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    program = f"""
import os, signal
from datetime import UTC, datetime
from pathlib import Path
from hallubench.attempts import AttemptLog
log = AttemptLog(Path({str(path)!r}))
for attempt in range(100):
    log.write(request_id="r", attempt=attempt, sent_at=datetime.now(UTC), wait=0, seconds=1, status=200,
              exception=None, provider_request_id=None)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False)

    assert ended.returncode == -signal.SIGKILL
    assert [line["attempt"] for line in read(path)] == list(range(100))


def test_a_full_disk_is_an_error_and_leaves_no_half_line(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "log.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGXFSZ, ignored))
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    with AttemptLog(path) as log:
        write(log)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        with pytest.raises(DiskError, match=r"log\.jsonl.*free space"):
            write(log)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert len(read(path)) == 1


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"missing/log\.jsonl: No such file"):
        AttemptLog(tmp_path / "missing" / "log.jsonl")
