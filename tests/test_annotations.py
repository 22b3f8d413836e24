from __future__ import annotations

import csv
import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import CLAUDE, QWEN, answer, store

from hallubench.annotation_batches import COLUMNS, KEY_FILE, LABELS, Batches, export_batches, neutral
from hallubench.annotations import agreement, load_annotations
from hallubench.cli import main
from hallubench.errors import AnnotationError, DiskError, StoreError
from hallubench.store import scan
from hallubench.types import Message

HEADER = ("prompt_id", "model", "annotator", *LABELS)
HOSTILE = [
    '=HYPERLINK("http://evil")',
    "+1",
    "-1",
    "- a list\r\n- of two",
    "@SUM(A1)",
    "\tindented",
    "\rreturned",
    "'quoted'",
    "''twice",
    "'=both",
    'say "no", twice',
    "a\rb\nc\r\nd",
    "nul \0 escape \x1b[31m bell \a",
    "日本語 🙂 \u202e\u2028",
    " ",
    "\ufeffmark",
    "x" * 200_000,
]


def a_store(folder: Path) -> Path:
    """Three prompts to two models, one of them at two temperatures and with two samples; one more failed."""
    asked = [(QWEN, 0.0, 0), (QWEN, 0.7, 0), (QWEN, 0.7, 1), (CLAUDE, None, 0)]
    rows = [
        answer(
            f"p{n}", f"Answer {n}, {sample} of {model}", model=model, temperature=temperature, sample=sample
        )
        for n in range(3)
        for model, temperature, sample in asked
    ]
    return store(folder, *rows, answer("p3", error="timed out"))


def cells(path: Path) -> list[dict[str, str]]:
    """As Python's csv reads a file: another reader than what wrote it."""
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file, strict=True))


def fill(path: Path, labels: Iterable[Mapping[str, str]], drop: Iterable[str] = ()) -> Path:
    """Do an annotator's work: the labels of the first lines, in order."""
    rows = cells(path)
    for row, given_ in zip(rows, labels, strict=False):
        row.update(given_)
    columns = [name for name in rows[0] if name not in drop]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write(path: Path, *lines: str, header: str = ",".join(HEADER)) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# What annotators get.


def test_every_answer_is_in_every_batch_once_and_errors_in_none(tmp_path: Path) -> None:
    batches = export_batches(a_store(tmp_path))
    asked = scan(tmp_path).filter(pl.col("error").is_null()).collect()["request_id"]
    assert [path.name for path in batches.files] == ["annotator-1.csv", "annotator-2.csv"]
    for path, count in batches.files.items():
        assert sorted(row["request_id"] for row in cells(path)) == sorted(asked)
        assert count == len(asked) == 12
    assert (batches.shared, batches.errors) == (12, 1)


def test_the_columns_are_those_that_annotation_tools_read(tmp_path: Path) -> None:
    first, _ = export_batches(a_store(tmp_path)).files
    rows = cells(first)
    assert tuple(rows[0]) == COLUMNS
    assert tuple(rows[0])[: len(HEADER)] == HEADER
    assert {row["annotator"] for row in rows} == {"annotator-1"}
    assert all(row[label] == "" for row in rows for label in LABELS)
    by_id = {row["request_id"]: row for row in scan(tmp_path).collect().to_dicts()}
    for row in rows:
        assert row["response"] == by_id[row["request_id"]]["full_response"]
        assert row["prompt"] == by_id[row["request_id"]]["prompt"]
        assert row["prompt_id"] == by_id[row["request_id"]]["prompt_id"]


def test_batches_do_not_tell_the_model_and_the_key_does(tmp_path: Path) -> None:
    rows = [answer(f"p{n}", "Yes.", model=model) for n in range(3) for model in (QWEN, CLAUDE)]
    batches = export_batches(store(tmp_path, *rows))
    for path in batches.files:
        assert "qwen" not in path.read_text(encoding="utf-8").lower()
        assert "claude" not in path.read_text(encoding="utf-8").lower()
    code_of = {row["model"]: row["code"] for row in cells(batches.key)}
    assert set(code_of) == {QWEN, CLAUDE}
    stored = dict(scan(tmp_path).select("request_id", "model").collect().iter_rows())
    for path in batches.files:
        assert all(row["model"] == code_of[stored[row["request_id"]]] for row in cells(path))


