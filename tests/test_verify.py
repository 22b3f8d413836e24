from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from hallubench import parts
from hallubench.cli import main
from hallubench.config import Config
from hallubench.errors import DiskError, StoreError
from hallubench.findings import Finding, Remedy, Report
from hallubench.generate import run
from hallubench.parts import live_parts, write_part
from hallubench.plan import make_plan
from hallubench.prompts import PromptFile
from hallubench.records import read_records
from hallubench.repair import repair
from hallubench.schema import SCHEMA, Row, to_table
from hallubench.soundness import inspect_part, judge, open_part, read_row_groups
from hallubench.store import Store, scan
from hallubench.types import Completion
from hallubench.verify import verify

NOW = datetime(2026, 11, 23, 8, 37, 58, tzinfo=UTC)
ASIDE = "out.damaged-20261123-083758"


def entry(name: str = "a", **keys: Any) -> dict[str, Any]:
    return {"name": name, "type": "echo", "temperature": 0, "logprobs": 2, "max_tokens": 8} | keys


def make_config(folder: Path, *entries: dict[str, Any], prompts: int = 12, **keys: Any) -> Config:
    file = folder / "prompts.json"
    file.write_text(json.dumps([{"id": f"p{i}", "prompt": f"Is claim {i} true?"} for i in range(prompts)]))
    settings = {"prompts_file": str(file), "output_dir": str(folder / "out"), "models": entries or (entry(),)}
    return Config.model_validate(settings | keys)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two models with 12 prompts each, asked already, in parts of many row groups as those of large runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROW_GROUP_BYTES", 2_000)
        run(config := make_config(tmp_path_factory.mktemp("asked"), entry("a"), entry("b")))
    return config


@pytest.fixture
def config(tmp_path: Path, asked: Config) -> Config:
    """The same, to be damaged."""
    shutil.copytree(str(asked.output_dir), tmp_path / "out")
    return asked.model_copy(update={"output_dir": str(tmp_path / "out")})


@pytest.fixture
def store(tmp_path: Path, config: Config) -> Path:
    return tmp_path / "out"


def the_part(store: Path, model: str = "a") -> Path:
    (part,) = (store / f"model={model}").glob("*.parquet")
    return part


def the_record(store: Path) -> Path:
    (record,) = (store / "_runs").glob("*.json")
    return record


