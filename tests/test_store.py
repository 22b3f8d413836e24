from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hallubench import parts as parts_module
from hallubench.errors import DiskError, StoreError
from hallubench.parts import ORDER, live_parts, model_folder
from hallubench.rows import read_in_order
from hallubench.schema import SCHEMA, Row
from hallubench.store import FLUSH_SECONDS, MOST_SMALL_PARTS, Store, answered_ids, iter_in_order, scan
from hallubench.types import Completion, Prompt, Request, SamplingParams

START = datetime(2026, 11, 23, tzinfo=UTC)


def make_row(
    number: int = 0,
    *,
    model: str = "m",
    error: str | None = None,
    text: str = "Yes.",
    after: float = 0.0,
    index: int | None = None,
    temperature: float | None = 0.0,
    sample: int = 0,
) -> Row:
    """The answer to request `number`, or its error, whole `after` seconds after the start."""
    request = Request(
        request_id=f"{number:020x}",
        prompt=Prompt(id=f"p{number}", index=number if index is None else index, text="Does it exist?"),
        sample_index=sample,
        provider="echo",
        model=model,
        system_prompt=None,
        params=SamplingParams(max_tokens=64, temperature=temperature),
    )
    completion = Completion(
        request_id=request.request_id,
        timestamp=START + timedelta(seconds=after),
        elapsed_seconds=0.5,
        text=None if error else text,
        error=error,
        finish_reason="error" if error else "stop",
    )
    return Row("run-1", request, completion, None)


def write(folder: Path, *rows: Row, run_id: str = "run-1") -> None:
    with Store(folder, run_id) as store:
        for row in rows:
            store.append(row)


@contextmanager
def unmerged(folder: Path, *flushes: list[Row], run_id: str = "run-1") -> Iterator[Store]:
    """A store in the middle of a run, with one part for each flush."""
    with suppress(KeyboardInterrupt), Store(folder, run_id) as store:
        for rows in flushes:
            for row in rows:
                store.append(row)
            store.flush()
        yield store
        raise KeyboardInterrupt  # an interrupted run does not compact


def parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def raw_scan(folder: Path) -> pl.LazyFrame:
    return pl.scan_parquet(f"{folder}/**/*.parquet", hive_partitioning=True)


def ids(frame: pl.LazyFrame) -> list[int]:
    return sorted(int(request_id, 16) for request_id in frame.select("request_id").collect().to_series())


# Writing


def test_a_row_is_on_disk_after_the_flush_and_not_before(tmp_path: Path) -> None:
    with Store(tmp_path, "run-1") as store:
        store.append(make_row(1))
        assert parquet_files(tmp_path) == []
        store.flush()
        assert ids(raw_scan(tmp_path)) == [1]


def test_a_flush_is_due_when_a_row_has_waited(tmp_path: Path) -> None:
    now = 100.0
    with Store(tmp_path, "run-1", clock=lambda: now) as store:
        now += 10 * FLUSH_SECONDS
        assert not store.is_due()
        store.append(make_row(1))
        assert not store.is_due()
        now += FLUSH_SECONDS
        store.append(make_row(2))
        assert store.is_due()
        store.flush()
        assert not store.is_due()
        store.append(make_row(3))
        assert not store.is_due()


def test_a_flush_is_due_when_many_rows_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hallubench.store.FLUSH_ROWS", 3)
    with Store(tmp_path, "run-1", clock=lambda: 0.0) as store:
        for number in range(3):
            assert not store.is_due()
            store.append(make_row(number))
        assert store.is_due()


def test_a_run_ends_with_one_part_for_each_model(tmp_path: Path) -> None:
    with Store(tmp_path, "run-1") as store:
        for number in range(6):
            store.append(make_row(number, model="a" if number % 2 else "b"))
            store.flush()
    assert [path.parent.name for path in parquet_files(tmp_path)] == ["model=a", "model=b"]
    assert ids(scan(tmp_path)) == list(range(6))


def test_a_run_that_is_cut_short_writes_what_waits_and_the_next_one_compacts(tmp_path: Path) -> None:
    with unmerged(tmp_path, [make_row(1)]) as store:
        store.append(make_row(2))
    assert len(parquet_files(tmp_path)) == 2
    with Store(tmp_path, "run-2"):
        pass
    assert len(parquet_files(tmp_path)) == 1
    assert ids(scan(tmp_path)) == [1, 2]


