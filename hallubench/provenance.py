"""`_runs/<run_id>.json`: what produced a run's answers, so that a paper can cite it.

{"run_id": "20261123-083758-a1b2c3", "status": "finished", "started_at": ..., "ended_at": ...,
 "hallubench": {"version": ..., "git_commit": ...}, "config": {...},
 "prompts": {"path": ..., "sha256": ..., "count": ...}, "packages": {...}, "machine": {...},
 "providers": {"<model>": {...}}, "counts": {...}, "problems": [...]}
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, Literal

import hallubench
from hallubench.config import Config
from hallubench.errors import DiskError
from hallubench.text import printable

Status = Literal["running", "finished", "interrupted", "failed"]
TEMPORARY_SUFFIX = ".tmp"


def new_run_id(now: datetime) -> str:
    """A run's name; names sort by their start."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


class RunRecord:
    """The record of one run, on disk from its start and rewritten whole when something is added.

    Args:
        runs_dir: the folder of the records.
        run_id: the run's name.
        config: what it asks.
        prompts: what there is to know of the prompts file.
        set_aside: where earlier answers of the config's models were moved before it began; None if nowhere.

    Raises:
        DiskError: the record cannot be written.
    """

    def __init__(
        self,
        runs_dir: Path,
        run_id: str,
        config: Config,
        prompts: dict[str, Any],
        *,
        set_aside: Path | None = None,
    ) -> None:
        self._path = runs_dir / f"{run_id}.json"
        self._record: dict[str, Any] = {
            "run_id": run_id,
            "status": "running",
            "started_at": _now(),
            "ended_at": None,
            "config": config.to_json(),
            "prompts": prompts,
            "set_aside": None if set_aside is None else str(set_aside),
            **environment(),
            "providers": {},
            "counts": {},
            "problems": [],
        }
        self._write()

    def add(self, name: str, facts: object) -> None:
        """Add what a provider says of the model that it answers with."""
        self._record["providers"].setdefault(name, []).append(facts)
        self._write()

    def end(self, status: Status, counts: dict[str, Any], problems: list[str]) -> None:
        """Complete the record."""
        self._record |= {"status": status, "ended_at": _now(), "counts": counts, "problems": problems}
        self._write()

    def _write(self) -> None:
        write_record(self._path, self._record)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole, in the place of an earlier one.

    Raises:
        DiskError: it cannot be written; the earlier one is still there.
    """
    temporary = path.with_suffix(f".json{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=2, default=str)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DiskError(
            f"{printable(path)}: cannot be written: {error.strerror}; "
            "make room or make it writable, then run again"
        ) from None


def environment() -> dict[str, Any]:
    """Where something runs: hallubench's version, those of all packages, and the machine."""
    return {
        "hallubench": {"version": version("hallubench"), "git_commit": _git_commit()},
        "packages": _packages(),
        "machine": _machine(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _packages() -> dict[str, str]:
    # What an interrupted pip leaves behind has no name.
    return dict(sorted((dist.name, dist.version) for dist in distributions() if dist.name))


def _git_commit() -> str | None:
    """The commit of a source checkout, "+changes" behind it where files differ; None when installed."""
    source = Path(hallubench.__file__).parents[1]
    if not (source / ".git").exists() or not (git := shutil.which("git")):
        return None

    def ask(*arguments: str) -> str:
        answer = subprocess.run(  # noqa: S603 - fixed arguments
            [git, "-C", str(source), *arguments], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip()

    commit = ask("rev-parse", "HEAD")
    return (
        f"{commit}+changes" if commit and ask("status", "--porcelain", "--", "hallubench") else commit or None
    )


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as the driver lists them; empty without a driver."""
    if not (nvidia_smi := shutil.which("nvidia-smi")):
        return []
    fields = ("name", "memory.total", "driver_version", "uuid")
    try:
        answer = subprocess.run(  # noqa: S603 - fixed arguments
            [nvidia_smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    values = (line.split(", ") for line in answer.stdout.splitlines())
    return [dict(zip(fields, gpu, strict=True)) for gpu in values if len(gpu) == len(fields)]
