from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result

from hallubench.cli import main
from hallubench.config import Config
from hallubench.errors import ResultError, StoreError
from hallubench.import_legacy import import_json
from hallubench.legacy import Layout, export_json
from hallubench.plan import make_plan
from hallubench.prompts import PromptFile
from hallubench.store import Store, answered_ids, scan
from hallubench.verify import verify

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
NOW = datetime(2026, 11, 23, 8, 37, 58, tzinfo=UTC)
CLAUDE = "claude-3-5-sonnet-20241022"
GEMINI = "gemini-1.5-pro"
QWEN = "Qwen/Qwen2.5-14B-Instruct"
KEY = "sk-ant-0123456789"
CONFIG: dict[str, Any] = {
    "prompts_file": "data/prompts.json",
    "output_dir": "results/pilot",
    "seed": 42,
    "requests_per_minute": 50,
    "models": [
        {"name": CLAUDE, "type": "claude", "temperature": 0.0, "api_key": KEY},
        {"name": GEMINI, "type": "gemini", "temperature": 0.7, "notes": "exploratory"},
        {"name": QWEN, "type": "local", "temperature": 0.0, "device": "cuda", "model_path": QWEN},
    ],
}
PROMPTS = [
    {
        "id": f"prompt_{number:04d}",
        "prompt": f"Does CVE-2021-{number} exist?",
        "category": "cve_existence",
        "is_synthetic_probe": False,
        "gold_label": {"exists": True},
        "gold_refs": ["CVE-2021-44228"],
        "original_id": f"cve-{number}",
        "language": "en",
    }
    for number in range(3)
]
TOP = [{"token_position": 0, "top_tokens": [" Yes", " No"], "top_logprobs": [-0.1, None]}]


def a_result(number: int = 0, entry: int = 0, **fields: Any) -> dict[str, Any]:
    """As the legacy script wrote one."""
    asked = CONFIG["models"][entry]
    sent = {"temperature": asked["temperature"], "seed": 42, "max_tokens": 2048}
    if asked["type"] == "local":
        sent = {"temperature": 0.0, "seed": 42, "max_new_tokens": 2048, "do_sample": False}
        fields = {"token_logprobs": TOP} | fields
    result = {
        "prompt_id": f"prompt_{number:04d}",
        "model": asked["name"],
        "model_version": asked["name"],
        "full_response": f"Answer {number}.",
        "tokens_used": {"input": 42, "output": 156, "total": 198},
        "sampling_params": sent,
        "timestamp": f"2025-11-12T10:01:{number:02d}.456789",
        "elapsed_seconds": 2.34,
        "run_id": f"a1b2c3d{entry}",
        "prompt_category": "cve_existence",
        "is_synthetic_probe": False,
        "retry_count": 0,
    }
    return result | fields


def a_failure(number: int = 0, entry: int = 0, **fields: Any) -> dict[str, Any]:
    """As the legacy script wrote one: without what was not known, `sampling_params` among it."""
    error = {"full_response": "", "tokens_used": {}, "error": "Failed after 3 retries: 529", "retry_count": 3}
    result = a_result(number, entry) | error | fields
    return {
        name: value for name, value in result.items() if name not in ("sampling_params", "token_logprobs")
    }


