from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from hallubench.errors import DiskError, StoreError
from hallubench.legacy import Layout, export_json
from hallubench.schema import Row
from hallubench.store import Store
from hallubench.types import Completion, Logprobs, Message, Prompt, Request, SamplingParams, Usage

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
NOW = datetime(2026, 11, 23, 8, 37, 58, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
RUN = "20261123-080000-a1b2c3"
NEXT_RUN = "20261123-083000-d4e5f6"
QWEN = "Qwen/Qwen3-0.6B"
CLAUDE = "claude-3-5-sonnet-20241022"
SCHEMAS = Path(__file__).parent / "schemas"


def schema_of(layout: str) -> Draft202012Validator:
    schemas = [json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")]
    registry = Registry[Any]().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in schemas
    )
    schema = next(schema for schema in schemas if schema["$id"] == f"{layout}.json")
    return Draft202012Validator(schema, registry=registry)


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def some_logprobs(*tops: Sequence[tuple[str, float]]) -> Logprobs:
    """Of an answer with these alternatives at each of its tokens, best first."""
    flat = [alternative for top in tops for alternative in top]
    offsets = array("i", [0])
    for top in tops:
        offsets.append(offsets[-1] + len(top))
    return Logprobs(
        token_ids=array("i", range(len(tops))),
        tokens=[top[0][0] if top else "x" for top in tops],
        logprobs=array("f", [top[0][1] if top else -1.0 for top in tops]),
        ranks=array("i", [1] * len(tops)),
        top_offsets=offsets,
        top_token_ids=array("i", range(len(flat))),
        top_tokens=[token for token, _ in flat],
        top_logprobs=array("f", [logprob for _, logprob in flat]),
    )


def a_row(
    index: int = 0,
    *,
    model: str = QWEN,
    provider: str = "vllm",
    temperature: float | None = 0.0,
    sample: int = 0,
    seed: int | None = 42,
    system_prompt: str | None = None,
    stop: tuple[str, ...] = (),
    prompt: str | tuple[Message, ...] = "Does CVE-2021-44228 exist?",
    text: str = "Yes.",
    error: str | None = None,
    logprobs: Logprobs | None = None,
    run_id: str = RUN,
    minutes: float = 0.0,
) -> Row:
    messages = prompt if isinstance(prompt, tuple) else None
    asked = (index, model, temperature, sample, seed, system_prompt, stop)
    request = Request(
        request_id=hashlib.blake2b(repr(asked).encode(), digest_size=10).hexdigest(),
        prompt=Prompt(
            id=f"prompt_{index:04d}",
            index=index,
            text=None if messages else str(prompt),
            messages=messages,
            category="cve_existence",
            is_synthetic_probe=False,
        ),
        sample_index=sample,
        provider=provider,
        model=model,
        system_prompt=system_prompt,
        params=SamplingParams(
            max_tokens=2048,
            temperature=temperature,
            seed=None if seed is None else seed + sample,
            stop=stop,
        ),
    )
    completion = Completion(
        request_id=request.request_id,
        timestamp=datetime(2026, 11, 23, 8, 1, 23, 456789, UTC) + timedelta(minutes=minutes),
        elapsed_seconds=2.34,
        text=None if error else text,
        finish_reason="error" if error else "stop",
        usage=Usage() if error else Usage(input_tokens=42, output_tokens=156),
        model_version=None if error else "c1899de2",
        logprobs=logprobs,
        logprobs_mode="raw_logprobs" if logprobs else None,
        error=error,
        error_type="TimeoutError" if error else None,
        retry_count=3 if error else 0,
    )
    return Row(run_id, request, completion, None)


def fill(folder: Path, rows: Iterable[Row], run_id: str = RUN) -> Path:
    with Store(folder, run_id) as store:
        for count, row in enumerate(rows, 1):
            store.append(row)
            if count % 250 == 0:
                store.flush()
    return folder


def write_record(folder: Path, run_id: str, models: list[dict[str, Any]], **facts: Any) -> None:
    config = {"prompts_file": "prompts.json", "models": models}
    record = {
        "run_id": run_id,
        "started_at": "2026-11-23T08:00:00+00:00",
        "ended_at": "2026-11-23T08:30:00Z",
        "config": config,
        "prompts": {"path": "/data/prompts.json", "sha256": "00", "count": 393},
    }
    path = folder / "_runs" / f"{run_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | facts))


def a_mixed_store(folder: Path) -> Path:
    """Two models, two temperatures, a chat prompt, a failure, and answers without log-probabilities."""
    tops = some_logprobs([(" Yes", -0.1), (" No", -2.5)], [(".", -0.25), ("!", -math.inf)])
    chat = (Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "Does it exist?"))
    rows = [a_row(i, temperature=t, logprobs=tops) for i in (2, 0, 1) for t in (0.7, 0.0)]
    rows += [a_row(3, prompt=chat, temperature=t) for t in (0.0, 0.7)]
    claude: dict[str, Any] = {"model": CLAUDE, "provider": "anthropic", "seed": None}
    rows += [a_row(0, temperature=0.0, **claude), a_row(1, error="Failed after 3 retries: 529", **claude)]
    return fill(folder, rows)


