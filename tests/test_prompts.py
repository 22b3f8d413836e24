"""Prompt files of every format, good and bad."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hallubench.errors import PromptError
from hallubench.prompts import PromptFile
from hallubench.types import Message, Prompt

REAL_BENCHMARK = Path(__file__).parents[2] / "shared" / "data" / "hallu-sec-benchmark.json"
EXTENSIONS = [".json", ".jsonl", ".csv", ".parquet"]
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
ENTRIES: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": "Does it exist?\nSay yes or no, please.",
        "category": "cve_existence",
        "is_synthetic_probe": True,
        "gold_label": {"exists": None, "description": "no such thing"},
        "gold_refs": ["CVE-1", "CVE-2"],
        "original_id": "old-7",
        "language": "fr",
    },
    {"id": "b", "messages": TURNS, "is_synthetic_probe": False, "gold_label": "bare text"},
    {"id": "ç", "prompt": "日本語 🙂"},
]


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    """The entries in the format of the path's extension."""
    match path.suffix:
        case ".json":
            path.write_text(json.dumps({"metadata": {}, "prompts": entries}, indent=1))
        case ".jsonl":
            path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        case ".csv":
            columns = list(dict.fromkeys(column for entry in entries for column in entry))
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, columns)
                table.writeheader()
                for entry in entries:
                    table.writerow({key: cell(value) for key, value in entry.items()})
        case ".parquet":
            columns = list(dict.fromkeys(column for entry in entries for column in entry))
            typed = {"gold_label": [cell(entry.get("gold_label")) for entry in entries]}
            pq.write_table(
                pa.table({c: typed.get(c, [entry.get(c) for entry in entries]) for c in columns}), path
            )
    return path


def cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def read(path: Path, limit: int | None = None) -> list[Prompt]:
    return list(PromptFile(path, limit))


def problem(path: Path) -> str:
    """The message that refuses the file, without the path it begins with."""
    with pytest.raises(PromptError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def line_problem(tmp_path: Path) -> Callable[[str], str]:
    def of(line: str) -> str:
        path = tmp_path / "p.jsonl"
        path.write_text('{"id": "first", "prompt": "ok"}\n' + line)
        return problem(path)

    return of


# What comes out


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_format_gives_the_same_prompts(tmp_path: Path, extension: str) -> None:
    first, second, third = read(write(tmp_path / f"p{extension}", ENTRIES))
    assert first == Prompt(
        id="a",
        index=0,
        text="Does it exist?\nSay yes or no, please.",
        category="cve_existence",
        is_synthetic_probe=True,
        gold_label={"exists": None, "description": "no such thing"},
        gold_refs=("CVE-1", "CVE-2"),
        original_id="old-7",
        extra={"language": "fr"},
    )
    messages = (Message("system", "Be brief."), Message("user", "Hi?"))
    assert second == Prompt(
        id="b", index=1, messages=messages, is_synthetic_probe=False, gold_label="bare text"
    )
    assert third == Prompt(id="ç", index=2, text="日本語 🙂")


def test_a_bare_list_is_a_prompts_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(ENTRIES))
    assert [prompt.id for prompt in read(path)] == ["a", "b", "ç"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_limit_takes_the_first_and_leaves_the_rest_unread(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"p{extension}", [*ENTRIES[:2], {"id": "bad", "prompt": " "}])
    assert [prompt.id for prompt in read(path, limit=2)] == ["a", "b"]
    assert "is empty" in problem(path)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_file_is_iterated_again_and_by_several_threads_at_once(tmp_path: Path, extension: str) -> None:
    prompts = PromptFile(write(tmp_path / f"p{extension}", ENTRIES))
    half_way = iter(prompts)
    next(half_way)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(list[Prompt], prompts) for _ in range(2)]
    assert [one.result() for one in both] == [list(prompts)] * 2
    assert [prompt.id for prompt in half_way] == ["b", "ç"]


@pytest.mark.parametrize("extension", [".jsonl", ".csv", ".parquet"])
def test_formats_that_allow_it_are_streamed(tmp_path: Path, extension: str) -> None:
    noise = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(3000)]
    path = write(tmp_path / f"p{extension}", [{"id": text, "prompt": text} for text in noise])
    if extension == ".parquet":
        pq.write_table(pq.read_table(path), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 9000] = b"\xff" * 9000
    path.write_bytes(content)
    assert [prompt.id for prompt in islice(PromptFile(path), 2)] == noise[:2]
    with pytest.raises(PromptError):
        read(path)