def rewrite(part: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Change the rows of a part, as somebody could with polars and patience."""
    rows = change(pl.DataFrame(pq.read_table(part)))
    part.unlink()
    write_part(part, [rows.to_arrow().cast(SCHEMA)])


def where(row: int, **values: Any) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Give columns another value in one row."""

    def change(rows: pl.DataFrame) -> pl.DataFrame:
        is_row = pl.int_range(pl.len()) == row
        return rows.with_columns(
            pl.when(is_row).then(pl.lit(value, rows.schema[name])).otherwise(pl.col(name)).alias(name)
            for name, value in values.items()
        )

    return change


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def data_page(part: Path, column: str, group: int = 0) -> int:
    """A place within the values of a column."""
    columns = pq.read_metadata(part).row_group(group)
    chunk = next(
        columns.column(number)
        for number in range(columns.num_columns)
        if columns.column(number).path_in_schema == column
    )
    return int(chunk.data_page_offset + chunk.total_compressed_size - 1 - _dictionary_bytes(chunk))


def _dictionary_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    return int(chunk.data_page_offset - chunk.dictionary_page_offset) if chunk.has_dictionary_page else 0


def said(report: Report, store: Path) -> list[tuple[str, str, str | None]]:
    return [
        (str(one.path.relative_to(store)), one.what, one.remedy and one.remedy.name)
        for one in report.findings
    ]


def faults(report: Report) -> list[str]:
    return [finding.what for finding in report.findings if finding.is_fault]


def answers(store: Path) -> dict[str, str]:
    rows = scan(store).filter(pl.col("error").is_null()).select("request_id", "full_response").collect()
    return dict(rows.iter_rows())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_repaired(store: Path, config: Config, *, lost: int) -> Path:
    """Repair, and see that the store is whole, originals are kept, and a run asks what was lost."""
    before = files(store)
    _, report, aside = repair(store, NOW)
    assert report.faults == 0, said(report, store)
    assert verify(store) == report
    assert aside is not None
    assert aside == store.with_name(ASIDE)
    after, kept = files(store), files(aside)
    for name, content in before.items():
        assert content in (after.get(name), kept.get(name)), name
    result = run(config)
    assert (result.already_answered, result.answered) == (24 - lost, lost)
    assert faults(verify(store)) == []
    return aside


# What is whole


def test_a_store_of_several_runs_is_whole(tmp_path: Path) -> None:
    """Every kind of setting that is part of an id is there."""
    prompts = [
        {"id": "plain", "prompt": "Is it true? \ud83d\ude00"},
        {"id": "chat", "messages": [{"role": "user", "content": "a\n"}]},
    ]
    entries = [
        entry("a", n=3, seed=7, system_prompt="Be brief.", stop=["x", "y"], top_p=0.1 + 0.2, top_k=5),
        entry("a", temperature=None, prompt_logprobs=1, logprobs=None),
        entry("m" * 300, temperature=1e-7, revision="main", dtype="float16"),
    ]
    config = make_config(tmp_path, *entries)
    Path(config.prompts_file or "").write_text(json.dumps(prompts))
    failing = [model.model_copy(update={"engine": {"error_rate": 0.5}}) for model in config.models]
    run(config.model_copy(update={"models": tuple(failing)}))
    run(config)
    report = verify(tmp_path / "out")
    assert (report.findings, report.answers, report.errors, report.outdated) == ([], 10, 0, 0)
    with_errors = run(make_config(tmp_path, entry("c", engine={"error_rate": 1.0})))
    report = verify(tmp_path / "out")
    assert (report.findings, report.answers, report.errors) == ([], 10, with_errors.failed)


def test_an_id_follows_from_the_row_whatever_was_asked(tmp_path: Path) -> None:
    bias = {9: 1, 10: [0.1, None, "\ud800"], True: NOW.date()}
    options = {"extra_body": {"logit_bias": bias, "until": (1, 2)}}
    openai = {"name": "a", "type": "openai", "temperature": -0.0, "seed": -(2**63), "options": options}
    plan = make_plan(config := make_config(tmp_path, openai), PromptFile(Path(config.prompts_file or "")))
    rows = [
        Row(
            "run-1",
            request,
            Completion(request_id=request.request_id, timestamp=NOW, elapsed_seconds=0.5, text=""),
            None,
        )
        for request in plan.requests(plan.lanes[0].groups[0])
    ]
    verdict = judge(pl.DataFrame(to_table(rows)), {"run-1"})
    assert len(rows) == 12
    assert not any(which.any() for which in verdict.contradictions.values())


def test_runs_that_ended_otherwise_leave_whole_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config(tmp_path, entry("a", engine={"die_after": 3})))
    assert verify(tmp_path / "out").findings == []

    def full(_: Store) -> None:
        raise DiskError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "flush", full)
        with pytest.raises(DiskError):
            run(make_config(tmp_path))
    report = verify(tmp_path / "out")
    assert report.faults == 0
    assert "they may not have been written" in report.findings[0].what


def test_answers_set_aside_are_not_missed(config: Config, store: Path) -> None:
    assert run(config, fresh=True).answered == 24
    assert verify(store).faults == 0
    (aside,) = store.parent.glob("out.before-*")
    aside.rename(store.parent / "elsewhere")
    only_a = config.model_copy(update={"models": config.models[:1]})
    assert run(only_a, fresh=True).answered == 12
    assert verify(store).faults == 0


def test_the_same_answers_twice_are_counted_and_no_fault(store: Path) -> None:
    part = the_part(store)
    part.with_name("part-copy-000099.parquet").write_bytes(part.read_bytes())
    report = verify(store)
    assert (report.findings, report.parts, report.answers, report.outdated) == ([], 3, 24, 12)


@pytest.mark.slow
def test_a_run_that_goes_on_leaves_nothing_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hallubench.store.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("hallubench.store.MOST_SMALL_PARTS", 2)
    config = make_config(tmp_path, entry("a"), entry("b"), prompts=6)
    run(config)
    found: list[Finding] = []
    seen = set()
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            report = verify(tmp_path / "out")
            found.extend(report.findings)
            seen.add(report.answers)

    reader = threading.Thread(target=read)
    reader.start()
    for prompts in range(60, 300, 60):
        slow = {"engine": {"delay": 0.001}}
        run(make_config(tmp_path, entry("a", **slow), entry("b", api_key="other", **slow), prompts=prompts))
    ended.set()
    reader.join()
    assert found == []
    assert len(seen) > 2