def exported(folder: Path, layout: Layout = "runs", **options: Any) -> Any:
    """The content of an export that is one file."""
    (path,) = export_json(folder, layout=layout, now=NOW, **options)
    return strict_json(path)


def results_of(folder: Path, layout: Layout = "runs", **options: Any) -> list[dict[str, Any]]:
    """The results of an export, whatever its files."""
    results: list[dict[str, Any]] = []
    for path in export_json(folder, layout=layout, now=NOW, **options):
        document = strict_json(path)
        results += document["results"] if layout == "flat" else []
        results += [result for run in document.get("runs", ()) for result in run["results"]]
    return results


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_of_every_layout_is_what_the_legacy_format_says(
    tmp_path: Path, layout: Layout, with_record: bool
) -> None:
    folder = a_mixed_store(tmp_path)
    if with_record:
        entries = [{"name": QWEN, "type": "local", "temperature": t} for t in (0.0, 0.7)]
        write_record(folder, RUN, [*entries, {"name": CLAUDE, "type": "claude", "temperature": 0.0}])
    files = export_json(folder, layout=layout, now=NOW)
    for path in files:
        schema_of(layout).validate(strict_json(path))
    assert len(results_of(folder, layout)) == 10


def test_a_schema_refuses_a_field_that_nobody_named(tmp_path: Path) -> None:
    document = exported(fill(tmp_path, [a_row()]))
    document["runs"][0]["results"][0]["surprise"] = 1
    assert not schema_of("runs").is_valid(document)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_is_what_json_dump_with_indent_2_makes(tmp_path: Path, layout: Layout) -> None:
    for path in export_json(a_mixed_store(tmp_path), layout=layout, now=NOW):
        text = path.read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def test_the_default_is_one_combined_file_in_the_store_s_export_folder(tmp_path: Path) -> None:
    files = export_json(a_mixed_store(tmp_path), now=NOW)
    assert files == [tmp_path / "export" / "runs" / "pilot_results_20261123_083758.json"]


def test_runs_are_in_config_order_and_results_in_prompt_order(tmp_path: Path) -> None:
    folder = a_mixed_store(tmp_path)
    models: list[dict[str, Any]] = [
        {"name": CLAUDE, "type": "claude", "temperature": 0.0, "notes": "first"},
        {"name": QWEN, "type": "local", "temperature": 0.7, "notes": "second"},
        {"name": "nobody/asked", "type": "local", "temperature": 0.0},
        {"name": QWEN, "type": "local", "temperature": 0.0, "notes": "third"},
    ]
    write_record(folder, RUN, models)
    runs = exported(folder)["runs"]
    assert [run["model_config"] for run in runs] == [models[0], models[1], models[3]]
    assert [[result["prompt_id"][-1] for result in run["results"]] for run in runs] == [
        ["0", "1"],
        ["0", "1", "2", "3"],
        ["0", "1", "2", "3"],
    ]
    assert [{result["sampling_params"]["temperature"] for result in run["results"]} for run in runs] == [
        {0.0},
        {0.7},
        {0.0},
    ]


def test_a_run_ends_with_its_last_answer(tmp_path: Path) -> None:
    (run,) = exported(fill(tmp_path, [a_row(0, minutes=5), a_row(1)]))["runs"]
    assert run["completed_at"] == "2026-11-23T08:06:23.456789"