def test_the_aliases_of_exported_results_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", [{"prompt_id": "x", "prompt": "?", "prompt_category": "c", "model": "m"}]
    )
    assert read(path) == [Prompt(id="x", index=0, text="?", category="c", extra={"model": "m"})]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_integer_id_is_its_decimal_text(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"p{extension}", [{"id": 7, "prompt": "?", "original_id": 70, "category": 2}])
    assert read(path) == [Prompt(id="7", index=0, text="?", original_id="70", category="2")]


def test_extra_fields_of_json_keep_value_and_order(tmp_path: Path) -> None:
    extra = {"z": None, "a": [1, 2.5, {"deep": ["ü", True]}], "": "", "big": 10**40}
    path = write(tmp_path / "p.jsonl", [{"id": "x", "prompt": "?", **extra}])
    (prompt,) = read(path)
    assert list(prompt.extra.items()) == list(extra.items())


def test_a_null_field_is_an_absent_field(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"id": "x", "prompt": "?", "messages": None, "gold_refs": None}])
    assert read(path) == [Prompt(id="x", index=0, text="?")]


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"p{extension}", [{"id": "x", "prompt": "?"}, {"id": "y", "prompt": "!"}])
    text = path.read_bytes().replace(b"\r\n", b"\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert [(prompt.id, prompt.text) for prompt in read(path)] == [("x", "?"), ("y", "!")]


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"id": "x", "prompt": "?"}\n \n{"id": "y"}\n')
    assert problem(path).startswith("line 4: ")


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"id": "x", "prompt": "a\u2028b\x85c"}\n'.encode())
    assert read(path)[0].text == "a\u2028b\x85c"


@pytest.mark.parametrize("extension", [".jsonl", ".csv"])
def test_a_prompt_of_50_megabytes_is_read(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"p{extension}", [{"id": "x", "prompt": "long, " * 8_500_000}])
    assert len(read(path)[0].text or "") == 51_000_000


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("TRUE", True), ("1", True), ("False", False), ("0", False), ("", None)],
)
def test_a_csv_flag_is_a_word_a_digit_or_empty(tmp_path: Path, text: str, value: bool | None) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"id,prompt,is_synthetic_probe\nx,?,{text}\n")
    assert read(path)[0].is_synthetic_probe is value


def test_parquet_keeps_numbers_and_nested_values_and_turns_times_into_text(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = {
        "id": ["x"],
        "prompt": ["?"],
        "is_synthetic_probe": [1],
        "gold_label": [{"exists": True, "description": None}],
        "score": [0.25],
        "nested": [{"list": [1, None], "text": "t"}],
        "asked": [datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)],
        "nanoseconds": pa.array([1], pa.timestamp("ns")),
        "price": [Decimal("1.20")],
        "bytes": [b"plain"],
        "absent": pa.nulls(1),
    }
    pq.write_table(pa.table(table), path)
    (prompt,) = read(path)
    assert prompt.is_synthetic_probe is True
    assert prompt.gold_label == {"exists": True, "description": None}
    assert prompt.extra == {
        "score": 0.25,
        "nested": {"list": [1, None], "text": "t"},
        "asked": "2026-01-02 03:04:05.000000Z",
        "nanoseconds": "1970-01-01 00:00:00.000000001",
        "price": "1.20",
        "bytes": "plain",
    }


def test_facts_name_the_file_by_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ENTRIES)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert PromptFile(path, limit=1).facts() == {"path": str(path), "sha256": digest}


@pytest.mark.skipif(not REAL_BENCHMARK.exists(), reason="the shared benchmark is not here")
def test_the_benchmark_of_the_first_users_loads() -> None:
    prompts = read(REAL_BENCHMARK)
    assert len(prompts) == 393
    assert sum(prompt.is_synthetic_probe is True for prompt in prompts) == 143
    assert all(prompt.gold_label and prompt.original_id and not prompt.extra for prompt in prompts)