def test_what_a_killed_run_leaves_is_no_fault(config: Config, store: Path) -> None:
    record = json.loads(the_record(store).read_text())
    the_record(store).write_text(json.dumps(record | {"status": "running", "counts": {}}))
    half = the_part(store).with_name("part-x-000009.parquet.writing")
    half.write_bytes(b"PAR1")
    half_record = the_record(store).with_suffix(".json.tmp")
    half_record.write_text("{")
    merged = the_part(store, "b")
    replaced = merged.with_name("part-old-000001.parquet")
    replaced.write_bytes(merged.read_bytes())
    tables = [pq.read_table(merged)]
    merged.unlink()
    write_part(merged.with_name("merged-x-000010.parquet"), tables, replaces=[replaced])
    report = verify(store)
    assert report.faults == 0
    assert sorted(remedy or "" for _, _, remedy in said(report, store)) == ["", "MOVE", "MOVE", "MOVE"]
    with Store(store, "other"):  # a run may be about to finish all of that, or has removed it
        half.write_bytes(b"PAR1")
        assert verify(store).findings == []
    half.write_bytes(b"PAR1")
    half_record.write_text("{")
    assert_repaired(store, config, lost=0)


# Damage of files


def test_a_part_cut_short_is_found_and_asked_again(config: Config, store: Path) -> None:
    part = the_part(store)
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    (fault,) = said(verify(store), store)
    assert fault[0] == f"model=a/{part.name}"
    assert fault[1].startswith("is not a whole Parquet file (")
    aside = assert_repaired(store, config, lost=12)
    assert (aside / "model=a" / part.name).read_bytes() == content[: len(content) // 2]


def test_of_a_part_with_a_flipped_bit_only_one_row_group_is_lost(config: Config, store: Path) -> None:
    kept = answers(store)
    part = the_part(store)
    rows = pq.read_metadata(part).row_group(1).num_rows
    assert 0 < rows < 6
    flip(part, data_page(part, "output_top_logprobs.list.element.list.element", group=1))
    assert said(verify(store), store) == [
        (f"model=a/{part.name}", f"{rows} of 12 rows cannot be read", "SAVE_ROWS")
    ]
    repair(store, NOW)
    assert answers(store).items() < kept.items()
    assert len(answers(store)) == 24 - rows
    assert run(config).answered == rows
    assert answers(store) == kept
    assert verify(store).faults == 0


def test_a_flipped_bit_is_found_wherever_it_is_and_changes_no_row(store: Path, tmp_path: Path) -> None:
    part = the_part(store)
    content = part.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    rows = pq.read_table(part).to_pylist()
    flipped = tmp_path / "model=a" / part.name
    flipped.parent.mkdir()
    random_ = random.Random(0)
    for number in range(100):
        at = random_.randrange(*((0, footer) if number % 2 else (footer, len(content))))
        damaged = bytearray(content)
        damaged[at] ^= 1 << random_.randrange(8)
        flipped.write_bytes(damaged)
        fault = None
        with suppress(StoreError):  # taken for a part of another version
            _, (fault,) = inspect_part(flipped, flipped, {rows[0]["run_id"]})
            assert fault.is_fault
        if fault and fault.remedy is Remedy.SAVE_ROWS:
            with open_part(flipped) as file:
                saved = [row for table in read_row_groups(file) if table for row in table.to_pylist()]
            assert saved
            assert all(row in rows for row in saved)


def test_a_damaged_merged_part_gives_its_place_back(config: Config, store: Path) -> None:
    merged = the_part(store)
    replaced = merged.with_name("part-old-000001.parquet")
    tables = [pq.read_table(merged)]
    merged.rename(replaced)
    new = merged.with_name("merged-x-000010.parquet")
    for at in (-20, 1000):
        write_part(new, tables, replaces=[replaced])
        flip(new, at)
        assert verify(store).faults == 1
        _, report, aside = repair(store, NOW)
        assert report.faults == 0
        assert len(answers(store)) == 24
        assert aside is not None
        aside.rename(aside.with_name(f"kept{at}"))
        for part in live_parts(new.parent):
            part.rename(replaced)


def test_foreign_parquet_is_moved_aside_and_other_files_are_left(config: Config, store: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(the_part(store).with_name("part-x-000009.parquet"))
    pl.DataFrame({"a": [1]}).write_parquet(store / "mine.parquet")
    notes = [store / "notes.txt", store / "model=a" / "notes.txt", store / "_runs" / "notes.txt"]
    for note in notes:
        note.write_text("x")
    (store / "export").mkdir()
    (store / "annotation").mkdir()
    report = verify(store)
    assert report.faults == 2
    assert len(report.findings) == 5
    assert_repaired(store, config, lost=0)
    assert all(note.exists() for note in notes)


# Damage of rows


def test_parts_in_the_folders_of_other_models_are_brought_back(config: Config, store: Path) -> None:
    kept = answers(store)
    a, b = the_part(store, "a"), the_part(store, "b")
    a.rename(a.with_name("swap"))
    b.rename(a)
    a.with_name("swap").rename(b)
    assert faults(verify(store)) == ["12 of 12 rows belong into the folder of another model"] * 2
    assert_repaired(store, config, lost=0)
    assert answers(store) == kept
    by_folder = {path.name: set(pl.read_parquet(path / "*.parquet")["model"]) for path in store.glob("m*")}
    assert by_folder == {"model=a": {"a"}, "model=b": {"b"}}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"prompt": "Is claim 3 false?"}, "do not hold what their request_id is a hash of"),
        ({"request_id": "0" * 20}, "do not hold what their request_id is a hash of"),
        ({"temperature": 0.5}, "do not hold what their request_id is a hash of"),
        ({"options": "{"}, "do not hold what their request_id is a hash of"),
        ({"error": "boom"}, "have both an answer and an error, or neither"),
        ({"full_response": None}, "have both an answer and an error, or neither"),
        ({"prompt": None}, "have neither a prompt nor messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "have both a prompt and messages"),
        ({"prompt_id": None}, "lack one of run_id"),
        ({"output_ranks": [1]}, "have lists of unequal length for the same tokens"),
        ({"output_top_tokens": [["x"]] * 8}, "have lists of unequal length for the same tokens"),
    ],
)
def test_rows_that_contradict_themselves_are_moved_out(
    config: Config, store: Path, values: dict[str, Any], what: str
) -> None:
    part = the_part(store)
    rewrite(part, where(3, **values))
    changed = pq.read_table(part).slice(3, 1)
    assert any(fault.startswith(f"1 of 12 rows {what}") for fault in faults(verify(store)))
    aside = assert_repaired(store, config, lost=1)
    moved = pq.read_table(aside / "model=a" / f"contradicting-{part.name}", partitioning=None)
    assert moved.equals(changed)