def test_the_entry_comes_from_the_newest_record_that_has_it(tmp_path: Path) -> None:
    folder = fill(tmp_path, [a_row(temperature=0.0), a_row(temperature=0.7)])
    old, new = ({"name": QWEN, "type": "local", "notes": notes} for notes in ("old", "new"))
    write_record(folder, RUN, [old | {"temperature": 0.7}, old | {"temperature": 0.0}])
    write_record(folder, NEXT_RUN, [new | {"temperature": 0.0}])
    runs = exported(folder)["runs"]
    assert [(run["model_config"]["notes"], run["model_config"]["temperature"]) for run in runs] == [
        ("new", 0.0),
        ("old", 0.7),
    ]


def test_entries_that_differ_in_anything_are_runs_of_their_own(tmp_path: Path) -> None:
    folder = fill(
        tmp_path,
        [
            a_row(system_prompt="Be brief.", text="a"),
            a_row(stop=("\n",), text="b"),
            a_row(seed=7, text="c"),
            a_row(text="d"),
        ],
    )
    entry = {"name": QWEN, "type": "local", "temperature": 0.0}
    differences: list[dict[str, Any]] = [
        {"system_prompt": "Be brief."},
        {"stop": ["\n"]},
        {"seed": 7},
        {"notes": "plain"},
    ]
    write_record(folder, RUN, [entry | difference for difference in differences])
    runs = exported(folder)["runs"]
    assert [run["model_config"] for run in runs] == [entry | difference for difference in differences]
    assert [[result["full_response"] for result in run["results"]] for run in runs] == [
        ["a"],
        ["b"],
        ["c"],
        ["d"],
    ]


@pytest.mark.parametrize(
    "broken", [None, "{", "[]", '{"config": 1}', '{"config": {"models": [1, {}]}}', "\xff"]
)
def test_without_a_usable_record_the_entries_are_made_from_the_rows(
    tmp_path: Path, broken: str | None
) -> None:
    folder = a_mixed_store(tmp_path)
    if broken is not None:
        (folder / "_runs" / f"{RUN}.json").write_text(broken, encoding="latin-1")
    runs = exported(folder)["runs"]
    assert [(c["name"], c["type"], c["temperature"]) for c in (run["model_config"] for run in runs)] == [
        (QWEN, "local", 0.0),
        (QWEN, "local", 0.7),
        (CLAUDE, "claude", 0.0),
    ]


def test_the_metadata_spans_all_runs(tmp_path: Path) -> None:
    folder = fill(tmp_path, [a_row(0)])
    fill(tmp_path, [a_row(1, run_id=NEXT_RUN, minutes=40)], NEXT_RUN)
    write_record(folder, RUN, [{"name": QWEN, "type": "local"}])
    write_record(folder, NEXT_RUN, [{"name": QWEN, "type": "local"}], ended_at=None)
    metadata = exported(folder)["metadata"]
    assert metadata["start_time"] == "2026-11-23T08:00:00.000000"
    assert metadata["end_time"] == "2026-11-23T08:41:23.456789"
    assert (metadata["total_prompts"], metadata["prompts_file"]) == (393, "prompts.json")
    assert metadata["resumed"] is True
    assert metadata["exporter"]["run_ids"] == [RUN, NEXT_RUN]


def test_without_a_record_the_metadata_comes_from_the_rows(tmp_path: Path) -> None:
    metadata = exported(a_mixed_store(tmp_path))["metadata"]
    assert metadata["start_time"] == "2026-11-23T08:01:21.116789"
    assert (metadata["total_prompts"], metadata["prompts_file"]) == (4, None)
    assert metadata["resumed"] is False


def test_a_failed_row_has_its_error_and_nothing_that_looks_like_an_answer(tmp_path: Path) -> None:
    failed, answered = results_of(fill(tmp_path, [a_row(0, error="Failed after 3 retries: 529"), a_row(1)]))
    assert failed["full_response"] == ""
    assert failed["tokens_used"] == {}
    assert (failed["error"], failed["retry_count"]) == ("Failed after 3 retries: 529", 3)
    assert failed["model_version"] == QWEN
    assert answered["tokens_used"] == {"input": 42, "output": 156, "total": 198}
    assert "error" not in answered


def test_times_are_written_as_the_legacy_script_wrote_them(tmp_path: Path) -> None:
    (result,) = results_of(fill(tmp_path, [a_row()]))
    assert result["timestamp"] == "2026-11-23T08:01:23.456789"
    assert result["elapsed_seconds"] == 2.34


def test_a_parameter_that_was_not_sent_has_no_made_up_value(tmp_path: Path) -> None:
    (result,) = results_of(fill(tmp_path, [a_row(temperature=None, seed=None)]))
    assert result["sampling_params"] == {"seed": None, "max_tokens": 2048}