# What is refused: the place, the key and the fix


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "?"}', 'no "id" among "prompt": give the prompt one'),
        ('{"id": null, "prompt": "?"}', 'no "id" among'),
        ('{"id": "", "prompt": "?"}', '"id" is empty: write text'),
        ('{"id": 1.5, "prompt": "?"}', '"id" is 1.5: write text'),
        ('{"id": true, "prompt": "?"}', '"id" is true: write text'),
        ('{"id": "a\\u0000b", "prompt": "?"}', '"id" holds a NUL character: remove it'),
        ('{"id": "x"}', 'neither "prompt" nor "messages" among "id": write one'),
        ('{"id": "x", "prompt": ""}', '"prompt" is empty: write text'),
        ('{"id": "x", "prompt": " \\n\\u00a0"}', '"prompt" is empty: write text'),
        ('{"id": "x", "prompt": 5}', '"prompt" is 5: write text'),
        ('{"id": "x", "prompt": ["?"]}', '"prompt" is a list: write text'),
        ('{"id": "x", "prompt": "a\\u0000"}', '"prompt" holds a NUL character: remove it'),
        ('{"id": "x", "prompt": "a\\ud800"}', "half a surrogate pair in"),
        ('{"id": "x", "prompt": "?", "note": ["\\udc00"]}', "half a surrogate pair in"),
        ('{"id": "x", "prompt": "?", "messages": []}', 'has both "prompt" and "messages": keep one'),
        ('{"id": "x", "prompt": "?", "prompt_id": "y"}', 'has both "id" and "prompt_id"'),
        ('{"id": "x", "prompt": "?", "category": ["c"]}', '"category" is a list: write text'),
        (
            '{"id": "x", "prompt": "?", "is_synthetic_probe": "yes"}',
            '"is_synthetic_probe" is "yes": write true',
        ),
        (
            '{"id": "x", "prompt": "?", "is_synthetic_probe": 1}',
            '"is_synthetic_probe" is 1: write true or false',
        ),
        ('{"id": "x", "prompt": "?", "gold_refs": "CVE-1"}', '"gold_refs" is not a list of texts: write one'),
        ('{"id": "x", "prompt": "?", "gold_refs": [1]}', '"gold_refs" is not a list of texts: write one'),
        ('{"id": "x", "prompt": "?", "score": NaN}', 'the number "NaN" is out of range: write null'),
        ('{"id": "x", "prompt": "?", "score": -Infinity}', 'the number "-Infinity" is out of range'),
        ('{"id": "x", "prompt": "?", "score": 1e999}', 'the number "1e999" is out of range'),
        ('{"id": "x", "prompt": "?", "score": ' + "9" * 5000 + "}", "too many digits: write it as text"),
        ('{"id": "x", "prompt": "?", "prompt": "!"}', 'the key "prompt" comes twice in one object: keep one'),
        ('{"id": "x", "prompt": "?", "a": {"b": 1, "b": 1}}', 'the key "b" comes twice'),
        ('{"id": "x", "prompt": "?", "a": ' + "[" * 600 + "]" * 600 + "}", "nested deeper than 500 levels"),
        ("[" * 100_000, "nested deeper than 500 levels: flatten it"),
        ('{"id": "x", "prompt": "?",}', "malformed JSON at column 27 ("),
        ('{"id": "x", "prompt": "a\tb"}', "malformed JSON at column 25 (Invalid control character"),
        ('{"id": "x"} {"id": "y"}', "an object on each line makes a .jsonl file"),
        ('["x"]', 'the entry is a list: write an object such as {"id"'),
        ("null", "the entry is missing: write an object"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place_and_the_fix(
    line_problem: Callable[[str], str], line: str, message: str
) -> None:
    found = line_problem(line)
    assert found.startswith("line 2: ")
    assert message in found


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi?", '"messages" is "Hi?": write a list such as'),
        ([], '"messages" is an empty list: write a list such as'),
        (["Hi?"], 'messages[0] is "Hi?": write an object such as'),
        ([{"role": "user"}], "messages[0].content is missing: write text"),
        ([{"role": "user", "content": " "}], "messages[0].content is empty: write text"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "messages[0].content is a list: write text"),
        ([{"content": "Hi?"}], "messages[0].role is missing: write system, user or assistant"),
        ([{"role": "tool", "content": "Hi?"}], 'messages[0].role is "tool": write system, user or assistant'),
        ([{"role": ["user"], "content": "Hi?"}], "messages[0].role is a list: write system"),
        (
            [*TURNS, {"role": "assistant", "content": "Hi."}],
            "ends with the role assistant: the last one must be",
        ),
        ([TURNS[0]], "ends with the role system: the last one must be the user's"),
        ([*TURNS, *TURNS], "messages[2] is a system message: only the first can be one"),
        ([{**TURNS[1], "name": "Bob"}], 'messages[0] has the key "name": only role and content'),
    ],
)
def test_wrong_messages_are_refused(line_problem: Callable[[str], str], messages: Any, message: str) -> None:
    assert message in line_problem(json.dumps({"id": "x", "messages": messages}))