def test_a_row_without_an_identity_or_with_a_path_for_a_run_is_moved_out(config: Config, store: Path) -> None:
    rewrite(the_part(store), where(3, prompt_index=None))
    rewrite(the_part(store, "b"), where(3, run_id="../../x"))
    assert verify(store).faults >= 2
    assert_repaired(store, config, lost=2)
    assert not list(store.parent.parent.glob("x*"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda rows: rows.reverse(),
            "its rows are not by prompt_index, temperature, sample_index, request_id",
        ),
        (lambda rows: pl.concat([rows, rows[5:]]).sort("prompt_index"), "7 of 19 rows answer a request that"),
    ],
)
def test_rows_in_disorder_are_put_in_order(
    config: Config, store: Path, change: Callable[[pl.DataFrame], pl.DataFrame], what: str
) -> None:
    kept = answers(store)
    rewrite(the_part(store), change)
    (fault,) = faults(verify(store))
    assert fault.startswith(what)
    assert_repaired(store, config, lost=0)
    assert answers(store) == kept


def test_ids_that_cannot_follow_from_the_row_are_only_counted(store: Path) -> None:
    rewrite(the_part(store), where(3, prompt="half a character: \ufffd"))
    (note,) = verify(store).findings
    assert note.what.startswith("1 of 12 rows hold U+FFFD")
    assert not note.is_fault
    rewrite(the_part(store), where(3, prompt="imported"))
    record = json.loads(the_record(store).read_text())
    the_record(store).write_text(json.dumps(record | {"status": "imported"}))
    (note,) = verify(store).findings
    assert note.what.startswith("1 of 12 rows were imported")
    assert not note.is_fault


# Damage of records


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_lost_record_is_said_to_be_lost_and_not_invented(
    config: Config, store: Path, content: str | None
) -> None:
    record = the_record(store)
    record.unlink()
    if content is not None:
        record.write_text(content)
    (fault,) = faults(verify(store))
    assert fault == ("is missing, and 24 rows are of this run" if content is None else "cannot be read")
    _, report, _ = repair(store, NOW)
    assert [(one.what, one.is_fault) for one in report.findings] == [
        ("was lost before an earlier repair", False)
    ]
    assert read_records(store)[record.stem] == {"run_id": record.stem, "status": "lost", "counts": {}}
    assert "lost" in CliRunner().invoke(main, ["status", str(store)]).stdout
    assert run(config).run_id is None