@pytest.mark.parametrize(("tokens", "written"), [(50, 50), (None, 60), (3, 3), (1_000, 60)])
def test_log_probabilities_of_the_first_tokens_or_of_all_are_written(
    tmp_path: Path, tokens: int | None, written: int
) -> None:
    answer = some_logprobs(*([(f"token {i}", -i / 8), ("other", -9.0)] for i in range(60)))
    (result,) = results_of(fill(tmp_path, [a_row(logprobs=answer)]), logprob_tokens=tokens)
    assert result["token_logprobs"] == [
        {"token_position": i, "top_tokens": [f"token {i}", "other"], "top_logprobs": [-i / 8, -9.0]}
        for i in range(written)
    ]


def test_answers_of_different_lengths_keep_their_own_log_probabilities(tmp_path: Path) -> None:
    answers = [some_logprobs(*([(f"{i}.{n}", -1.0)] for n in range(i % 4))) for i in range(40)]
    rows = [a_row(i, logprobs=answer) for i, answer in enumerate(answers)]
    for i, result in enumerate(results_of(fill(tmp_path, rows))):
        tokens = [position["top_tokens"] for position in result["token_logprobs"] or ()]
        assert tokens == [[f"{i}.{n}"] for n in range(i % 4)]


def test_an_answer_without_tokens_or_without_log_probabilities_has_null(tmp_path: Path) -> None:
    results = results_of(fill(tmp_path, [a_row(0, logprobs=some_logprobs()), a_row(1)]))
    assert [result["token_logprobs"] for result in results] == [None, None]


def test_log_probabilities_are_short_and_exact_and_infinite_ones_are_null(tmp_path: Path) -> None:
    top = [("a", -0.123), ("b", -1e-10), ("c", -math.inf), ("d", math.nan)]
    folder = fill(tmp_path, [a_row(logprobs=some_logprobs(top, []))])
    (path,) = export_json(folder, now=NOW)
    (result,) = results_of(folder)
    assert result["token_logprobs"][0]["top_logprobs"] == [-0.123, -1e-10, None, None]
    assert result["token_logprobs"][1] == {"token_position": 1, "top_tokens": [], "top_logprobs": []}
    assert "-0.123,\n" in path.read_text()


HOSTILE_TEXTS = [
    "".join(map(chr, range(0x250))),
    '"}, {"prompt_id": "x',
    "\u2028\u2029\ufeff\u202e\U0001f600",
    "\x1b[31mred\x1b[0m [bold]markup[/bold]",
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_any_text_comes_out_as_it_went_in(tmp_path: Path, text: str) -> None:
    row = a_row(text=text, prompt=text, model=text, logprobs=some_logprobs([(text, -1.0)]))
    (result,) = results_of(fill(tmp_path, [row]), "flat")
    assert result["full_response"] == result["prompt"] == result["model"] == text
    assert result["token_logprobs"][0]["top_tokens"] == [text]


def test_half_a_surrogate_pair_does_not_stop_the_export(tmp_path: Path) -> None:
    folder = fill(tmp_path, [a_row(text="half \ud83d of it", model="m\udc00")])
    write_record(folder, RUN, [{"name": "m\udc00", "type": "local", "notes": "\ud83d", "x": float("inf")}])
    (result,) = results_of(folder)
    assert result["full_response"] == "half \ufffd of it"


def test_each_model_has_a_file_of_its_own(tmp_path: Path) -> None:
    files = export_json(a_mixed_store(tmp_path), layout="per-model", now=NOW)
    assert [path.name for path in files] == [
        "pilot_Qwen_Qwen3-0_6B_20261123_083758.json",
        "pilot_claude-3-5-sonnet-20241022_20261123_083758.json",
    ]
    qwen, claude = map(strict_json, files)
    assert [run["model_config"]["temperature"] for run in qwen["runs"]] == [0.0, 0.7]
    assert {result["model"] for run in claude["runs"] for result in run["results"]} == {CLAUDE}


def test_models_with_one_file_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    models = ["a/b", "a_b", "A:B", "a_b-2"]
    files = export_json(fill(tmp_path, [a_row(model=m) for m in models]), layout="per-model", now=NOW)
    assert len({path.name.casefold() for path in files}) == 4
    assert sorted(strict_json(path)["runs"][0]["model_config"]["name"] for path in files) == sorted(models)


@pytest.mark.parametrize(
    "model", ["../../x", "/etc/passwd", "a\\b", "n" * 300, "é" * 300, "a\nb\0c", ".", "results"]
)
def test_no_model_name_leads_out_of_the_folder(tmp_path: Path, model: str) -> None:
    folder = fill(tmp_path / "store", [a_row(model=model)])
    (path,) = export_json(folder, output=tmp_path / "out", layout="per-model", now=NOW)
    assert [*(tmp_path / "out").iterdir()] == [path]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "store"]
    assert strict_json(path)["runs"][0]["results"][0]["model"] == model


