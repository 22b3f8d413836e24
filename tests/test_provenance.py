from __future__ import annotations

import errno
import hashlib
import json
import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hallubench.config import Config
from hallubench.errors import DiskError
from hallubench.generate import run
from hallubench.provenance import RunRecord, gpus, new_run_id


def make_config(folder: Path, **keys: Any) -> Config:
    prompts = folder / "prompts.json"
    prompts.write_text('[{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}]')
    entry = {"name": "e", "type": "echo", "api_key": "sk-secret"} | keys
    settings = {"prompts_file": str(prompts), "output_dir": str(folder / "out"), "models": [entry]}
    return Config.model_validate(settings)


def start(folder: Path) -> RunRecord:
    return RunRecord(folder, "run-1", make_config(folder), {"path": "p", "sha256": "s", "count": 1})


def read(folder: Path) -> dict[str, Any]:
    loaded = json.loads((folder / "run-1.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_record_of_a_run_says_what_produced_its_answers(tmp_path: Path) -> None:
    result = run(make_config(tmp_path))
    text = (result.output / "_runs" / f"{result.run_id}.json").read_text()
    record = json.loads(text)
    assert "sk-secret" not in text
    assert record["config"]["models"] == [{"name": "e", "type": "echo"}]
    assert record["prompts"] == {
        "path": str(tmp_path / "prompts.json"),
        "sha256": hashlib.sha256((tmp_path / "prompts.json").read_bytes()).hexdigest(),
        "count": 2,
    }
    assert record["hallubench"]["version"] == version("hallubench")
    assert record["packages"]["polars"] == version("polars")
    assert record["machine"]["cores"] >= 1
    assert record["counts"] == {"answered": 2, "failed": 0, "pending": 0, "already_answered": 0}
    assert record["status"] == "finished"
    started, ended = map(datetime.fromisoformat, (record["started_at"], record["ended_at"]))
    assert started <= ended
    assert started.tzinfo is not None


def test_a_record_is_on_disk_from_its_start(tmp_path: Path) -> None:
    start(tmp_path)
    assert read(tmp_path)["status"] == "running"


def test_facts_are_added_under_their_model(tmp_path: Path) -> None:
    record = start(tmp_path)
    record.add("m", {"revision": "abc"})
    record.add("m", {"revision": "def"})
    assert read(tmp_path)["providers"] == {"m": [{"revision": "abc"}, {"revision": "def"}]}


def test_a_record_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = start(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"run-1\.json: cannot be written: No space left"):
        record.end("finished", {}, [])
    assert read(tmp_path)["status"] == "running"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.json", "run-1.json"]


def test_a_package_without_a_name_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    start(tmp_path)
    assert "pyarrow" in read(tmp_path)["packages"]


def test_run_ids_sort_by_their_start() -> None:
    early = new_run_id(datetime(2026, 1, 9, 23, 59, 59, tzinfo=UTC))
    assert early.startswith("20260109-235959-")
    assert early < new_run_id(datetime(2026, 1, 10, tzinfo=UTC))


def test_gpus_are_listed_as_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA H100, 81559 MiB, 560.1, GPU-1'")
    assert gpus() == [
        {"name": "NVIDIA H100", "memory.total": "81559 MiB", "driver_version": "560.1", "uuid": "GPU-1"}
    ]


@pytest.mark.parametrize("script", ["echo 'No devices were found'", "exit 9", "echo"])
def test_a_driver_without_gpus_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    assert gpus() == []