def test_answers_that_are_gone_are_missed_and_noted_in_the_record(config: Config, store: Path) -> None:
    the_part(store).unlink()
    record = the_record(store)
    (fault,) = said(verify(store), store)
    assert fault == (f"_runs/{record.name}", "counts 12 more answers than are here", "NOTE_MISSING_ANSWERS")
    assert_repaired(store, config, lost=12)
    assert json.loads(record.read_text())["missing_answers"] == 12
    the_part(store, "b").unlink()
    assert "counts 12 more answers than are here" in faults(verify(store))


def test_a_log_of_attempts_loses_only_its_broken_lines(config: Config, store: Path) -> None:
    log = the_record(store).with_suffix(".attempts.jsonl")
    lines = [json.dumps({"request_id": str(number)}).encode() + b"\n" for number in range(4)]
    log.write_bytes(b"".join(lines)[:-5])  # as a kill leaves it
    assert verify(store).findings == []
    log.write_bytes(lines[0] + b"\xff" + lines[1] + lines[2] + lines[3][:-5])
    assert faults(verify(store)) == ["1 of 4 lines cannot be read"]
    assert_repaired(store, config, lost=0)
    assert log.read_bytes() == lines[0] + lines[2] + lines[3][:-5]


# The command


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_says_what_is_wrong_and_mends_it(store: Path) -> None:
    assert invoke(store) == (0, "2 parts, 24 rows, 24 answers, 0 errors: whole\n")
    part = the_part(store)
    lost = pq.read_metadata(part).row_group(0).num_rows
    flip(part, data_page(part, "full_response"))
    (store / "notes.txt").write_text("x")
    code, output = invoke(store)
    assert code == 1
    assert output.splitlines() == [
        f"FAULT  model=a/{part.name}  {lost} of 12 rows cannot be read; --repair: {Remedy.SAVE_ROWS}",
        f"note   notes.txt{' ' * (len(part.name) - 1)}  is not of the store",
        "2 parts, 12 rows, 12 answers, 0 errors: 1 fault",
    ]
    code, output = invoke(store, "--repair")
    assert code == 0
    assert f"counts {lost} more answers than are here; done: note it in the record" in output
    *_, totals, originals = output.splitlines()
    assert totals == f"2 parts, {24 - lost} rows, {24 - lost} answers, 0 errors: whole"
    assert re.fullmatch(rf"Originals: {store}\.damaged-\d{{8}}-\d{{6}}", originals)
    assert invoke(store, "--repair") == (0, f"note   notes.txt  is not of the store\n{totals}\n")


def test_originals_never_take_the_place_of_others(store: Path) -> None:
    store.with_name(ASIDE).mkdir()
    the_part(store).write_bytes(b"x")
    before = files(store)
    with pytest.raises(StoreError, match=r"cannot be kept in .*: File exists; make room"):
        repair(store, NOW)
    assert files(store).items() >= before.items() - {("_runs/.lock", before["_runs/.lock"])}


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    foreign = tmp_path / "foreign" / "model=a"
    foreign.mkdir(parents=True)
    pl.DataFrame({"a": [1]}).write_parquet(foreign / "part-x-000001.parquet")
    before = files(tmp_path)
    for folder in (tmp_path / "none", file, tmp_path / "foreign"):
        for options in ([], ["--repair"]):
            code, output = invoke(folder, *options)
            assert code == 2
            assert output.startswith("Error: ")
    assert files(tmp_path) == before


def test_a_store_of_another_version_is_refused(store: Path) -> None:
    part = the_part(store)
    pq.write_table(pq.read_table(part).replace_schema_metadata({parts.MARK: b"0"}), part)
    before = files(store)
    for options in ([], ["--repair"]):
        code, output = invoke(store, *options)
        assert code == 2
        assert "written by another version of hallubench; use that one" in output
    assert {name: files(store)[name] for name in before} == before


def test_a_store_that_is_being_written_is_not_repaired(store: Path) -> None:
    with Store(store, "other"):
        code, output = invoke(store, "--repair")
    assert code == 2
    assert "is writing it" in output


def test_hostile_names_are_shown_escaped(store: Path) -> None:
    (store / "model=a" / "\x1b[31mred").write_text("x")
    code, output = invoke(store)
    assert code == 0
    assert "\\x1b[31mred" in output
    assert "\x1b" not in output