def test_flat_results_have_the_prompt_and_of_a_chat_its_last_user_turn(tmp_path: Path) -> None:
    chat = (
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi."),
        Message("user", "Does it exist?"),
        Message("assistant", "Well,"),
    )
    folder = fill(tmp_path, [a_row(0, prompt="A plain one?"), a_row(1, prompt=chat)])
    assert [result["prompt"] for result in exported(folder, "flat")["results"]] == [
        "A plain one?",
        "Does it exist?",
    ]


def as_the_annotation_tools_read(folder: Path) -> list[dict[str, Any]]:
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("pilot_*.json")]
    return [result for document in documents for result in document.get("results", ())]


def test_one_answer_to_each_prompt_is_one_flat_file(tmp_path: Path) -> None:
    rows = [a_row(i, model=model, temperature=t) for i in (1, 0) for model, t in (("b", 0.0), ("a", 0.7))]
    files = export_json(fill(tmp_path, rows), output=tmp_path / "out", layout="flat", now=NOW)
    assert files == [tmp_path / "out" / "pilot_results_20261123_083758.json"]
    read = as_the_annotation_tools_read(tmp_path / "out")
    assert [(result["model"], result["prompt_id"][-1]) for result in read] == [
        ("a", "0"),
        ("a", "1"),
        ("b", "0"),
        ("b", "1"),
    ]


def test_no_flat_folder_has_two_answers_of_a_model_to_a_prompt(tmp_path: Path) -> None:
    rows = [a_row(i, temperature=t, sample=s) for i in (0, 1) for t in (0.0, 0.7) for s in (0, 1)]
    rows += [a_row(i, system_prompt="Be brief.") for i in (0, 1)]
    rows += [a_row(i, model="other/model", temperature=None) for i in (0, 1)]
    out = tmp_path / "out"
    files = export_json(fill(tmp_path / "store", rows), output=out, layout="flat", now=NOW)
    assert sorted(path.parent.name for path in files) == [
        "temperature-0.0-sample-0",
        "temperature-0.0-sample-0-2",
        "temperature-0.0-sample-1",
        "temperature-0.7-sample-0",
        "temperature-0.7-sample-1",
        "temperature-default-sample-0",
    ]
    request_ids = []
    for folder in out.iterdir():
        read = as_the_annotation_tools_read(folder)
        assert max(Counter((result["prompt_id"], result["model"]) for result in read).values()) == 1
        request_ids += [result["request_id"] for result in read]
    assert sorted(request_ids) == sorted(row.request.request_id for row in rows)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_a_second_export_takes_the_place_of_the_first(tmp_path: Path, first: Layout, second: Layout) -> None:
    folder, out = a_mixed_store(tmp_path / "store"), tmp_path / "out"
    export_json(folder, output=out, layout=first, now=NOW)
    fill(folder, [a_row(9, run_id=NEXT_RUN)], NEXT_RUN)
    files = export_json(folder, output=out, layout=second, now=LATER)
    assert sorted(out.rglob("pilot_*.json")) == sorted(files)
    assert len(results_of(folder, second, output=out)) == 11


def test_an_export_takes_the_place_of_one_whose_rows_were_all_replaced(tmp_path: Path) -> None:
    folder = fill(tmp_path, [a_row(error="Failed after 3 retries: 529")])
    write_record(folder, RUN, [{"name": QWEN, "type": "local", "temperature": 0.0}])
    export_json(folder, now=NOW)
    fill(folder, [a_row(run_id=NEXT_RUN, minutes=9)], NEXT_RUN)
    files = export_json(folder, now=LATER)
    assert [*folder.rglob("pilot_*.json")] == files