def test_a_part_that_is_alone_is_left_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    (before,) = [(path, path.stat().st_ino) for path in parquet_files(tmp_path)]
    with Store(tmp_path, "run-2"):
        pass
    assert [(path, path.stat().st_ino) for path in parquet_files(tmp_path)] == [before]


def test_many_small_parts_are_merged_while_the_run_goes_on(tmp_path: Path) -> None:
    count = 2 * MOST_SMALL_PARTS + 5
    with unmerged(tmp_path, *([make_row(number)] for number in range(count))):
        assert len(parquet_files(tmp_path)) <= MOST_SMALL_PARTS
        assert ids(raw_scan(tmp_path)) == ids(scan(tmp_path)) == list(range(count))


def test_small_parts_of_a_killed_run_are_merged_by_the_next(tmp_path: Path) -> None:
    with unmerged(tmp_path, *([make_row(number)] for number in range(MOST_SMALL_PARTS))):
        pass
    with unmerged(tmp_path, [make_row(1000)], run_id="run-2"):
        assert len(parquet_files(tmp_path)) == 1


def test_a_run_that_takes_an_earlier_run_id_overwrites_nothing(tmp_path: Path) -> None:
    write(tmp_path, make_row(1), run_id="run-1")
    write(tmp_path, make_row(2), run_id="run-1")
    assert ids(scan(tmp_path)) == [1, 2]


# Which row counts

OLD_ERROR, NEW_ERROR = make_row(error="old", after=0), make_row(error="new", after=9)
OLD_ANSWER, NEW_ANSWER = make_row(text="old", after=1), make_row(text="new", after=8)


@pytest.mark.parametrize("how", ["one flush", "several parts", "compacted"])
@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ([OLD_ERROR, OLD_ANSWER], OLD_ANSWER),
        ([OLD_ANSWER, NEW_ERROR], OLD_ANSWER),
        ([OLD_ERROR, NEW_ERROR], NEW_ERROR),
        ([OLD_ANSWER, NEW_ANSWER], NEW_ANSWER),
        ([OLD_ERROR, OLD_ANSWER, NEW_ERROR, NEW_ANSWER], NEW_ANSWER),
    ],
    ids=["answer after error", "error after answer", "two errors", "two answers", "all"],
)
def test_an_answer_counts_before_an_error_and_then_the_newest(
    tmp_path: Path, how: str, rows: list[Row], counts: Row
) -> None:
    others = [make_row(number) for number in range(1, 5)]
    pairs = [[other, row] for other, row in zip(others, rows, strict=False)]
    flushes = [[row for pair in pairs for row in pair]] if how == "one flush" else pairs
    with unmerged(tmp_path, *flushes) as store:
        if how == "compacted":
            store.__exit__(None, None, None)
        frame = raw_scan(tmp_path) if how == "compacted" else scan(tmp_path)
        found = frame.filter(pl.col("prompt_id") == "p0").select("full_response", "error").collect()
    assert found.rows() == [(counts.completion.text, counts.completion.error)]


def test_only_requests_with_an_answer_are_answered(tmp_path: Path) -> None:
    with unmerged(
        tmp_path,
        [make_row(1), make_row(2, error="boom"), make_row(3, error="boom")],
        [make_row(2, after=1), make_row(4, text="")],
    ):
        assert sorted(answered_ids(tmp_path)) == [f"{number:020x}" for number in (1, 2, 4)]


def test_nothing_is_answered_where_there_is_no_store_yet(tmp_path: Path) -> None:
    assert not answered_ids(tmp_path / "new")


# Reading


def test_a_store_without_answers_is_an_empty_frame_with_all_columns(tmp_path: Path) -> None:
    with Store(tmp_path, "run-1"):
        pass
    frame = scan(tmp_path).collect()
    assert frame.is_empty()
    assert frame.columns == SCHEMA.names
    assert list(iter_in_order(tmp_path)) == []


def test_columns_that_are_all_null_keep_their_type_beside_those_that_are_not(tmp_path: Path) -> None:
    write(tmp_path, make_row(1, error="boom", model="a", temperature=None), make_row(2, model="b"))
    frame = raw_scan(tmp_path).collect()
    assert frame.schema["output_top_logprobs"] == pl.List(pl.List(pl.Float32))
    assert frame.schema["temperature"] == pl.Float64
    assert frame.schema == scan(tmp_path).collect_schema()