def a_document(**results_of_entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A file of the legacy script, such as `a_document(_0=[...], _2=[...])`."""
    runs = [
        {
            "model_config": CONFIG["models"][int(entry[1:])],
            "results": results,
            "completed_at": "2025-11-12T10:30:00.123456",
        }
        for entry, results in results_of_entries.items()
    ]
    metadata = {
        "start_time": "2025-11-12T10:00:00.000001",
        "config": CONFIG,
        "total_prompts": 3,
        "prompts_file": "data/prompts.json",
        "resumed": False,
        "async_mode": True,
        "end_time": "2025-11-12T10:30:00.654321",
    }
    return {"metadata": metadata, "runs": runs}


def a_whole_document() -> dict[str, Any]:
    return a_document(
        _0=[a_result(1), a_result(0), a_failure(2)],
        _1=[a_result(n, 1) for n in range(3)],
        _2=[a_result(n, 2) for n in range(3)],
    )


def write(folder: Path, content: Any, name: str = "pilot_results_20251112_103000.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return path


def prompts_file(folder: Path, prompts: Sequence[dict[str, Any]] = PROMPTS) -> Path:
    return write(folder, {"prompts": prompts}, "prompts.json")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return scan(folder).sort("model", "prompt_index").collect().to_dicts()


def bytes_of(store: Path) -> dict[Path, bytes]:
    files = [*store.rglob("*.parquet"), *store.rglob("*.json")]
    return {path: path.read_bytes() for path in files}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# What the legacy script wrote.


def test_each_result_is_a_row_with_what_the_file_says_and_nothing_else(tmp_path: Path) -> None:
    file = write(tmp_path, a_document(_2=[a_result(1, 2)]))
    import_json([file], tmp_path / "store", now=NOW)
    (row,) = rows_of(tmp_path / "store")
    assert {name: value for name, value in row.items() if value is not None} == {
        "run_id": "a1b2c3d2",
        "request_id": row["request_id"],
        "prompt_id": "prompt_0001",
        "prompt_index": 0,
        "sample_index": 0,
        "provider": "transformers",
        "model": QWEN,
        "model_version": QWEN,
        "full_response": "Answer 1.",
        "retry_count": 0,
        "temperature": 0.0,
        "max_tokens": 2048,
        "seed": 42,
        "input_tokens": 42,
        "output_tokens": 156,
        "timestamp": datetime(2025, 11, 12, 10, 1, 1, 456789, UTC),
        "elapsed_seconds": 2.34,
        "prompt_category": "cve_existence",
        "is_synthetic_probe": False,
        "logprobs_mode": "processed_logprobs",
        "output_token_ids": [None],
        "output_token_texts": [None],
        "output_logprobs": [None],
        "output_ranks": [None],
        "output_top_token_ids": [[None, None]],
        "output_top_tokens": [[" Yes", " No"]],
        "output_top_logprobs": [[pytest.approx(-0.1), None]],
    }


def test_the_prompts_file_gives_what_the_results_lack(tmp_path: Path) -> None:
    file = write(tmp_path, a_document(_0=[a_result(2), a_result(0, prompt_category="its own")]))
    import_json([file], tmp_path / "store", prompts=prompts_file(tmp_path), now=NOW)
    first, last = rows_of(tmp_path / "store")
    assert (last["prompt"], last["prompt_index"]) == ("Does CVE-2021-2 exist?", 2)
    assert (last["gold_label"], last["gold_refs"]) == ('{"exists": true}', ["CVE-2021-44228"])
    assert (last["original_id"], last["prompt_extra"]) == ("cve-2", '{"language": "en"}')
    assert (first["prompt_category"], last["prompt_category"]) == ("its own", "cve_existence")


def test_a_chat_prompt_of_the_prompts_file_keeps_its_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Does it exist?"}]
    prompts = prompts_file(tmp_path, [{"id": "prompt_0000", "messages": turns}])
    file = write(tmp_path, {"results": [a_result(0, prompt="Does it exist?")]})
    import_json([file], tmp_path / "store", prompts=prompts, now=NOW)
    (row,) = rows_of(tmp_path / "store")
    assert (row["prompt"], row["messages"]) == (None, turns)


def test_a_failed_result_is_an_error_and_never_text(tmp_path: Path) -> None:
    file = write(tmp_path, a_document(_1=[a_failure(0, 1)]))
    assert import_json([file], tmp_path / "store", now=NOW).failed == 1
    (row,) = rows_of(tmp_path / "store")
    assert (row["full_response"], row["error"]) == (None, "Failed after 3 retries: 529")
    assert (row["finish_reason"], row["model_version"], row["retry_count"]) == ("error", None, 3)
    assert (row["temperature"], row["max_tokens"], row["input_tokens"]) == (0.7, 2048, None)


@pytest.mark.parametrize("error", [{}, {"error": None}])
def test_an_empty_answer_without_an_error_is_an_answer(tmp_path: Path, error: dict[str, Any]) -> None:
    file = write(tmp_path, a_document(_0=[a_result(0, full_response="", **error)]))
    import_json([file], tmp_path / "store", now=NOW)
    (row,) = rows_of(tmp_path / "store")
    assert (row["full_response"], row["error"], row["finish_reason"]) == ("", None, None)


@pytest.mark.parametrize(
    ("time", "utc"),
    [("2025-11-12T10:01:23", 10), ("2025-11-12T10:01:23+02:00", 8), ("2025-11-12T10:01:23Z", 10)],
)
def test_a_time_without_a_zone_is_taken_as_utc_and_that_is_said(tmp_path: Path, time: str, utc: int) -> None:
    file = write(tmp_path, a_document(_0=[a_result(0, timestamp=time)]))
    result = invoke("import-json", file, "--output", tmp_path / "store")
    (row,) = rows_of(tmp_path / "store")
    assert row["timestamp"] == datetime(2025, 11, 12, utc, 1, 23, tzinfo=UTC)
    assert ("taken as UTC" in result.stdout) == time.endswith("23")


def test_minus_infinity_which_the_script_wrote_is_kept(tmp_path: Path) -> None:
    tops = [{"token_position": 0, "top_tokens": ["a", "b"], "top_logprobs": [0.0, -math.inf]}]
    text = json.dumps(a_document(_2=[a_result(0, 2, token_logprobs=tops)]))
    assert "-Infinity" in text
    import_json([write(tmp_path, text)], tmp_path / "store", now=NOW)
    assert rows_of(tmp_path / "store")[0]["output_top_logprobs"] == [[0.0, -math.inf]]


SHAPES = {
    "runs": a_whole_document(),
    "flat": {"results": [a_result(0), a_result(1), a_failure(2)]},
    "bare list": [a_result(0), a_result(1), a_failure(2)],
    "metadata last": dict(reversed(a_whole_document().items())),
    "completed_at first": {"runs": [dict(reversed(run.items())) for run in a_whole_document()["runs"]]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read(tmp_path: Path, shape: str) -> None:
    content = SHAPES[shape]
    for mark in ("", "\ufeff"):
        file = tmp_path / "results.json"
        file.write_text(mark + json.dumps(content), encoding="utf-8")
        done = import_json([file], tmp_path / f"store{mark}", now=NOW)
        assert (done.results, done.new) == (
            (9, 9) if isinstance(content, dict) and "runs" in content else (3, 3)
        )


def test_a_flat_result_finds_its_entry_in_the_config(tmp_path: Path) -> None:
    results = [a_result(0, entry) for entry in range(3)]
    file = write(tmp_path, {"metadata": {"config": CONFIG}, "results": results})
    import_json([file], tmp_path / "store", now=NOW)
    assert [row["provider"] for row in rows_of(tmp_path / "store")] == ["transformers", "anthropic", "gemini"]


def test_without_a_config_the_provider_is_unknown(tmp_path: Path) -> None:
    import_json([write(tmp_path, [a_result(0)])], tmp_path / "store", now=NOW)
    (row,) = rows_of(tmp_path / "store")
    assert (row["provider"], row["seed"], row["temperature"]) == ("unknown", 42, 0.0)


# Identity.


def a_config(**changes: Any) -> Config:
    return Config.model_validate(CONFIG | changes)


def pending(config: Config, prompts: Path, store: Path) -> tuple[int, ...]:
    return make_plan(config, PromptFile(prompts)).survey(answered_ids(store)).pending


def test_what_was_paid_for_is_not_asked_again_and_local_answers_do_not_count(tmp_path: Path) -> None:
    prompts, store = prompts_file(tmp_path), tmp_path / "store"
    import_json([write(tmp_path, a_whole_document())], store, prompts=prompts, now=NOW)
    assert pending(a_config(), prompts, store) == (1, 0, 3)  # one answer of Claude failed
    warmer = [entry | {"temperature": 0.5} for entry in CONFIG["models"]]
    assert pending(a_config(models=warmer), prompts, store) == (3, 3, 3)


def test_the_configs_of_the_first_users_know_their_imported_answers(
    tmp_path: Path, shared_prompts: Path
) -> None:
    given = json.loads((shared_prompts.parent / "config_full_pilot.json").read_text())
    prompts = json.loads(shared_prompts.read_text())["prompts"]
    runs = []
    for entry in given["models"]:
        sent = {"temperature": entry["temperature"], "seed": 42, "max_tokens": 2048}
        model = {"model": entry["name"], "sampling_params": sent}
        results = [a_result(**model, prompt_id=prompt["id"]) for prompt in prompts]
        runs.append({"model_config": entry, "results": results, "completed_at": "2025-11-12T10:30:00"})
    file = write(tmp_path, {"metadata": {"config": given}, "runs": runs})
    import_json([file], tmp_path / "store", prompts=shared_prompts, now=NOW)
    config = Config.model_validate(given)
    assert pending(config, shared_prompts, tmp_path / "store") == (0, 0, 0, 0, *[393] * 6)


def test_a_flat_file_brings_the_prompt_s_text_and_so_the_id_that_generate_asks_with(tmp_path: Path) -> None:
    results = [a_result(number, prompt=PROMPTS[number]["prompt"]) for number in range(3)]
    file = write(tmp_path, {"metadata": {"config": CONFIG}, "results": results})
    import_json([file], tmp_path / "store", now=NOW)
    assert pending(a_config(), prompts_file(tmp_path), tmp_path / "store") == (0, 3, 3)


@pytest.mark.parametrize("with_prompts", [True, False])
def test_a_store_of_imported_results_is_whole(tmp_path: Path, with_prompts: bool) -> None:
    prompts = prompts_file(tmp_path) if with_prompts else None
    import_json([write(tmp_path, a_whole_document())], tmp_path / "store", prompts=prompts, now=NOW)
    assert verify(tmp_path / "store").faults == 0


def test_importing_again_gives_nothing_twice_and_changes_no_file(tmp_path: Path) -> None:
    file, store = write(tmp_path, a_whole_document()), tmp_path / "store"
    first = import_json([file], store, now=NOW)
    before = bytes_of(store)
    again = import_json([file, file], store, now=NOW + timedelta(hours=1))
    assert (first.new, first.failed, first.known) == (9, 1, 0)
    assert (again.new, again.known) == (0, 9)
    assert bytes_of(store) == before


def test_a_result_in_several_files_is_one_row(tmp_path: Path) -> None:
    whole = write(tmp_path, a_whole_document())
    of_one = write(tmp_path, a_document(_0=[a_result(0), a_result(1)]), "pilot_claude.json")
    done = import_json([of_one, whole], tmp_path / "store", now=NOW)
    assert (done.results, done.new, done.known) == (11, 9, 2)
    assert len(rows_of(tmp_path / "store")) == 9


def test_an_answer_counts_before_an_error_and_then_the_newest(tmp_path: Path) -> None:
    def at(minute: int, **fields: Any) -> dict[str, Any]:
        make = a_failure if "error" in fields else a_result
        return make(0, timestamp=f"2025-11-12T10:{minute:02d}:00", **fields)

    results = [at(1, full_response="old"), at(3, full_response="new"), at(2, full_response="between")]
    file = write(tmp_path, a_document(_0=[*results, at(4, error="later")]))
    done = import_json([file], tmp_path / "store", now=NOW)
    (row,) = rows_of(tmp_path / "store")
    assert (row["full_response"], done.new, done.known, done.older) == ("new", 1, 0, 3)
    newest = write(tmp_path, a_document(_0=[at(5, full_response="newest"), at(6, error="later")]))
    done = import_json([newest], tmp_path / "store", now=NOW)
    (row,) = rows_of(tmp_path / "store")
    assert (row["full_response"], done.new, done.older) == ("newest", 1, 1)


def test_a_failure_and_the_answer_of_a_later_file_are_one_request(tmp_path: Path) -> None:
    for entry in range(3):
        store = tmp_path / f"store{entry}"
        failed = write(tmp_path, a_document(**{f"_{entry}": [a_failure(0, entry)]}))
        import_json([failed], store, now=NOW)
        answered = write(tmp_path, a_document(**{f"_{entry}": [a_result(0, entry)]}))
        import_json([answered], store, now=NOW)
        assert [row["full_response"] for row in rows_of(store)] == ["Answer 0."]


def test_the_same_results_with_and_without_prompts_are_refused(tmp_path: Path) -> None:
    file, store = write(tmp_path, a_whole_document()), tmp_path / "store"
    import_json([file], store, now=NOW)
    with pytest.raises(ResultError, match=r"comes twice, once without its prompt's text .* new folder"):
        import_json([file], store, prompts=prompts_file(tmp_path), now=NOW)
    assert len(rows_of(store)) == 9


def test_without_the_prompts_it_is_said_that_generate_would_ask_again(tmp_path: Path) -> None:
    file = write(tmp_path, a_whole_document())
    result = invoke("import-json", file, "--output", tmp_path / "without")
    assert "The prompts of 6 API results are unknown" in result.stdout
    prompts = prompts_file(tmp_path)
    result = invoke("import-json", file, "--output", tmp_path / "with", "--prompts", prompts)
    assert "unknown" not in result.stdout


# Records, and what may not be in them.


def record_of(store: Path, run_id: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((store / "_runs" / f"{run_id}.json").read_text())
    return record


def test_each_run_has_a_record_of_where_it_comes_from_without_keys(tmp_path: Path) -> None:
    file, store = write(tmp_path, a_whole_document()), tmp_path / "store"
    import_json([file], store, prompts=prompts_file(tmp_path), now=NOW)
    record = record_of(store, "a1b2c3d0")
    assert (record["status"], record["counts"]) == ("imported", {"answered": 2, "failed": 1})
    assert (record["started_at"], record["resumed"]) == ("2025-11-12T10:00:00.000001+00:00", False)
    assert record["imported"][0]["file"] == str(file)
    assert len(record["imported"][0]["sha256"]) == len(record["imported"][0]["prompts"]["sha256"]) == 64
    assert record["config"]["models"][0] == {"name": CLAUDE, "type": "claude", "temperature": 0.0}
    assert KEY not in "".join(path.read_text() for path in (store / "_runs").glob("*.json"))
    assert "imported (2 answered, 1 failed)" in invoke("status", store).stdout


def test_a_key_is_masked_wherever_it_is_repeated(tmp_path: Path) -> None:
    document = a_document(_0=[a_failure(0, error=f"401 for x-api-key {KEY}")])
    document["metadata"]["config"] = CONFIG | {"description": f"asked with {KEY}"}
    import_json([write(tmp_path, document)], tmp_path / "store", now=NOW)
    assert record_of(tmp_path / "store", "a1b2c3d0")["config"]["description"] == "asked with ***"
    assert rows_of(tmp_path / "store")[0]["error"] == "401 for x-api-key ***"


def test_a_record_of_the_store_s_own_run_stays_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "store" / "_runs" / "a1b2c3d0.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"status": "finished"}')
    import_json([write(tmp_path, a_whole_document())], tmp_path / "store", now=NOW)
    assert own.read_text() == '{"status": "finished"}'


def test_a_second_file_of_a_run_is_added_to_its_record(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = write(tmp_path, a_document(_0=[a_result(0), a_failure(1)]), "first.json")
    second = write(tmp_path, a_document(_0=[a_result(1)], _1=[a_result(0, 1)]), "second.json")
    import_json([first], store, now=NOW)
    import_json([second], store, now=NOW)
    record = record_of(store, "a1b2c3d0")
    assert [Path(source["file"]).name for source in record["imported"]] == ["first.json", "second.json"]
    assert [entry["model_config"]["name"] for entry in record["entries"]] == [CLAUDE, GEMINI]
    assert record["counts"] == {"answered": 2, "failed": 0}


@pytest.mark.parametrize("broken", ["{", "[]"])
def test_a_record_that_cannot_be_read_is_not_overwritten(tmp_path: Path, broken: str) -> None:
    own = tmp_path / "store" / "_runs" / "a1b2c3d0.json"
    own.parent.mkdir(parents=True)
    own.write_text(broken)
    with pytest.raises(StoreError, match=r"a1b2c3d0.json: cannot be read .*; move it out of the folder"):
        import_json([write(tmp_path, a_whole_document())], tmp_path / "store", now=NOW)
    assert own.read_text() == broken


def test_an_export_of_an_import_is_the_legacy_file_with_more_in_it(tmp_path: Path) -> None:
    original = a_whole_document()
    prompts = prompts_file(tmp_path)
    import_json([write(tmp_path, original)], tmp_path / "store", prompts=prompts, now=NOW)
    (file,) = export_json(tmp_path / "store", now=NOW)
    document = json.loads(file.read_text())
    for key in ("start_time", "end_time", "total_prompts", "prompts_file", "resumed"):
        assert document["metadata"][key] == original["metadata"][key]
    assert [run["model_config"]["name"] for run in document["runs"]] == [CLAUDE, GEMINI, QWEN]
    for exported, run in zip(document["runs"], original["runs"], strict=True):
        assert exported["model_config"] == {k: v for k, v in run["model_config"].items() if k != "api_key"}
        results = sorted(run["results"], key=lambda result: result["prompt_id"])
        for result, before in zip(exported["results"], results, strict=True):
            same = before.keys() - {"sampling_params", "token_logprobs"}
            assert {name: result[name] for name in same} == {name: before[name] for name in same}
            assert result["token_logprobs"] == before.get("token_logprobs")
            assert result["sampling_params"]["max_tokens"] == 2048


# What cannot be used.

BAD: dict[str, tuple[str, str]] = {
    "empty": ("", "line 1: the file ends too early"),
    "not JSON": ("prompt_id,model\n1,2\n", "line 1: Expecting"),
    "a number": ("7", "line 1: Expecting '{'"),
    "cut": ('{"runs": [{"results": [{"prompt_id": "p', "line 1: the file ends too early"),
    "cut behind a value": ('{"results": [\n1', "line 2: the file ends too early"),
    "something behind": ('{"results": []}\n]', "line 2: Extra data"),
    "a missing comma": ('{"metadata": {}\n "results": []}', "line 2: Expecting ',' or '}'"),
    "an equal key": ('{"results": [{"a": 1,\n "a": 2}]}', 'the key "a" comes twice'),
    "equal keys at the top": ('{"results": [],\n "results": []}', 'line 2: the key "results" comes twice'),
    "NaN": ('{"results": [{"elapsed_seconds": NaN}]}', "line 1: NaN is not JSON, write null"),
    "Infinity": ("[Infinity]", "line 1: Infinity is not JSON, write null"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "a huge number": (f"[{'7' * 5000}]", "a number has too many digits"),
    "prompts": ('{"metadata": {}, "prompts": []}', "neither runs nor results, but metadata, prompts"),
    "no results": ('{"runs": []}', "holds no results"),
    "runs no list": ('{"runs": {}}', "runs is not a list"),
    "results no list": ('{"runs": [{"results": "all"}]}', "runs[0].results is not a list"),
    "a run no object": ('{"runs": [[]]}', "runs[0] is not an object"),
    "an entry no object": ('{"runs": [{"model_config": "m"}]}', "runs[0].model_config: is not an object"),
    "metadata no object": ('{"metadata": 1, "results": []}', "metadata: should be a valid dictionary"),
    "no time": (
        '{"metadata": {"end_time": "now"}, "results": []}',
        "metadata.end_time: should be a time such as",
    ),
    "a result no object": ('{"results": ["a"]}', "results[0]: should be a valid dictionary"),
}


def assert_refused(file: Path, store: Path, message: str, *options: object) -> None:
    result = invoke("import-json", file, "--output", store, *options)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {file}: ")
    assert message in line
    assert not store.exists()


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_file_of_results_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    assert_refused(write(tmp_path, text), tmp_path / "store", message)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt_id": 7}, ".prompt_id: should be a valid string, is 7"),
    ({"model": ""}, ".model: should"),
    ({"full_response": None}, ".full_response: is missing"),
    ({"elapsed_seconds": "fast"}, '.elapsed_seconds: should be a valid number, is "fast"'),
    ({"elapsed_seconds": True}, ".elapsed_seconds: should be a valid number"),
    ({"elapsed_seconds": -1}, ".elapsed_seconds: should be greater than or equal to 0"),
    ({"elapsed_seconds": 1e300}, ".elapsed_seconds: should be less than"),
    ({"timestamp": "yesterday"}, ".timestamp: yesterday is no time"),
    ({"timestamp": "0001-01-01T00:00:00+05:00"}, ".timestamp: 0001-01-01T00:00:00+05:00 is no time"),
    ({"tokens_used": {"input": 1.5}}, ".tokens_used.input: should be a valid integer"),
    ({"tokens_used": {"input": 2**63}}, ".tokens_used.input: should be less than"),
    ({"retry_count": 2**31}, ".retry_count: should be less than"),
    ({"run_id": "../../x"}, ".run_id: should match pattern"),
    ({"run_id": "x" * 300}, ".run_id: should match pattern"),
    ({"request_id": "req_1"}, ".request_id: should match pattern"),
    ({"error": "529", "full_response": "Yes."}, ": has an error and a full_response"),
    ({"finish_reason": "done"}, ".finish_reason: should be 'stop', 'length'"),
    (
        {"sampling_params": {"temperature": -math.inf}},
        ".sampling_params.temperature: should be a finite number",
    ),
    ({"sampling_params": {"top_k": {"a": [-math.inf]}}}, ".sampling_params.top_k: should be a valid integer"),
    ({"sampling_params": {"min_p": -math.inf}}, ".sampling_params: holds a number that is not finite"),
    (
        {"token_logprobs": [TOP[0] | {"token_position": 1}]},
        ".token_logprobs[0].token_position: is 1; write 0",
    ),
    ({"token_logprobs": [TOP[0] | {"top_tokens": ["a"]}]}, ".token_logprobs[0]: has not as many"),
    ({"token_logprobs": [TOP[0] | {"top_logprobs": ["a", 1]}]}, ".token_logprobs[0].top_logprobs[0]: should"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_is_no_result_is_refused_with_its_place_and_nothing_is_imported(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    document = a_document(_0=[a_result(0)], _1=[a_result(0, 1), a_result(1, 1) | fields])
    assert_refused(write(tmp_path, document), tmp_path / "store", f"runs[1].results[1]{message}")


@pytest.mark.parametrize("field", ["prompt_id", "model", "timestamp", "elapsed_seconds"])
def test_a_result_without_what_it_needs_is_refused(tmp_path: Path, field: str) -> None:
    result = a_result(0)
    del result[field]
    assert_refused(write(tmp_path, [result]), tmp_path / "store", f"results[0].{field}: is missing; add it")


@pytest.mark.parametrize("bad", ["latin-1", "missing", "folder"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, bad: str) -> None:
    file = tmp_path / "results.json"
    if bad == "latin-1":
        file.write_bytes('["é"]'.encode("latin-1"))
    elif bad == "folder":
        file.mkdir()
    problem = "not UTF-8 text" if bad == "latin-1" else "cannot be read"
    assert_refused(file, tmp_path / "store", problem)


def test_one_bad_file_keeps_all_others_out(tmp_path: Path) -> None:
    good, bad = write(tmp_path, a_whole_document()), write(tmp_path, "[", "bad.json")
    result = invoke("import-json", good, bad, "--output", tmp_path / "store")
    assert result.exit_code == 2
    assert not (tmp_path / "store").exists()


def test_another_prompts_file_than_that_which_was_asked_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {"results": [a_result(0, prompt="Does it exist?")]})
    others = prompts_file(tmp_path, PROMPTS[1:])
    assert_refused(
        file, tmp_path / "store", "results[0].prompt_id: 'prompt_0000' is not in", "--prompts", others
    )
    same = prompts_file(tmp_path)
    assert_refused(file, tmp_path / "store", "'prompt_0000' has another text in", "--prompts", same)


def test_hostile_text_is_shown_as_what_it_is_and_nothing_escapes_the_folder(tmp_path: Path) -> None:
    hostile = "../../\x1b]0;owned\x07[red]" + "n" * 300
    result = a_result(0, model=hostile, full_response=hostile, **{hostile: 1})
    done = invoke("import-json", write(tmp_path, [result]), "--output", tmp_path / "store")
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pilot_results_20251112_103000.json", "store"]
    assert rows_of(tmp_path / "store")[0]["full_response"] == hostile


def test_half_a_surrogate_pair_is_replaced_wherever_it_stands(tmp_path: Path) -> None:
    half = "half \ud83d of it"
    tops = [{"token_position": 0, "top_tokens": [half], "top_logprobs": [-1.0]}]
    names = dict.fromkeys(("prompt_id", "model", "full_response", "model_version", half), half)
    file = write(tmp_path, a_document(_2=[a_result(0, 2, token_logprobs=tops) | names]))
    import_json([file], tmp_path / "store", prompts=None, now=NOW)
    (row,) = rows_of(tmp_path / "store")
    assert {row[name] for name in ("prompt_id", "model", "full_response")} == {"half \ufffd of it"}
    (exported,) = export_json(tmp_path / "store", now=NOW)
    (run,) = json.loads(exported.read_text())["runs"]
    assert run["model_config"]["device"] == "cuda"


def test_a_folder_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, a_whole_document())
    with Store(tmp_path / "store", "other"):
        result = invoke("import-json", file, "--output", tmp_path / "store")
    assert result.exit_code == 2
    assert "another run (process" in result.stderr


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    document = a_whole_document()
    document["runs"][0]["results"].append(a_result(0, timestamp="2025-11-12T09:00:00", annotation="x"))
    result = invoke("import-json", write(tmp_path, document), "--output", tmp_path / "store")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"1 file, 10 results: 9 new (1 of them failed), 0 already there. Store: {tmp_path / 'store'}",
        "Left out: 1 result whose request has an answer or a newer one.",
        "Left out of 1 result: annotation, which has no column.",
        "Times without a zone, in 10 results, are taken as UTC.",
        "The prompts of 7 API results are unknown, so `hallubench generate` would ask them again. "
        "If it should not: import into a new folder, with --prompts FILE.",
    ]


PEAK = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from hallubench.import_legacy import import_json
import_json([Path(sys.argv[1])], Path(sys.argv[2]), now=datetime.now(UTC))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    tops = [{"token_position": n, "top_tokens": list("abcde"), "top_logprobs": [-0.5] * 5} for n in range(50)]

    def import_of(count: int) -> tuple[int, int]:
        file, store = tmp_path / f"{count}.json", tmp_path / str(count)
        with file.open("w") as text:
            for number in range(count):
                result = a_result(number, 2, token_logprobs=tops, full_response="x" * 20_000)
                result["timestamp"] = "2025-11-12T10:01:23"
                text.write(f"{',' if number else '['}{json.dumps(result, indent=2)}")
            text.write("]")
        environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
        command = [sys.executable, "-c", PEAK, str(file), str(store)]
        return file.stat().st_size, int(subprocess.check_output(command, text=True, env=environment))

    (small, peak_of_small), (large, peak_of_large) = import_of(400), import_of(1_600)
    assert large - small > 35e6
    assert peak_of_large - peak_of_small < (large - small) / 2