@pytest.mark.parametrize(
    ("extension", "first", "second"),
    [
        (".json", "entry 1", "entry 3"),
        (".jsonl", "line 1", "line 3"),
        (".csv", "line 2", "line 5"),
        (".parquet", "row 1", "row 3"),
    ],
)
def test_a_duplicate_id_is_refused_with_both_places(
    tmp_path: Path, extension: str, first: str, second: str
) -> None:
    entries = [
        {"id": i, "prompt": text} for i, text in [("x", "1"), ("y", "2\nlines"), ("x", "3"), ("y", "4")]
    ]
    found = problem(write(tmp_path / f"p{extension}", entries))
    assert found == f'{second}: the id "x" is also that of {first}: give each prompt its own'


def test_different_ids_with_the_same_hash_are_not_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hallubench.prompts.hash", lambda _: 42, raising=False)
    path = write(tmp_path / "p.jsonl", ENTRIES)
    assert len(read(path)) == 3
    write(path, [*ENTRIES, ENTRIES[1]])
    assert problem(path).startswith('line 4: the id "b" is also that of line 2')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,prompt\nx,?,!\n", "line 2: 3 cells under 2 columns: quote the cells that hold commas"),
        ("id,prompt\nx\n", "line 2: 1 cells under 2 columns"),
        (
            'id,prompt\nx,ok\ny,"never closed\nz,?\n',
            "line 3: malformed CSV (unexpected end of data): check its",
        ),
        ('id,prompt\nx,"a"b\n', "line 2: malformed CSV ("),
        (
            "id;prompt\nx;?\n",
            'needs the columns "id" and "prompt" (or "messages"), found "id;prompt": add them',
        ),
        ("id,prompt,id\nx,?,x\n", 'two columns are named "id": rename one'),
        (",id,prompt\n0,x,?\n", "column 1 has no name: name it, or leave it out"),
        ("id,prompt\n,?\n", 'line 2: no "id" among "prompt"'),
        ("id,prompt\n", "holds no prompts: add some"),
        ("", "holds no prompts: add some"),
        ('id,messages\nx,"[{]"\n', 'line 2: "messages": malformed JSON at column 3 ('),
        ("id,prompt,gold_refs\nx,?,CVE-1\n", 'line 2: "gold_refs": malformed JSON at column 1 ('),
        ('id,prompt,gold_label\nx,?,"{""exists"": yes}"\n', 'line 2: "gold_label": malformed JSON at column'),
        (
            "id,prompt,is_synthetic_probe\nx,?,maybe\n",
            'line 2: "is_synthetic_probe" is "maybe": write true or',
        ),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    assert problem(path).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompts": [\n  {"id": "x" "prompt": "?"}]}',
            "malformed JSON at line 2, column 14 (Expecting ','",
        ),
        (
            '{"id": "x"}\n{"id": "y"}\n',
            "malformed JSON at line 2, column 1 (Extra data): an object on each line",
        ),
        (
            '{"runs": [], "metadata": {}}',
            'no list of prompts but the keys "runs", "metadata": write {"prompts"',
        ),
        ('{"prompts": {"id": "x"}}', "no list of prompts but"),
        ('"text"', 'no list of prompts but "text": write'),
        ('{"prompts": []}', "holds no prompts: add some"),
        ("", "malformed JSON at column 1 (Expecting value)"),
        ('[{"id": "x", "prompt": "?"}, 3]', "entry 2: the entry is 3: write an object"),
        ('[{"id": "x", "prompt": "\\ud83d"}]', "entry 1: half a surrogate pair in"),
    ],
)
def test_a_wrong_json_document_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    assert problem(path).startswith(message)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["?"]}, 'needs the columns "id" and "prompt"'),
        ({"id": ["x", None], "prompt": ["?", "!"]}, 'row 2: no "id" among "prompt"'),
        (
            {"id": ["x"], "prompt": ["?"], "n": [float("nan")]},
            'row 1: "n" holds nan, which JSON cannot: write',
        ),
        ({"id": ["x"], "prompt": ["?"], "n": [[{"t": datetime(2026, 1, 1)}]]}, 'row 1: "n" holds 2026-01-01'),
        ({"id": ["x"], "prompt": ["?"], "n": [b"\xff"]}, "not readable as Parquet after row 0 ("),
        ({"id": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}, "holds no prompts"),
    ],
)
def test_a_wrong_parquet_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    assert problem(path).startswith(message)