def test_a_query_reads_only_the_columns_that_it_names(tmp_path: Path) -> None:
    with unmerged(tmp_path, [make_row(1, error="x")], [make_row(1, after=1), make_row(2)]):
        plan = scan(tmp_path).select("temperature").explain()
    assert plan.count("Parquet SCAN") == plan.count(f"PROJECT 1/{len(SCHEMA)} COLUMNS") == 2


def test_a_frame_shows_the_store_as_it_was_while_the_run_goes_on(tmp_path: Path) -> None:
    with Store(tmp_path, "run-1") as store:
        for number in range(3):
            store.append(make_row(number))
            store.flush()
        frame = scan(tmp_path)
        answers = iter_in_order(tmp_path)
        first = next(answers)
        store.append(make_row(3))
    assert len(parquet_files(tmp_path)) == 1
    assert ids(frame) == [0, 1, 2]
    assert first.num_rows + sum(table.num_rows for table in answers) == 3


def test_a_reader_never_misses_or_doubles_a_row_while_parts_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hallubench.store.MOST_SMALL_PARTS", 3)
    flushed = reads = 0
    ended = threading.Event()
    problems: list[str] = []

    def read() -> None:
        nonlocal reads
        while not ended.is_set():
            least = flushed
            scanned, answered = ids(scan(tmp_path)), sorted(int(one, 16) for one in answered_ids(tmp_path))
            if not list(range(least)) <= scanned == list(range(len(scanned))):
                problems.append(f"{least} were flushed, {scanned} were scanned")
            if not list(range(least)) <= answered == list(range(len(answered))):
                problems.append(f"{least} were flushed, {answered} were answered")
            reads += 1

    with Store(tmp_path, "run-1") as store:
        reader = threading.Thread(target=read)
        while flushed < 60 or reads < 20:
            store.append(make_row(flushed))
            store.flush()
            flushed += 1
            if flushed == 1:
                reader.start()
    ended.set()
    reader.join()
    assert problems == []


def test_rows_come_by_prompt_temperature_and_sample(tmp_path: Path) -> None:
    asked = list(product(range(4), (None, 0.0, 0.7), (0, 1)))
    rows = [
        make_row(number, index=index, temperature=temperature, sample=sample)
        for number, (index, temperature, sample) in enumerate(asked)
    ]
    shuffled = [rows[7 * number % len(rows)] for number in range(len(rows))]
    with unmerged(tmp_path, shuffled[:5], shuffled[5:6], shuffled[6:]) as store:
        tables = list(iter_in_order(tmp_path, columns=["sample_index", "prompt_index", "temperature"]))
        found = pa.concat_tables(tables)
        assert found.column_names == ["sample_index", "prompt_index", "temperature"]
        assert list(zip(*(found[name].to_pylist() for name in ORDER[:3]), strict=True)) == asked
        warm = list(iter_in_order(tmp_path, where=pl.col("temperature") == 0.7, columns=["prompt_id"]))
        store.__exit__(None, None, None)
    assert pa.concat_tables(warm)["prompt_id"].to_pylist() == [
        f"p{n}" for n, one in enumerate(asked) if one[1] == 0.7
    ]
    (compacted,) = parquet_files(tmp_path)
    assert pq.read_table(compacted)["prompt_id"].to_pylist() == [row.request.prompt.id for row in rows]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_merging_gives_what_sorting_and_leaving_out_would_give(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("store")
    one = st.builds(
        make_row,
        st.integers(0, 30),
        error=st.none() | st.just("boom"),
        after=st.integers(0, 10**6).map(float),
        index=st.integers(0, 3),
    )
    flushes = data.draw(st.lists(st.lists(one, min_size=1, max_size=12), min_size=1, max_size=6))
    # Of one flush, the last answer counts; give each row a time of its own so that all agree.
    rows = [
        row._replace(completion=replace(row.completion, timestamp=START + timedelta(seconds=second)))
        for second, row in enumerate(row for flush in flushes for row in flush)
    ]
    timed = iter(rows)
    flushes = [[next(timed) for _ in flush] for flush in flushes]
    counting: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.completion.error is None, row.completion.timestamp)):
        counting[row.request.request_id] = row
    columns = ["prompt_index", "request_id", "timestamp"]
    expected = sorted(
        (row.request.prompt.index, row.request.request_id, row.completion.timestamp)
        for row in counting.values()
    )
    with unmerged(folder, *flushes):
        (model_dir,) = folder.glob("model=*")
        tables = list(read_in_order(live_parts(model_dir), columns=columns, table_bytes=1))
        scanned = scan(folder).select(columns).collect().rows()
    assert [tuple(row.values()) for table in tables for row in table.to_pylist()] == expected
    assert sorted(scanned) == expected