def test_layouts_do_not_replace_each_other_in_the_store_s_export_folder(tmp_path: Path) -> None:
    folder = a_mixed_store(tmp_path)
    files = [path for layout in LAYOUTS for path in export_json(folder, layout=layout, now=NOW)]
    assert sorted(folder.rglob("pilot_*.json")) == sorted(files)


def test_files_that_are_not_of_this_store_stay_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = fill(tmp_path / "other", [a_row(run_id=NEXT_RUN)], NEXT_RUN)
    (of_another_store,) = export_json(other, output=out, now=NOW)
    strangers = {
        "pilot_results_20251112_100123.json": '{"metadata": {}, "runs": []}',
        "pilot_notes.json": '{\n  "metadata": {\n    "exporter": {"program": "else", "run_ids": ["RUN"]}}}',
        "pilot_half.json": '{\n  "metadata": {\n    "exporter": {"program": "hallu',
        "pilot_odd.json": '{\n  "metadata": {\n    "exporter": ["hallubench"]}}',
    }
    for name, text in strangers.items():
        (out / name).write_text(text.replace("RUN", RUN))
    (out / "pilot_binary.json").write_bytes(b"\xff\xfe\x00")
    before = {path: path.read_bytes() for path in out.iterdir()}
    (file,) = export_json(fill(tmp_path / "store", [a_row()]), output=out, now=NOW)
    assert file not in before
    assert {path: path.read_bytes() for path in out.iterdir() if path != file} == before
    assert of_another_store in before


def test_a_full_disk_leaves_the_earlier_export_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_mixed_store(tmp_path)
    earlier = export_json(folder, layout="per-model", now=NOW)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DiskError, match=r"export/per-model: cannot be written: No space left on device; make room"
    ):
        export_json(folder, layout="per-model", now=LATER)
    assert sorted((folder / "export" / "per-model").iterdir()) == sorted(earlier)


def test_what_a_killed_export_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = a_mixed_store(tmp_path)
    files = export_json(folder, layout="flat", now=NOW)
    remains = files[0].with_name(f".writing-{files[0].name}")
    remains.write_text("{")
    assert remains not in remains.parent.glob("pilot_*.json")
    export_json(folder, layout="flat", now=LATER)
    assert not remains.exists()


def test_two_exports_do_not_write_into_one_folder_at_once(tmp_path: Path) -> None:
    folder, out = fill(tmp_path / "store", [a_row()]), tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="another export is writing there"):
        export_json(folder, output=out, now=NOW)
    os.close(descriptor)
    assert export_json(folder, output=out, now=NOW)


def test_a_store_without_answers_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        export_json(tmp_path / "missing", now=NOW)
    folder = fill(tmp_path / "store", [])
    with pytest.raises(StoreError, match="holds no answers yet; run `hallubench generate`"):
        export_json(folder, output=tmp_path / "out", now=NOW)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match=r"out: cannot be written: File exists; choose another --output"):
        export_json(fill(tmp_path / "store", [a_row()]), output=tmp_path / "out", now=NOW)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_secret_of_a_record_is_exported(tmp_path: Path, layout: Layout) -> None:
    folder = fill(tmp_path, [a_row()])
    secrets = {
        "api_key": "sk-1",
        "API_KEY": "sk-2",
        "hf_token": "sk-3",
        "options": {"headers": {"Authorization": "sk-4"}},
    }
    write_record(
        folder, RUN, [{"name": QWEN, "type": "local", "temperature": 0.0, "max_tokens": 2048} | secrets]
    )
    for path in export_json(folder, layout=layout, now=NOW):
        text = path.read_text()
        assert "sk-" not in text
        assert '"max_tokens": 2048' in text


PEAK = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
import hallubench.rows
from hallubench.legacy import export_json
hallubench.rows.CACHED_BYTES = 0  # bounded, but stores as small as these would still be filling it
(file,) = export_json(Path(sys.argv[1]), logprob_tokens=None, now=datetime.now(UTC))
print(file.stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    def export_of(count: int) -> tuple[int, int]:
        rows = (a_row(i, text="x" * 40_000, logprobs=some_logprobs([("x", -1.0)])) for i in range(count))
        folder = fill(tmp_path / str(count), rows)
        output = subprocess.check_output([sys.executable, "-c", PEAK, str(folder)], text=True)
        size, peak = map(int, output.split())
        return size, peak

    (small, peak_of_small), (large, peak_of_large) = export_of(2_000), export_of(8_000)
    assert large - small > 100e6
    assert peak_of_large - peak_of_small < (large - small) / 2