def test_text_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    path.write_text('{"id": "x"}')
    assert problem(path).startswith("not readable as Parquet after row 0 (")


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"p{extension}"
    path.write_bytes(b"id,prompt\n" if extension == ".csv" else b'{"id": "x", "prompt": "?"}\n')
    path.write_bytes(path.read_bytes() + "\u00e9t\u00e9".encode("latin-1"))
    assert problem(path) == "line 2: not UTF-8: save the file as UTF-8"


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", ENTRIES)
    assert problem(tmp_path / "promts.jsonl") == f"no such file: did you mean {tmp_path / 'prompts.jsonl'}?"
    assert problem(tmp_path / "x.csv") == "no such file: check the path"
    assert problem(tmp_path / "no" / "x.csv") == f"no such file: there is no folder {tmp_path / 'no'}"


def test_what_is_no_prompts_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    assert problem(tmp_path / "folder.json") == "is not a file: name the prompts file itself"
    (tmp_path / "p.txt").write_text("?")
    assert problem(tmp_path / "p.txt").startswith("unknown format: the name must end in .json, .jsonl,")
    with pytest.raises(PromptError, match="cannot be read"):
        read(tmp_path / ("x" * 300))


def test_facts_of_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be read"):
        PromptFile(tmp_path / "p.json").facts()


def test_hostile_text_reaches_no_terminal(line_problem: Callable[[str], str]) -> None:
    hostile = "\x1b[2J\u202e" + "x" * 10_000
    found = line_problem(
        json.dumps({"id": "x", "prompt": "?", "category": [1], hostile: 1, "messages": hostile})
    )
    assert found.isprintable()
    found = line_problem(json.dumps({hostile: "x", "prompt": "?"}))
    assert "\\x1b[2J\\u202exxx" in found
    assert len(found) < 400


# Whatever the bytes are


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def assert_prompts_or_one_line(path: Path) -> None:
    message, prompts = "", []
    try:
        prompts = read(path)
    except PromptError as error:
        message = str(error)
    assert message.isprintable()
    assert bool(message) != bool(prompts)
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        json.dumps([prompt.gold_label, prompt.extra], allow_nan=False)
        turns = prompt.messages or [Message("user", prompt.text or "")]
        for text in [prompt.id, *(turn.content for turn in turns)]:
            assert text.strip()
            text.encode()


@settings(max_examples=150, deadline=None)
@given(extension=st.sampled_from(EXTENSIONS), content=st.binary(max_size=300))
def test_any_bytes_give_prompts_or_a_one_line_error(folder: Path, extension: str, content: bytes) -> None:
    path = folder / f"bytes{extension}"
    path.write_bytes(content)
    assert_prompts_or_one_line(path)


@settings(max_examples=300, deadline=None)
@given(
    extension=st.sampled_from(EXTENSIONS),
    place=st.floats(0, 1, exclude_max=True),
    cut=st.integers(0, 4),
    put=st.binary(max_size=4),
)
def test_a_damaged_file_gives_prompts_or_a_one_line_error(
    folder: Path, extension: str, place: float, cut: int, put: bytes
) -> None:
    path = write(folder / f"damaged{extension}", ENTRIES)
    content = path.read_bytes()
    start = int(place * len(content))
    path.write_bytes(content[:start] + put + content[start + cut :])
    assert_prompts_or_one_line(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "id",
    "prompt_id",
    "prompt",
    "messages",
    "category",
    "is_synthetic_probe",
    "gold_label",
    "gold_refs",
]


@settings(max_examples=150, deadline=None)
@given(
    extension=st.sampled_from([".json", ".jsonl", ".csv"]),
    entries=st.lists(
        st.dictionaries(st.sampled_from([*FIELDS, "other"]), JSON_VALUES, max_size=5), max_size=2
    ),
)
def test_any_values_give_prompts_or_a_one_line_error(
    folder: Path, extension: str, entries: list[dict[str, Any]]
) -> None:
    valid = {"id": "x", "prompt": "?"}
    path = write(folder / f"values{extension}", [valid | entry for entry in entries])
    assert_prompts_or_one_line(path)