# Names


HOSTILE_NAMES = [
    "Qwen/Qwen3-0.6B",
    "../../x",
    "..",
    "123",
    "1e5",
    "2024-01-01",
    "true",
    "null",
    "a=b&c%2F",
    "[brackets]*?",
    "__HIVE_DEFAULT_PARTITION__",
]


@pytest.mark.parametrize(
    "model", [*HOSTILE_NAMES, "m" * 300, "模型" * 40, "a space", "nul\0", "\x1b[31mred", "half \ud800"]
)
def test_any_model_name_comes_back_and_stays_inside_the_folder(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "deep" / "er" / "out"
    write(folder, make_row(1, model=model))
    name = model.replace("\ud800", "\ufffd")
    assert raw_scan(folder).collect()["model"].to_list() == [name]
    assert scan(folder).filter(pl.col("model") == name).collect()["model"].to_list() == [name]
    assert [path.parent.parent for path in parquet_files(tmp_path)] == [folder]


def test_names_that_fit_no_folder_name_do_not_disturb_the_others(tmp_path: Path) -> None:
    names = ["m" * 300, "m" * 299 + "n", "2024-01-01", "zz", "__HIVE_DEFAULT_PARTITION__"]
    write(tmp_path, *(make_row(number, model=name) for number, name in enumerate(names)))
    for frame in (raw_scan(tmp_path), scan(tmp_path)):
        assert sorted(frame.collect()["model"]) == sorted(names)
        for number, name in enumerate(names):
            assert ids(frame.filter(pl.col("model") == name)) == [number]


def test_no_two_models_share_a_folder() -> None:
    names = ["a/b", "a%2Fb", "a_b", "A/b", "m" * 300, "m" * 301]
    assert len({model_folder(name) for name in names}) == len(names)


# What is refused


def test_a_folder_with_somebody_elses_parquet_is_refused_and_left_alone(tmp_path: Path) -> None:
    for place in (tmp_path / "a" / "x.parquet", tmp_path / "b" / "model=m" / "part-run-1-000001.parquet"):
        place.parent.mkdir(parents=True)
        pl.DataFrame({"a": [1]}).write_parquet(place)
    for folder in (tmp_path / "a", tmp_path / "b"):
        before = sorted(folder.rglob("*"))
        with pytest.raises(StoreError, match=r"\.parquet: not written by hallubench; choose"):
            write(folder, make_row(1))
        with pytest.raises(StoreError, match="not written by hallubench"):
            scan(folder)
        assert sorted(folder.rglob("*")) == before


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    (part,) = parquet_files(tmp_path)
    table = pq.read_table(part)
    pq.write_table(table.replace_schema_metadata({parts_module.MARK: b"0"}), part)
    with pytest.raises(StoreError, match="another version of hallubench"):
        scan(tmp_path)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    (part,) = parquet_files(tmp_path)
    os.truncate(part, part.stat().st_size // 2)
    with pytest.raises(StoreError, match=f"{part.name}: not a whole Parquet file"):
        write(tmp_path, make_row(2))


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StoreError, match="file: is a file"):
        write(file, make_row(1))
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        write(file / "below", make_row(1))
    with pytest.raises(StoreError, match="no such folder"):
        scan(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="holds no answers"):
        scan(tmp_path / "empty")


# Rivals, kills and disks


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `code` with this file's names."""
    head = f"import runpy, sys; globals().update(runpy.run_path({__file__!r}))\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path) -> None:
    with Store(tmp_path, "run-1") as store:
        store.append(make_row(1))
        with pytest.raises(StoreError, match=rf"another run \(process {os.getpid()}\)"):
            write(tmp_path, make_row(2), run_id="run-2")
    write(tmp_path, make_row(2), run_id="run-2")
    assert ids(scan(tmp_path)) == [1, 2]


def test_the_lock_of_a_killed_run_is_gone_though_a_child_of_it_lives(tmp_path: Path) -> None:
    code = """
store = Store(Path(sys.argv[1]), "run-1").__enter__()
if not os.fork():
    print(os.getpid(), flush=True)
    signal.pause()
signal.pause()
"""
    with start_python(code, tmp_path) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        with pytest.raises(StoreError, match=rf"another run \(process {process.pid}\)"):
            write(tmp_path, make_row(1))
        process.kill()
        process.wait()
        try:
            write(tmp_path, make_row(1))
        finally:
            os.kill(child, signal.SIGKILL)
    assert ids(scan(tmp_path)) == [1]


@pytest.mark.parametrize("lines", [1, 7, 40, 90])
def test_what_was_flushed_before_a_kill_is_there_and_the_run_goes_on(tmp_path: Path, lines: int) -> None:
    code = """
import hallubench.store
hallubench.store.MOST_SMALL_PARTS = 4
with Store(Path(sys.argv[1]), "run-1") as store:
    for number in range(10**6):
        store.append(make_row(number))
        if number % 3 == 0:
            store.flush()
            print(number, flush=True)
"""
    with start_python(code, tmp_path) as process:
        assert process.stdout
        flushed = [int(process.stdout.readline()) for _ in range(lines)][-1]
        process.kill()
    for path in parquet_files(tmp_path):
        pq.read_table(path)
    found = ids(scan(tmp_path))
    assert found == list(range(len(found)))
    assert len(found) > flushed
    assert len(answered_ids(tmp_path)) == len(found)
    write(tmp_path, *(make_row(number) for number in range(len(found), len(found) + 5)), run_id="run-2")
    assert ids(scan(tmp_path)) == ids(raw_scan(tmp_path)) == list(range(len(found) + 5))
    (model_dir,) = tmp_path.glob("model=*")
    assert len(list(model_dir.iterdir())) == 1


def test_parts_that_a_killed_compaction_left_behind_do_not_count(tmp_path: Path) -> None:
    with unmerged(tmp_path, [make_row(1), make_row(2)], [make_row(3)]):
        left = {path: path.read_bytes() for path in parquet_files(tmp_path)}
    with Store(tmp_path, "run-2"):
        pass
    for path, content in left.items():
        path.write_bytes(content)
    assert len(parquet_files(tmp_path)) == 3
    assert ids(scan(tmp_path)) == [1, 2, 3]
    assert sum(table.num_rows for table in iter_in_order(tmp_path)) == 3
    write(tmp_path, make_row(4), run_id="run-3")
    assert len(parquet_files(tmp_path)) == 1
    assert ids(raw_scan(tmp_path)) == [1, 2, 3, 4]


def test_half_a_part_disturbs_no_reader_and_is_swept_by_the_next_run(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    (part,) = parquet_files(tmp_path)
    half = part.with_name(f"part-run-1-000009.parquet{parts_module.TEMPORARY_SUFFIX}")
    half.write_bytes(part.read_bytes()[:100])
    assert ids(scan(tmp_path)) == ids(raw_scan(tmp_path)) == [1]
    write(tmp_path, make_row(2))
    assert not half.exists()


def test_a_file_that_cannot_grow_loses_nothing_and_the_run_can_go_on(tmp_path: Path) -> None:
    code = """
import resource
folder = Path(sys.argv[1])
with Store(folder, "run-1") as store:
    store.append(make_row(1))
    store.flush()
    store.append(make_row(2, text=os.urandom(100_000).hex()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    try:
        store.flush()
    except DiskError as error:
        found = [path.name for path in sorted(folder.rglob("part*"))]
        print(json.dumps({"message": str(error), "found": found, "ids": ids(scan(folder))}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""
    with start_python(code, tmp_path) as process:
        output = json.loads(process.communicate()[0])
    assert process.returncode == 0
    assert output["ids"] == [1]
    assert output["found"] == ["part-run-1-000001.parquet"]
    assert output["message"].endswith(
        "/model=m: cannot be written: File too large; make room, then run again"
    )
    assert ids(scan(tmp_path)) == [1, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_after_a_failed_sync_the_rows_can_be_flushed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    remedies = {errno.EIO: "check the disk", errno.EROFS: "make it writable"}
    remedy = remedies.get(number, "make room")
    with Store(tmp_path, "run-1") as store:
        store.append(make_row(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(
                DiskError, match=f"model=m: cannot be written: {os.strerror(number)}; {remedy}"
            ):
                store.flush()
        assert not list(tmp_path.rglob("part*"))
        store.flush()
        assert ids(scan(tmp_path)) == [1]


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StoreError, match="cannot be locked: No locks available"):
        write(tmp_path, make_row(1))
