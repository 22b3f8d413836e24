"""Several processes on one folder: one writes, any number read, and each sees a whole store."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import polars as pl
import pytest
from faulty_runs import Fault, Job, check_finished, exported_ids, finish, write_config

from hallubench.errors import StoreError
from hallubench.legacy import export_json
from hallubench.parts import held_parts
from hallubench.rows import read_in_order
from hallubench.status import status_lines, summarize
from hallubench.store import answered_ids, scan

READS = 1_000
THREADS = 2


def wait_for_a_flush(job: Job, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not job.log.flushed and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Readers: each gives the requests that it finds, as a list with all that it finds.


def by_scan(job: Job, _: Path) -> list[str]:
    return scan(job.output).select("request_id", "full_response").collect()["request_id"].to_list()


def by_answered_ids(job: Job, _: Path) -> list[str]:
    return list(answered_ids(job.output))


def by_export(job: Job, folder: Path) -> list[str]:
    export_json(job.output, output=folder, layout="per-model", now=datetime.now(UTC))
    return list(exported_ids(folder))


def by_status(job: Job, _: Path) -> int:
    return int(summarize(job.output)["successes"].sum())


def by_glob(job: Job, _: Path) -> list[str] | None:
    """What polars alone finds; None if a file was merged into another one between listing and reading."""
    try:
        found = pl.scan_parquet(f"{job.output}/**/*.parquet", hive_partitioning=True)
        return found.select("request_id", "full_response").collect()["request_id"].to_list()
    except FileNotFoundError:
        return None


@pytest.mark.slow
def test_whoever_reads_while_a_run_writes_and_merges_sees_all_that_was_flushed(tmp_path: Path) -> None:
    write_config(tmp_path, prompts=100, engine={"delay": 0.003})
    reads: Counter[str] = Counter()
    of_glob: Counter[str] = Counter()

    def read(job: Job, process: subprocess.Popen[str], folder: Path) -> None:
        while process.poll() is None:
            for reader in (by_scan, by_answered_ids, by_export, by_glob):
                flushed = job.log.flushed
                found = reader(job, folder)
                reads[reader.__name__] += 1
                if found is None:
                    of_glob["a file was gone"] += 1
                    continue
                assert flushed <= set(found), f"{reader.__name__} misses an answer"
                if reader is not by_glob:
                    assert len(set(found)) == len(found), f"{reader.__name__} finds a request twice"
                elif len(set(found)) < len(found):
                    of_glob["a request was there twice"] += 1
            flushed, successes = job.log.flushed, by_status(job, folder)
            assert len(flushed) <= successes <= 300
            assert list(status_lines(job.output))
            reads["by_status"] += 1

    with ThreadPoolExecutor(THREADS) as threads:
        for number in count():
            job = Job(tmp_path, tmp_path / f"out-{number}")
            process = job.start()
            wait_for_a_flush(job, process)
            readers = [
                threads.submit(read, job, process, tmp_path / f"export-{number}-{reader}")
                for reader in range(THREADS)
            ]
            try:
                for reader in readers:
                    reader.result()
            finally:
                process.communicate(timeout=60)
            check_finished(job.output)
            if reads.total() >= READS:
                break
    print(f"{reads.total()} reads during {number + 1} runs: {dict(reads)}; by_glob: {dict(of_glob)}")


def test_polars_alone_sees_every_answer_once_as_long_as_nothing_is_merged(tmp_path: Path) -> None:
    write_config(tmp_path, prompts=60, engine={"delay": 0.003})
    job = Job(tmp_path, tmp_path / "out")
    process = job.start(small_parts=1000)
    wait_for_a_flush(job, process)
    reads = 0
    while not job.log.final:
        flushed = job.log.flushed
        found = by_glob(job, tmp_path)
        if not job.log.final:  # or it may have met the compaction at the end
            assert found is not None
            assert flushed <= set(found)
            assert len(set(found)) == len(found)
            reads += 1
    finish(process)
    assert reads > 0


def test_of_more_parts_than_may_be_open_a_reader_sees_all_or_is_told_to_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hallubench.parts.most_held_open", lambda: 1)
    write_config(tmp_path, prompts=60, engine={"delay": 0.003})
    job = Job(tmp_path, tmp_path / "out")
    process = job.start()
    wait_for_a_flush(job, process)
    while process.poll() is None:
        for reader in (by_answered_ids, by_export):
            flushed = job.log.flushed
            try:
                found = reader(job, tmp_path / "export")
            except StoreError as error:
                if not str(error).endswith("read again"):
                    raise
            else:
                assert flushed <= set(found)
                assert len(set(found)) == len(found)
    finish(process)


def test_parts_that_are_merged_while_they_are_read_by_name_are_told_from_a_broken_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hallubench.parts.most_held_open", lambda: 1)
    write_config(tmp_path, prompts=10, engine={"delay": 0.003})
    job = Job(tmp_path, tmp_path / "out")
    process = job.start(fault=Fault("before", "final write_table merged", 1, "SIGSTOP"), small_parts=1000)
    os.waitpid(process.pid, os.WUNTRACED)

    def read_late() -> None:
        with held_parts(job.output / "model=model-b") as parts:
            process.send_signal(signal.SIGCONT)
            finish(process)
            list(read_in_order(parts))

    with pytest.raises(StoreError, match="model-b: a run merged its parts; read again"):
        read_late()


def test_a_second_run_on_a_folder_is_refused_and_names_the_process_of_the_first(tmp_path: Path) -> None:
    write_config(tmp_path, prompts=10, engine={"delay": 0.003})
    job, second = Job(tmp_path, tmp_path / "out"), Job(tmp_path, tmp_path / "out", runs=100)
    process = job.start(fault=Fault("after", "rename part", 2, "SIGSTOP"))
    os.waitpid(process.pid, os.WUNTRACED)
    before = sorted(job.output.rglob("*"))
    _, stderr = finish(second.start(), code=2)
    assert stderr == (
        f"Error: {job.output}: another run (process {process.pid}) is writing it; wait for it, "
        "or choose another folder\n"
    )
    assert second.log.asked == []
    assert sorted(job.output.rglob("*")) == before
    process.send_signal(signal.SIGCONT)
    finish(process)
    assert len(answered_ids(job.output)) == 30


@pytest.mark.slow
def test_of_runs_that_start_together_one_writes_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    write_config(tmp_path, prompts=10, engine={"delay": 0.003})
    for number in range(5):
        jobs = [Job(tmp_path, tmp_path / f"out-{number}", runs=100 * rival) for rival in range(3)]
        processes = [job.start() for job in jobs]
        for process in processes:
            _, stderr = process.communicate(timeout=60)
            assert process.returncode in (0, 2)
            assert process.returncode == 0 or ") is writing it; wait for it" in stderr
        asked = [id_ for job in jobs for id_ in job.log.asked]
        assert len(asked) == len(set(asked)) == 30
        check_finished(jobs[0].output)


def test_the_name_of_a_living_process_in_a_stale_lock_holds_nobody_up(tmp_path: Path) -> None:
    write_config(tmp_path, prompts=4, engine={})
    job = Job(tmp_path, tmp_path / "out")
    job.start(fault=Fault("before", "close part", 1)).communicate(timeout=60)
    lock = job.output / "_runs" / ".lock"
    assert lock.read_text().isdecimal()
    lock.write_text(str(os.getpid()))  # numbers of processes come again
    finish(job.start())
    assert len(answered_ids(job.output)) == 12