def test_temperatures_samples_and_settings_have_codes_of_their_own(tmp_path: Path) -> None:
    """So that (prompt_id, model), by which the annotation tools join, names one answer."""
    a_store(tmp_path)
    store(tmp_path, answer("p0", "Yes.", system_prompt="Be brief."))
    batches = export_batches(tmp_path)
    for path in batches.files:
        rows = cells(path)
        assert len({(row["prompt_id"], row["model"]) for row in rows}) == len(rows) == 13
    key = [(row["model"], row["temperature"], row["sample_index"]) for row in cells(batches.key)]
    assert key == [
        (QWEN, "0.0", "0"),
        (QWEN, "0.0", "0"),
        (QWEN, "0.7", "0"),
        (QWEN, "0.7", "1"),
        (CLAUDE, "", "0"),
    ]


def test_the_same_store_and_seed_give_the_same_files(tmp_path: Path) -> None:
    a_store(tmp_path / "store")
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        export_batches(tmp_path / "store", output=folder, seed=seed, overlap=0.5)
    one, two, other = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert one == two
    assert all(one[name] != other[name] for name in one)


def test_each_annotator_has_another_order_and_no_batch_is_in_the_stores(tmp_path: Path) -> None:
    rows = [answer(f"p{n:03d}", "Yes.") for n in range(100)]
    batches = export_batches(store(tmp_path, *rows), annotators=3)
    orders = [[row["prompt_id"] for row in cells(path)] for path in batches.files]
    orders.append(sorted(orders[0]))
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(
    ("annotators", "overlap", "shared", "sizes"),
    [
        (2, 1.0, 12, [12, 12]),
        (2, 0.0, 0, [6, 6]),
        (2, 0.5, 6, [9, 9]),
        (3, 0.25, 3, [6, 6, 6]),
        (5, 0.0, 0, [3, 3, 2, 2, 2]),
        (1, 0.3, 4, [12]),
        (20, 0.0, 0, [1] * 12 + [0] * 8),
    ],
)
def test_the_overlap_is_in_every_batch_and_the_rest_is_dealt_out_evenly(
    tmp_path: Path, annotators: int, overlap: float, shared: int, sizes: list[int]
) -> None:
    batches = export_batches(a_store(tmp_path), annotators=annotators, overlap=overlap)
    ids = [[row["request_id"] for row in cells(path)] for path in batches.files]
    assert [len(batch) for batch in ids] == sizes == list(batches.files.values())
    everywhere = set.intersection(*map(set, ids))
    assert len(everywhere) == (shared if annotators > 1 else 12)
    assert batches.shared == shared
    owners = [id_ for batch in ids for id_ in batch if annotators > 1 and id_ not in everywhere]
    assert len(owners) == len(set(owners))
    assert len(set().union(*ids)) == 12


def test_only_the_models_asked_for_are_exported(tmp_path: Path) -> None:
    batches = export_batches(a_store(tmp_path), models="claude-*")
    assert list(batches.files.values()) == [3, 3]
    assert batches.errors == 0
    assert [row["model"] for row in cells(batches.key)] == [CLAUDE]


def test_a_chat_is_shown_whole(tmp_path: Path) -> None:
    turns = (Message("user", "Is it real?"), Message("assistant", "Which?"), Message("user", "CVE-1"))
    first, _ = export_batches(store(tmp_path, answer(prompt=turns))).files
    assert cells(first)[0]["prompt"] == "user: Is it real?\n\nassistant: Which?\n\nuser: CVE-1"


def test_a_spreadsheet_gets_no_formula_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = [answer(f"p{n}", text, prompt=text) for n, text in enumerate(HOSTILE)]
    first, _ = export_batches(store(tmp_path, *rows)).files
    for row in cells(first):
        for column in ("prompt", "response"):
            original = HOSTILE[int(row["prompt_id"].removeprefix("p"))]
            assert row[column][0] not in "=+-@\t\r"
            assert row[column] in (original, f"'{original}")
    labelled = load_annotations(fill(first, [{"notes": "seen"}] * len(HOSTILE)), tmp_path)
    assert sorted(labelled["prompt_id"]) == sorted(f"p{n}" for n in range(len(HOSTILE)))


@pytest.mark.parametrize("id_", ["=1+1", "'a", "'=a", "@me", "a,b\nc"])
def test_an_id_that_looks_like_a_formula_still_joins(tmp_path: Path, id_: str) -> None:
    first, _ = export_batches(store(tmp_path, answer(id_), answer("other"))).files
    fill(first, [{"hallucination_binary": "1"}] * 2, drop=["request_id"])
    assert sorted(load_annotations(first, tmp_path)["prompt_id"]) == sorted([id_, "other"])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(HOSTILE))
