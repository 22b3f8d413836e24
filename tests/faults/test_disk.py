"""Disks that are full, read-only or broken: one clear line, nothing lost, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from faulty_runs import Fault, Job, check_finished, check_whole, contents, exported_ids, finish, write_config

from hallubench.store import answered_ids

pytestmark = pytest.mark.slow  # each starts several processes


class Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave no byte free."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                with pytest.raises(OSError, match="No space left"):  # noqa: PT012
                    while True:
                        file.write(bytes(size))

    def make_room(self) -> None:
        self._filler.unlink()

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def job(tmp_path: Path, disk: Disk) -> Job:
    return Job(tmp_path, disk.folder / "out")


def write_small_config(folder: Path) -> None:
    write_config(folder, prompts=10, engine={"delay": 0.005})


def stop(job: Job, fault: Fault, **options: Any) -> subprocess.Popen[str]:
    """A run that stands still at a call, for as long as it is not told to go on."""
    process = job.start(fault=fault._replace(act="SIGSTOP"), **options)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()
    return process


def the_error(stderr: str) -> str:
    """The one line that says what was wrong."""
    (line,) = (line for line in stderr.splitlines() if line.startswith("Error: "))
    return line


def assert_goes_on(job: Job) -> None:
    """The same command again: it asks only what is not there, and everything is there then."""
    before = answered_ids(job.output)
    finish(job.start())
    log = job.log
    assert before.isdisjoint(log.asked)
    assert len(answered_ids(job.output)) == len(before) + len(log.asked) == 30
    check_finished(job.output)


def test_a_disk_that_fills_up_ends_the_run_and_what_is_written_stays(
    tmp_path: Path, disk: Disk, job: Job
) -> None:
    disk.remount("size=1m")
    write_config(tmp_path, prompts=2000, logprobs=20, engine={})
    _, stderr = finish(job.start(), code=1)
    assert the_error(stderr).endswith("cannot be written: No space left on device; make room, then run again")
    assert f"Error: {job.output}/model=" in stderr
    written = contents(job.output)
    assert 0 < written.height < 6000
    check_whole(job.output, job.log.flushed)
    disk.remount("size=64m")
    finish(job.start())
    assert set(written["request_id"]).isdisjoint(job.log.asked)
    check_finished(job.output)
    alone = Job(tmp_path, tmp_path / "alone")
    finish(alone.start())
    assert contents(job.output).equals(contents(alone.output))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("after", "lock", 1),
        Fault("before", "open part", 1),
        Fault("before", "write_table part", 3),
        Fault("before", "close part", 2),
        Fault("before", "write_table merged", 1),
        Fault("before", "final open record", 1),
    ],
    ids=str,
)
def test_a_disk_that_is_full_at_any_step_ends_the_run_in_one_line(
    tmp_path: Path, disk: Disk, job: Job, fault: Fault
) -> None:
    write_small_config(tmp_path)
    process = stop(job, fault)
    disk.fill()
    process.send_signal(signal.SIGCONT)
    _, stderr = finish(process, code=1)
    assert the_error(stderr).startswith(f"Error: {job.output}/")
    assert "cannot be written: No space left on device; make room" in the_error(stderr)
    check_whole(job.output, job.log.flushed)
    disk.make_room()
    assert_goes_on(job)


def test_a_disk_without_room_to_merge_is_no_failure(tmp_path: Path, disk: Disk, job: Job) -> None:
    write_small_config(tmp_path)
    process = stop(job, Fault("before", "final write_table merged", 1), small_parts=1000)
    disk.fill()
    process.send_signal(signal.SIGCONT)
    _, stderr = finish(process)
    assert "All answers are written; only merging their files did not work: " in stderr
    assert "No space left on device; make room, then run again" in stderr
    check_whole(job.output, job.log.flushed)
    assert len(answered_ids(job.output)) == 30
    disk.make_room()
    assert_goes_on(job)


def test_an_export_to_a_full_disk_keeps_the_earlier_one(tmp_path: Path, disk: Disk, job: Job) -> None:
    write_small_config(tmp_path)
    finish(job.start())
    export = ("export-json", str(job.output), "--layout", "per-model")
    finish(job.start(*export))
    before = {path: path.read_bytes() for path in job.output.rglob("pilot_*")}
    disk.fill()
    _, stderr = finish(job.start(*export), code=1)
    assert the_error(stderr).endswith("No space left on device; make room, or choose another --output")
    assert {path: path.read_bytes() for path in job.output.rglob("*pilot_*")} == before
    disk.make_room()
    finish(job.start(*export))
    assert len(exported_ids(job.output)) == 30


@pytest.mark.parametrize("left", ["finished", "killed"])
def test_a_read_only_store_can_be_read_and_says_so_when_it_is_to_be_written(
    tmp_path: Path, disk: Disk, job: Job, left: str
) -> None:
    write_small_config(tmp_path)
    if left == "finished":
        finish(job.start())
    else:
        job.start(fault=Fault("after", "rename merged", 1)).communicate(timeout=60)
        half_written = job.output / "export" / "runs" / ".writing-pilot_results.json"
        half_written.parent.mkdir(parents=True)
        half_written.touch()
    answered = answered_ids(job.output)
    disk.remount("ro")
    check_whole(job.output, set(answered))
    finish(job.start("status", str(job.output)))
    elsewhere = tmp_path / "elsewhere"
    finish(job.start("export-json", str(job.output), "--output", str(elsewhere)))
    assert exported_ids(elsewhere) == answered
    _, stderr = finish(job.start("export-json", str(job.output)), code=2 if left == "finished" else 1)
    assert "cannot be written: Read-only file system; " in the_error(stderr)
    assert the_error(stderr).endswith("choose another --output")
    if left == "finished":
        stdout, _ = finish(job.start())
        assert stdout.startswith("Nothing left to ask")
    else:
        _, stderr = finish(job.start(), code=2)
        assert the_error(stderr).endswith(
            "cannot be written: Read-only file system; choose another output folder"
        )
        disk.remount("rw")
        assert_goes_on(job)


def test_records_that_cannot_be_written_stop_a_run_before_it_asks(
    tmp_path: Path, disk: Disk, job: Job
) -> None:
    write_small_config(tmp_path)
    runs = job.output / "_runs"
    runs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", runs], check=True)
    try:
        _, stderr = finish(job.start(), code=2)
    finally:
        subprocess.run(["umount", runs], check=True)
    assert "cannot be written: Read-only file system; choose another output folder" in the_error(stderr)
    assert job.log.asked == []
    assert_goes_on(job)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("before", "fsync record", 1, "EIO"), "Input/output error; make room or make it writable"),
        (Fault("before", "fsync part", 3, "EIO"), "Input/output error; check the disk"),
        (Fault("before", "fsync folder", 3, "EIO"), "Input/output error; check the disk"),
        (Fault("before", "rename part", 3, "EDQUOT"), "Disk quota exceeded; make room"),
        (Fault("before", "open part", 3, "EROFS"), "Read-only file system; make it writable"),
    ],
    ids=str,
)
def test_a_disk_that_refuses_ends_the_run_in_one_line(tmp_path: Path, fault: Fault, message: str) -> None:
    job = Job(tmp_path, tmp_path / "out")
    write_small_config(tmp_path)
    _, stderr = finish(job.start(fault=fault), code=1)
    assert f"cannot be written: {message}, then run again" in the_error(stderr)
    check_whole(job.output, job.log.flushed)
    assert len(answered_ids(job.output)) < 30
    assert_goes_on(job)


@pytest.mark.parametrize("call", ["fsync part", "rename part", "fsync folder"])
def test_a_disk_that_refuses_once_costs_no_answer(tmp_path: Path, call: str) -> None:
    job = Job(tmp_path, tmp_path / "out")
    write_small_config(tmp_path)
    finish(job.start(fault=Fault("before", call, 3, "EIO once")), code=1)
    in_flight = set(job.log.asked) - answered_ids(job.output)
    assert len(in_flight) <= 1
    files = list(job.output.rglob("*.parquet"))
    assert sum(pq.read_metadata(file).num_rows for file in files) == len(answered_ids(job.output))
    assert_goes_on(job)


def test_a_disk_on_which_no_merge_is_synced_is_no_failure(tmp_path: Path) -> None:
    job = Job(tmp_path, tmp_path / "out")
    write_small_config(tmp_path)
    finish(job.start(fault=Fault("before", "fsync merged", 1, "EIO")))
    assert job.log.fault is not None
    check_whole(job.output, job.log.flushed)
    stdout, _ = finish(job.start())
    assert stdout.startswith("Nothing left to ask: all 30 requests are answered")
    check_finished(job.output)
