from __future__ import annotations

import json
import math
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hallubench.import_legacy import import_json
from hallubench.legacy import Layout, export_json
from hallubench.plan import request_id, settings_hash
from hallubench.schema import Row
from hallubench.store import Store
from hallubench.types import Completion, Logprobs, Message, Prompt, Request, SamplingParams, Usage

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
NOW = datetime(2026, 11, 23, 8, 37, 58, tzinfo=UTC)
RUNS = ("20261123-080000-a1b2c3", "20261123-083000-d4e5f6")
PROVIDERS = {"claude": "anthropic", "local": "vllm", "echo": "echo"}
OPTIONS = {"extra_body": {"é": [1.5, None]}}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=5)
FLOATS = st.floats(width=32, max_value=0.0) | st.just(math.nan)


@st.composite
def logprobs(draw: st.DrawFn) -> Logprobs:
    tops = draw(st.lists(st.lists(st.tuples(TEXTS, FLOATS), max_size=3), max_size=4))
    flat = [alternative for top in tops for alternative in top]
    offsets = array("i", [0])
    for top in tops:
        offsets.append(offsets[-1] + len(top))
    return Logprobs(
        token_ids=array("i", range(len(tops))),
        tokens=["x"] * len(tops),
        logprobs=array("f", [-1.0] * len(tops)),
        ranks=array("i", [1] * len(tops)),
        top_offsets=offsets,
        top_token_ids=array("i", range(len(flat))),
        top_tokens=[token for token, _ in flat],
        top_logprobs=array("f", [logprob for _, logprob in flat]),
    )


@st.composite
def completions(draw: st.DrawFn, request_id: str) -> Completion:
    known: dict[str, Any] = {
        "request_id": request_id,
        "timestamp": draw(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1))).replace(tzinfo=UTC),
        "elapsed_seconds": draw(st.floats(0, 1e6)),
        "retry_count": draw(st.integers(0, 9)),
        "model_version": draw(st.none() | NAMES),
    }
    if draw(st.integers(0, 3)) == 0:
        error: dict[str, Any] = {"error": draw(NAMES), "error_type": draw(st.none() | NAMES)}
        return Completion(**known | error | {"finish_reason": "error", "model_version": None})
    usage = Usage(input_tokens=draw(st.integers(0, 2**40)), output_tokens=draw(st.integers(0, 2**40)))
    return Completion(
        **known,
        text=draw(TEXTS),
        finish_reason=draw(st.sampled_from(["stop", "length", "content_filter", "other"])),
        usage=draw(st.sampled_from([Usage(), usage])),
        logprobs=draw(st.none() | logprobs()),
        logprobs_mode=draw(st.sampled_from([None, "raw_logprobs"])),
    )


ENTRIES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["Qwen/Qwen3-0.6B", "a/b", "a_b"]),
        "type": st.sampled_from(["claude", "local", "echo"]),
        "temperature": st.sampled_from([None, 0.0, 0.7]),
        "top_p": st.sampled_from([None, 0.9]),
        "stop": st.sampled_from([(), ("\n", '"')]),
        "seed": st.sampled_from([None, 7]),
        "system_prompt": st.sampled_from([None, "Be brief."]),
        "options": st.sampled_from([{}, {"logprobs": 5} | OPTIONS]),
    }
)


def is_possible(entry: dict[str, Any]) -> bool:
    """Local models always have a temperature."""
    return entry["type"] != "local" or entry["temperature"] is not None


@st.composite
def stores(draw: st.DrawFn) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of several models, settings, samples and runs, and the records of these runs."""
    prompts = [
        Prompt(
            id=f"p{number}",
            index=draw(st.integers(0, 5)) * 3 + number,
            text=None if chat else draw(NAMES.filter(str.strip)),
            messages=(Message("user", draw(NAMES)), Message("assistant", ""), Message("user", draw(NAMES)))
            if chat
            else None,
            category=draw(st.none() | NAMES),
            is_synthetic_probe=draw(st.none() | st.booleans()),
        )
        for number, chat in enumerate(draw(st.lists(st.booleans(), min_size=1, max_size=3)))
    ]
    possible = ENTRIES.filter(is_possible)
    entries = draw(
        st.lists(possible, min_size=1, max_size=4, unique_by=lambda entry: json.dumps(entry, sort_keys=True))
    )
    rows = []
    for entry in entries:
        provider = PROVIDERS[entry["type"]]
        params = SamplingParams(
            max_tokens=64, temperature=entry["temperature"], top_p=entry["top_p"], stop=entry["stop"]
        )
        digest = settings_hash(provider, entry["name"], entry["system_prompt"], params, entry["options"])
        for number, prompt in enumerate(prompts):
            for sample in range(draw(st.integers(number == 0, 2))):
                seed = None if entry["seed"] is None else entry["seed"] + sample
                id_ = request_id(digest, prompt, sample, seed)
                request = Request(
                    request_id=id_,
                    prompt=prompt,
                    sample_index=sample,
                    provider=provider,
                    model=entry["name"],
                    system_prompt=entry["system_prompt"],
                    params=replace(params, seed=seed),
                    options=entry["options"],
                )
                rows.append(Row(draw(st.sampled_from(RUNS)), request, draw(completions(id_)), None))
    return rows, draw(records(entries))


@st.composite
def records(draw: st.DrawFn, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of none, one or both of the runs; the entries in any order, some of them missing."""
    found = []
    for run_id in draw(st.lists(st.sampled_from(RUNS), unique=True)):
        models = []
        for entry in draw(st.permutations(entries)):
            if draw(st.booleans()):
                own = {name: value for name, value in entry.items() if name != "options"}
                options = {"logprobs": 5, "options": OPTIONS} if entry["options"] else {}
                models.append(own | {"max_tokens": 64, "notes": run_id} | options)
        config = {"prompts_file": "prompts.json", "seed": None, "models": models}
        record = {
            "run_id": run_id,
            "started_at": "1999-12-31T23:00:00+00:00",
            "ended_at": None,
            "config": config,
        }
        found.append(record | {"prompts": {"path": "/data/prompts.json", "count": 3}})
    return found


def contents(files: Sequence[Path], folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in files}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(store=stores(), layout=st.sampled_from(LAYOUTS), tokens=st.sampled_from([2, None]))
def test_what_is_exported_imported_and_exported_is_the_same(
    store: tuple[list[Row], list[dict[str, Any]]], layout: Layout, tokens: int | None
) -> None:
    rows, records = store
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        with Store(first, RUNS[-1]) as writer:
            for row in rows:
                writer.append(row)
        for record in records:
            (first / "_runs" / f"{record['run_id']}.json").write_text(json.dumps(record))
        files = export_json(first, layout=layout, logprob_tokens=tokens, now=NOW)
        second = Path(folder) / "second"
        done = import_json(files, second, now=NOW)
        assert (done.new, done.known, done.older) == (len(rows), 0, 0)
        again = export_json(second, layout=layout, logprob_tokens=tokens, now=NOW)
        assert contents(again, second) == contents(files, first)