@settings(max_examples=60, deadline=None)
def test_notes_come_back_as_they_were_neutralised(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    cell: str = pl.DataFrame({"note": [text]}).select(neutral(pl.col("note"))).item()
    folder = tmp_path_factory.mktemp("notes")
    store(folder, answer())
    path = folder / "notes.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([HEADER, ["p1", QWEN, "a", "1", "", "", "", cell]])
    assert load_annotations(path, folder)["notes"].item() == (text or None)


def test_an_annotators_work_is_never_written_over(tmp_path: Path) -> None:
    batches = export_batches(a_store(tmp_path))
    first, second = batches.files
    fill(first, [{"notes": "a day's work"}])
    second.unlink()
    before = {path: path.read_bytes() for path in first.parent.iterdir()}
    with pytest.raises(StoreError, match="may hold an annotator's work; move it away"):
        export_batches(tmp_path)
    batches.key.rename(tmp_path / KEY_FILE)
    with pytest.raises(StoreError, match=r"annotator-1\.csv: is there already"):
        export_batches(tmp_path)
    assert {path: path.read_bytes() for path in first.parent.iterdir()} == {first: before[first]}


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_store(tmp_path)
    monkeypatch.setattr(os, "fsync", full_from_the_second_on())
    with pytest.raises(DiskError, match="make room"):
        export_batches(tmp_path)
    assert list((tmp_path / "annotation").iterdir()) == []


def full_from_the_second_on() -> object:
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync


def test_a_store_without_answers_is_refused(tmp_path: Path) -> None:
    store(tmp_path, answer(error="timed out"))
    with pytest.raises(StoreError, match="holds no answers"):
        export_batches(tmp_path)
    with pytest.raises(StoreError, match="holds no answers of models that match 'x\\*'"):
        export_batches(tmp_path, models="x*")
    assert not (tmp_path / "annotation").exists()


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    a_store(tmp_path)
    result = CliRunner().invoke(main, ["export-annotations", str(tmp_path), "--overlap", "0.5"])
    assert result.output.splitlines() == [
        f"{tmp_path}/annotation/annotator-1.csv: 9 answers, 6 of them in every batch",
        f"{tmp_path}/annotation/annotator-2.csv: 9 answers, 6 of them in every batch",
        f"{tmp_path}/annotation/model-key.csv: which model is which; keep it from the annotators",
        "Left out, since they failed: 1; `hallubench generate` asks them again",
    ]
    result = CliRunner().invoke(main, ["export-annotations", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1


# What they give back.


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Batches]:
    return tmp_path, export_batches(a_store(tmp_path))


def test_labels_join_on_the_answers(exported: tuple[Path, Batches]) -> None:
    folder, batches = exported
    full = {
        "hallucination_binary": "1",
        "hallucination_types": "Unsupported Claim; fabricated_package, unsupported claim",
        "severity": "High",
        "citation_correctness": "Partially",
        "notes": "'=not a formula\nbut two lines",
    }
    first, second = [
        fill(path, [full, {"hallucination_binary": "0", "severity": "N/A"}]) for path in batches.files
    ]
    annotations = load_annotations([first, second], folder)
    assert annotations.schema == {
        "request_id": pl.String,
        "prompt_id": pl.String,
        "model": pl.String,
        "temperature": pl.Float64,
        "sample_index": pl.Int32,
        "annotator": pl.String,
        "hallucination_binary": pl.Boolean,
        "hallucination_types": pl.List(pl.String),
        "severity": pl.String,
        "citation_correctness": pl.String,
        "notes": pl.String,
    }
    assert annotations["annotator"].to_list() == ["annotator-1"] * 2 + ["annotator-2"] * 2
    assert annotations.select(LABELS).rows()[:2] == [
        (
            True,
            ["fabricated package", "unsupported claim"],
            "high",
            "partially correct",
            "=not a formula\nbut two lines",
        ),
        (False, [], None, None, None),
    ]
    exported_ids = [row["request_id"] for row in cells(first)[:2]]
    assert annotations["request_id"].to_list()[:2] == exported_ids
    joined = scan(folder).join(annotations.lazy(), on="request_id").collect()
    for column in ("prompt_id", "model", "temperature", "sample_index"):
        assert joined[column].eq_missing(joined[f"{column}_right"]).all()


def test_the_key_does_where_a_tool_dropped_the_request_id(exported: tuple[Path, Batches]) -> None:
    folder, batches = exported
    first = next(iter(batches.files))
    ids = [row["request_id"] for row in cells(first)]
    fill(first, [{"hallucination_binary": "1"}] * 12, drop=["request_id", "prompt", "response"])
    assert load_annotations(first, folder)["request_id"].to_list() == ids
    key = batches.key.rename(folder / "elsewhere.csv")
    assert "has no answer of prompt_id" in refusal(first, folder)
    assert load_annotations(first, folder, key=key)["request_id"].to_list() == ids


def test_the_request_id_does_where_there_is_no_key(exported: tuple[Path, Batches]) -> None:
    folder, batches = exported
    batches.key.unlink()
    for path in batches.files:
        fill(path, [{"hallucination_binary": "1"}] * 12)
    assert len(load_annotations(batches.files, folder)) == 24


def test_the_same_model_with_other_settings_needs_the_request_id(tmp_path: Path) -> None:
    store(tmp_path, answer(text="Yes."), answer(text="No.", system_prompt="Be brief."))
    path = fill(next(iter(export_batches(tmp_path).files)), [{"severity": "low"}] * 2)
    assert len(load_annotations(path, tmp_path)) == 2
    fill(path, [], drop=["request_id"])
    assert "2 answers of Qwen/Qwen3-0.6B to p1 may be meant: say which in a column request_id" in refusal(
        path, tmp_path
    )


def test_lines_without_a_label_are_left_out(exported: tuple[Path, Batches]) -> None:
    folder, batches = exported
    first = fill(next(iter(batches.files)), [{"notes": "REVIEW_NEEDED"}, {}, {"hallucination_binary": "0"}])
    assert load_annotations(first, folder)["hallucination_binary"].to_list() == [None, False]
    empty = load_annotations(list(batches.files)[1], folder)
    assert empty.is_empty()
    assert empty.schema["hallucination_types"] == pl.List(pl.String)


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("", f"p0,{CLAUDE},ann,1,,,,"),
        (",temperature,sample_index", f"p0,{QWEN},ann,1,,,,,0.7,1"),
        (",temperature,sample_index", f"p0,{QWEN},ann,1,,,,,0,0.0"),
        (",temperature", f"p0,{QWEN},ann,1,,,,,0.0"),
        (",temperature", f"p0,{CLAUDE},ann,1,,,,,"),
    ],
)
def test_a_file_written_by_hand_names_answers_as_the_store_does(
    tmp_path: Path, header: str, line: str
) -> None:
    path = write(tmp_path / "hand.csv", line, header=",".join(HEADER) + header)
    assert len(load_annotations(path, a_store(tmp_path))) == 1


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        (
            "",
            f"p0,{QWEN},a,1,,,,",
            "3 answers of Qwen/Qwen3-0.6B to p0 may be meant: say which in a column "
            "temperature and sample_index",
        ),
        (
            ",temperature",
            f"p0,{QWEN},a,1,,,,,0.7",
            "2 answers of Qwen/Qwen3-0.6B to p0 may be meant: say which in a column sample_index",
        ),
        (",sample_index", f"p0,{QWEN},a,1,,,,,0", "say which in a column temperature"),
        (
            ",temperature",
            f"p0,{QWEN},a,1,,,,,0.3",
            "has no answer of prompt_id p0, model Qwen/Qwen3-0.6B, temperature 0.3: correct the line",
        ),
        ("", "p0,gpt-2,a,1,,,,", "has no answer of prompt_id p0, model gpt-2"),
        ("", f"p9,{CLAUDE},a,1,,,,", "has no answer of prompt_id p9"),
        ("", f"p3,{QWEN},a,1,,,,", "has no answer of prompt_id p3"),
        (",request_id", f"p0,{QWEN},a,1,,,,,0123", "has no answer of request_id 0123"),
        ("", f",{CLAUDE},a,1,,,,", "no prompt_id: fill it"),
        ("", "p0,,a,1,,,,", "no model: fill it"),
        ("", f"p0,{CLAUDE},a,2,,,,", "hallucination_binary is '2': write 1 or 0, or leave it empty"),
        ("", f"p0,{CLAUDE},a,maybe,,,,", "hallucination_binary is 'maybe'"),
        ("", f"p0,{CLAUDE},a,1,,severe,,", "severity is 'severe': write low, medium, high"),
        ("", f"p0,{CLAUDE},a,1,,,fine,", "citation_correctness is 'fine': write correct, partially correct"),
        (",temperature", f'p0,{QWEN},a,1,,,,,"0,7"', "temperature is '0,7': write a number, such as 0.7"),
        (",temperature", f"p0,{QWEN},a,1,,,,,nan", "temperature is 'nan'"),
        (",sample_index", f"p0,{QWEN},a,1,,,,,0.5", "sample_index is '0.5': write a whole number"),
        (",sample_index", f"p0,{QWEN},a,1,,,,,inf", "sample_index is 'inf'"),
        (",response", f"p0,{CLAUDE},a,1,,,,,another answer", "holds another response"),
        ("", f"p0,{CLAUDE},a,1", "4 cells under 8 columns"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_and_the_fix(
    tmp_path: Path, header: str, line: str, message: str
) -> None:
    good = f'p1,{CLAUDE},a,1,,,,"two\nlines"' + "," * header.count(",")
    path = write(tmp_path / "hand.csv", good, line, header=",".join(HEADER) + header)
    problem = refusal(path, a_store(tmp_path / "store"))
    assert problem.startswith("line 4: ")
    assert message in problem


def test_an_answer_annotated_twice_by_one_is_refused(tmp_path: Path) -> None:
    a_store(tmp_path)
    line = f"p0,{CLAUDE},ann,1,,,,"
    path = write(tmp_path / "twice.csv", line, line)
    assert refusal(path, tmp_path) == (
        f"line 3: its answer is annotated by ann already, in {path}: line 2: remove one, or say in a column "
        "annotator who is who"
    )
    nameless = [write(tmp_path / f"{n}.csv", line.replace("ann", "")) for n in range(2)]
    with pytest.raises(
        AnnotationError, match=r"1\.csv: line 2: its answer is annotated by nobody named already"
    ):
        load_annotations(nameless, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds nothing"),
        (b"prompt_id;model\na;b\n", "no column prompt_id, model, hallucination_binary"),
        (",".join(HEADER[:-1]).encode(), "no column notes: add it"),
        (",".join((*HEADER, "model")).encode(), "two columns are named model: rename one"),
        (",".join(HEADER).encode() + b'\np0,"x', "malformed CSV"),
        (",".join(HEADER).encode() + b"\np0,\xff,a,1,,,,\n", "line 2: not UTF-8: save the file as UTF-8"),
    ],
)
def test_a_file_that_is_no_table_of_annotations_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    assert message in refusal(path, a_store(tmp_path / "store"))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    a_store(tmp_path)
    assert "No such file" in refusal(tmp_path / "no.csv", tmp_path)
    assert "Is a directory" in refusal(tmp_path, tmp_path)


