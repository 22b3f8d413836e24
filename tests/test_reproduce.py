from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from hallubench.cli import main
from hallubench.config import Config
from hallubench.environment import differences
from hallubench.errors import StoreError
from hallubench.generate import run
from hallubench.parts import write_part
from hallubench.reproduce import Agreement, reproduce
from hallubench.schema import SCHEMA
from hallubench.store import scan


def store_of(folder: Path, *entries: dict[str, Any], prompts: int = 12) -> Path:
    path = folder / "prompts.jsonl"
    lines = (
        json.dumps({"id": f"p{number}", "prompt": f"Is claim {number} true?"}) for number in range(prompts)
    )
    path.write_text("\n".join(lines))
    models = [{"type": "echo", "logprobs": 5, "prompt_logprobs": 2} | entry for entry in entries]
    config = {"prompts_file": str(path), "output_dir": str(folder / "out"), "models": models}
    return run(Config.model_validate(config)).output


def rewrite(store: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Put changed rows in the place of a store's only part."""
    (path,) = store.rglob("*.parquet")
    rows = change(scan(store).collect())
    path.unlink()
    write_part(path, [rows.to_arrow().cast(SCHEMA)])


def edit_record(store: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    (path,) = (store / "_runs").glob("*.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["reproduce", *map(str, arguments)])


def test_what_is_deterministic_agrees_whole_alone_and_in_a_batch(tmp_path: Path) -> None:
    store = store_of(
        tmp_path, {"name": "a", "temperature": 0.7, "n": 2}, {"name": "b", "system_prompt": "Be brief."}
    )
    result = reproduce(store, sample=1000)
    assert (result.asked, result.stored) == (36, 36)
    assert result.agreements == [
        Agreement(model, temperature, how, count, count, count, None, 0.0, 0.0)
        for model, temperature, count in (("a", 0.7, 24), ("b", None, 12))
        for how in ("alone", "in a batch")
    ]
    assert result.changes == []


def test_nothing_is_written_into_the_store(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "a"})
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    reproduce(store)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_the_same_seed_takes_the_same_sample(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "a"}, prompts=100)

    def change_some(rows: pl.DataFrame) -> pl.DataFrame:
        changed = pl.col("prompt_index") % 2 == 0
        return rows.with_columns(
            full_response=pl.when(changed).then(pl.lit("No.")).otherwise("full_response")
        )

    rewrite(store, change_some)

    def same_texts(seed: int) -> int:
        return reproduce(store, sample=15, seed=seed).agreements[0].texts

    by_seed = [same_texts(seed) for seed in range(6)]
    assert by_seed == [same_texts(seed) for seed in range(6)]
    assert len(set(by_seed)) > 1


def test_an_answer_that_does_not_come_back_is_counted_with_its_first_other_token(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "a"}, prompts=3)

    def change_one(rows: pl.DataFrame) -> pl.DataFrame:
        first = pl.col("prompt_id") == "p0"
        ids, logprobs = pl.col("output_token_ids"), pl.col("output_logprobs")
        return rows.with_columns(
            full_response=pl.when(first).then(pl.lit("else")).otherwise("full_response"),
            output_token_ids=pl.when(first)
            .then(pl.concat_list(ids.list.head(4), pl.lit(-7, pl.Int32), ids.list.slice(5)))
            .otherwise(ids),
            output_logprobs=pl.when(first).then(logprobs.list.eval(pl.element() - 0.25)).otherwise(logprobs),
        )

    rewrite(store, change_one)
    alone, batch = reproduce(store).agreements
    for one in (alone, batch):
        assert (one.answers, one.texts, one.tokens, one.first_difference) == (3, 2, 2, 4)
        assert one.logprob_difference == pytest.approx(0.25)
        assert one.prompt_logprob_difference == 0.0


def test_answers_without_log_probabilities_are_compared_by_text(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "a", "logprobs": None, "prompt_logprobs": None})
    assert reproduce(store).agreements[0] == Agreement("a", None, "alone", 12, 12)


def test_only_models_that_match_are_asked(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "team/a"}, {"name": "b"})
    assert {one.model for one in reproduce(store, models="team/*").agreements} == {"team/a"}
    with pytest.raises(StoreError, match="no answers of local models that match 'c'"):
        reproduce(store, models="c")


def test_entries_of_apis_in_the_record_are_left_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "a"})
    claude = {"name": "claude-haiku-4-5", "type": "claude"}
    edit_record(store, lambda record: record["config"]["models"].insert(0, claude))
    assert reproduce(store).agreements[0].texts == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.pop("config"), "does not say what was asked; restore it"),
        (lambda record: record["config"].update(models=7), "does not say what was asked; restore it"),
        (lambda record: record["config"]["models"][0].update(n="x"), r"config.models.0.n: .*; restore it"),
        (
            lambda record: record["config"]["models"][0].update(temperature=0.5),
            "does not ask what the store has of a",
        ),
    ],
)
def test_a_record_from_which_nothing_can_be_asked_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    store = store_of(tmp_path, {"name": "a"})
    path = edit_record(store, change)
    with pytest.raises(StoreError, match=said) as raised:
        reproduce(store)
    assert str(path) in str(raised.value)


def test_a_missing_record_is_named_with_exit_code_2(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "a"})
    (path,) = (store / "_runs").glob("*.json")
    path.unlink()
    result = invoke(store)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {path}: does not say what was asked")


def test_what_changed_since_the_run_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"name": "a"})
    edit_record(store, lambda record: record["packages"].update({"torch": "1.0"}))
    edit_record(store, lambda record: record["machine"].update(cores=512, memory_bytes=1))
    result = invoke(store, "--sample", 3)
    assert result.exit_code == 0
    assert "  torch was 1.0, is " in result.stdout
    assert f"  machine: cores was 512, is {len(os.sched_getaffinity(0))}" in result.stdout
    assert "memory_bytes" not in result.stdout


def test_facts_of_the_engine_are_compared_by_the_last_that_was_loaded() -> None:
    before = {
        "providers": {
            "m": [{"engine": {"max_num_seqs": 1}}, {"engine": {"max_num_seqs": 4, "dtype": "float32"}}]
        }
    }
    now = {"providers": {"m": [{"engine": {"max_num_seqs": 8, "dtype": "float32"}}]}}
    assert list(differences(before, now)) == ["m: engine: max_num_seqs was 4, is 8"]


def test_the_command_prints_a_table_and_what_it_means(tmp_path: Path) -> None:
    result = invoke(store_of(tmp_path, {"name": "a", "temperature": 0.7}), "--sample", 5)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "5 of 12 answers of local models, asked again"
    assert lines[2].split() == ["a", "0.7", "alone", "5", "5", "5", "-", "0.0e+00", "0.0e+00"]
    assert lines[4] == "Versions, weights, hardware and engine are as the runs' records say."
    assert "VLLM_BATCH_INVARIANT=1" in lines[-2]