def test_what_a_spreadsheet_does_to_a_response_does_not_matter(tmp_path: Path) -> None:
    text = "It\u2019s \u201creal\u201d:\n" + "word " * 10_000
    path = next(iter(export_batches(store(tmp_path, answer(text=text))).files))
    mojibake = text.encode().decode("cp1252", "replace")[:32_767].replace("\n", "\r\n")
    fill(path, [{"hallucination_binary": "1", "response": mojibake}])
    assert len(load_annotations(path, tmp_path)) == 1


def test_agreement_compares_each_two_annotators_on_what_both_labelled(tmp_path: Path) -> None:
    folder = store(tmp_path, *(answer(f"p{n}") for n in range(50)))
    labels = {
        "ann": [1] * 25 + [0] * 25,
        "bob": [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15,
        "eve": [1] * 5,
        "zoe": [],
    }
    lines = [
        f"p{number},{QWEN},{name},{label},,,,"
        for name, given_ in labels.items()
        for number, label in enumerate(given_)
    ]
    lines.append(f"p9,{QWEN},zoe,,,low,,")
    table = agreement(load_annotations(write(tmp_path / "all.csv", *lines), folder))
    assert table.rows() == [
        ("ann", "bob", 50, 0.7, pytest.approx(0.4)),
        ("ann", "eve", 5, 1.0, None),
        ("ann", "zoe", 0, None, None),
        ("bob", "eve", 5, 1.0, None),
        ("bob", "zoe", 0, None, None),
        ("eve", "zoe", 0, None, None),
    ]
