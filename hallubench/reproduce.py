"""Stored answers asked again, alone and in a batch, and how far they agree.

They are asked by what the record of their run says, through the provider that `generate` opens. What comes
back is compared and not stored. Only what draws by seeds can be asked again: local models, and `echo`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any, Literal, TypeAlias

import polars as pl
from pydantic import ValidationError

from hallubench.config import PROVIDER_OF_TYPE, Config
from hallubench.environment import differences
from hallubench.errors import HallubenchError, LaneError, StoreError
from hallubench.plan import Group, group_requests, make_lanes
from hallubench.provenance import environment, new_run_id
from hallubench.providers import Context, open_provider
from hallubench.records import Records, read_records, record_path
from hallubench.store import scan
from hallubench.text import aligned, printable
from hallubench.types import Completion, Logprobs, Message, Prompt, Request

TYPES = ("local", "echo")
PROVIDERS = [PROVIDER_OF_TYPE.get(type_, type_) for type_ in TYPES]
ASKED = ["run_id", "request_id", "prompt_id", "prompt_index", "prompt", "messages", "model", "temperature"]
ANSWERED = ["full_response", "output_token_ids", "output_logprobs", "prompt_logprobs"]

How: TypeAlias = Literal["alone", "in a batch"]
Row: TypeAlias = Mapping[str, Any]


@dataclass(slots=True)
class Agreement:
    """How the answers of a model at a temperature, asked again in one way, compare with those stored."""

    model: str
    temperature: float | None
    how: How
    answers: int = 0
    texts: int = 0
    """Answers whose text is the same."""
    tokens: int | None = None
    """Answers whose token ids are the same; None if none has token ids."""
    first_difference: int | None = None
    """The first place at which any answer has another token, from 0."""
    logprob_difference: float | None = None
    """The largest between the log-probabilities of a token, of those before the first other token."""
    prompt_logprob_difference: float | None = None


@dataclass(slots=True)
class Reproduction:
    """What came of asking again."""

    stored: int
    """Answers in the store that could be asked again."""
    asked: int
    agreements: list[Agreement] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    """What is not as the records say it was, a line each."""


def reproduce(
    folder: Path,
    *,
    sample: int = 20,
    seed: int = 42,
    models: str | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Reproduction:
    """Ask a seeded sample of stored answers again.

    Args:
        folder: of the store; it is only read.
        sample: how many answers are asked again, or all if there are fewer.
        seed: which ones; the same store and seed give the same ones.
        models: a glob; only models whose name matches.
        notify: shown what a provider has to say, a line each.

    Raises:
        StoreError: there is no store, no such answer in it, or a record from which nothing can be asked.
        LaneError: a model cannot be loaded, or its engine died.
    """
    stored, rows = _sample(folder, sample, seed, models)
    result = Reproduction(stored, len(rows))
    by_config: dict[str, list[Row]] = defaultdict(list)
    records = read_records(folder)
    for row in rows:
        by_config[_local_config(folder, row["run_id"], records)].append(row)
    now = environment()
    changes: dict[str, None] = {}
    for config_text, asked in by_config.items():
        config = Config.model_validate_json(config_text)
        facts: dict[str, list[Any]] = defaultdict(list)
        for group, requests in _groups(folder, config, asked):
            answers = [row for row in asked if row["request_id"] in requests]
            again = asyncio.run(_ask(group, config, list(requests.values()), facts, notify))
            result.agreements += _compare(answers, again)
        for run_id in {row["run_id"] for row in asked}:
            before = records[run_id]
            assert before is not None
            changes |= dict.fromkeys(differences(before, now | {"providers": facts}))
    result.changes = list(changes)
    return result


def report_lines(result: Reproduction) -> Iterator[str]:
    """What `hallubench reproduce` prints."""
    yield f"{result.asked} of {result.stored} answers of local models, asked again"
    header = [
        "model",
        "temp",
        "asked",
        "answers",
        "same text",
        "same tokens",
        "first other",
        "logprobs by",
        "prompt's by",
    ]
    table = [
        [
            printable(one.model, longest=60),
            "-" if one.temperature is None else f"{one.temperature:g}",
            one.how,
            f"{one.answers}",
            f"{one.texts}",
            "-" if one.tokens is None else f"{one.tokens}",
            "-" if one.first_difference is None else f"token {one.first_difference}",
            "-" if one.logprob_difference is None else f"{one.logprob_difference:.1e}",
            "-" if one.prompt_logprob_difference is None else f"{one.prompt_logprob_difference:.1e}",
        ]
        for one in result.agreements
    ]
    yield from aligned([header, *table])
    if result.changes:
        yield "Not as the runs' records say:"
        yield from (f"  {line}" for line in result.changes)
    else:
        yield "Versions, weights, hardware and engine are as the runs' records say."
    yield "The order of requests never changes an answer. What else is in the batch can, in bfloat16; in"
    yield "float32 on a CPU it changes the last bits of log-probabilities. On GPUs, VLLM_BATCH_INVARIANT=1"
    yield "prevents it."


def _sample(folder: Path, sample: int, seed: int, models: str | None) -> tuple[int, Sequence[Row]]:
    answers = scan(folder).filter(pl.col("provider").is_in(PROVIDERS), pl.col("error").is_null())
    ids = answers.select("request_id", "model").collect()
    if models is not None:
        names = [name for name in ids["model"].unique() if fnmatchcase(name, models)]
        ids = ids.filter(pl.col("model").is_in(names))
    if ids.is_empty():
        which = "local models" if models is None else f"local models that match {printable(models)!r}"
        raise StoreError(
            f"{printable(folder)}: holds no answers of {which}; those of APIs cannot be reproduced"
        )
    chosen = ids["request_id"].sort()
    if sample < len(chosen):
        # Python's generator draws the same in every version, that of polars need not.
        chosen = chosen.gather(random.Random(seed).sample(range(len(chosen)), sample))  # noqa: S311
    rows = answers.filter(pl.col("request_id").is_in(chosen.implode())).select(*ASKED, *ANSWERED)
    return len(ids), rows.sort("model", "temperature", "request_id").collect().to_dicts()


def _local_config(folder: Path, run_id: str, records: Records) -> str:
    """What a run's record says that local models were asked with, as a config in JSON."""
    shown = printable(record_path(folder, run_id))
    record = records.get(run_id) or {}
    try:
        config = record["config"]
        settings = {key: config[key] for key in ("seed",) if key in config}
        text = json.dumps(settings | {"models": [one for one in config["models"] if one["type"] in TYPES]})
        Config.model_validate_json(text)
    except (TypeError, LookupError):
        raise StoreError(
            f"{shown}: does not say what was asked; restore it, or leave its models out by --models"
        ) from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise StoreError(f"{shown}: config.{place}: {printable(problem['msg'])}; restore it") from None
    return text


def _groups(folder: Path, config: Config, rows: Sequence[Row]) -> Iterator[tuple[Group, dict[str, Request]]]:
    """What each engine has to answer: the requests whose ids are those of the rows."""
    wanted = {row["request_id"] for row in rows}
    prompts = {row["prompt_id"]: _prompt(row) for row in rows}
    found: list[tuple[Group, dict[str, Request]]] = []
    for lane in make_lanes(config):
        for group in lane.groups:
            requests = group_requests(config, group, prompts.values())
            asked = {one.request_id: one for one in requests if one.request_id in wanted}
            if asked:
                found.append((group, asked))
                wanted -= asked.keys()
    if wanted:
        row = next(row for row in rows if row["request_id"] in wanted)
        raise StoreError(
            f"{printable(record_path(folder, row['run_id']))}: its config does not ask what the store has of "
            f"{printable(row['model'])} on prompt {printable(row['prompt_id'])!r}; see `hallubench verify`"
        )
    yield from found


def _prompt(row: Row) -> Prompt:
    turns = row["messages"]
    return Prompt(
        id=row["prompt_id"],
        index=row["prompt_index"],
        text=row["prompt"],
        messages=None if turns is None else tuple(Message(turn["role"], turn["content"]) for turn in turns),
    )


async def _ask(
    group: Group,
    config: Config,
    requests: Sequence[Request],
    facts: dict[str, list[Any]],
    notify: Callable[[str], None],
) -> dict[How, dict[str, Completion]]:
    """Ask each request alone and then all of them together, of one engine."""
    logs = Path(tempfile.mkdtemp(prefix="hallubench-"))
    context = Context(
        config=config,
        entries=group.entries,
        run_id=new_run_id(datetime.now(UTC)),
        runs_dir=logs,
        record=lambda name, fact: facts[name].append(fact),
        notify=notify,
    )
    again: dict[How, dict[str, Completion]] = {"alone": {}, "in a batch": {}}
    try:
        async with open_provider(group.entries[0].type, context) as provider:
            batches: list[tuple[How, Sequence[Request]]] = [("alone", [one]) for one in requests]
            for how, batch in [*batches, ("in a batch", requests)]:
                async with aclosing(provider.generate(iter(batch))) as completions:
                    async for completion in completions:
                        again[how][completion.request_id] = completion
    except HallubenchError:
        raise
    except Exception as error:
        raise LaneError(f"{group.name}: unexpected {type(error).__name__}: {printable(error)}") from error
    shutil.rmtree(logs)  # kept if the engine failed: the error names its log
    return again


def _compare(rows: Sequence[Row], again: Mapping[How, Mapping[str, Completion]]) -> Iterator[Agreement]:
    settings = dict.fromkeys((row["model"], row["temperature"]) for row in rows)
    for model, temperature in settings:
        for how, completions in again.items():
            agreement = Agreement(model, temperature, how)
            for row in rows:
                if (row["model"], row["temperature"]) == (model, temperature):
                    _add(agreement, row, completions[row["request_id"]])
            yield agreement


def _add(agreement: Agreement, row: Row, completion: Completion) -> None:
    agreement.answers += 1
    agreement.texts += row["full_response"] == completion.text
    logprobs, stored_ids = completion.logprobs, row["output_token_ids"]
    if logprobs is not None and stored_ids is not None:
        ids = logprobs.token_ids.tolist()
        agreement.tokens = (agreement.tokens or 0) + (ids == stored_ids)
        common = sum(1 for _ in takewhile(bool, map(eq, ids, stored_ids)))
        if ids != stored_ids:
            earlier = agreement.first_difference
            agreement.first_difference = common if earlier is None else min(common, earlier)
        agreement.logprob_difference = _largest(
            agreement.logprob_difference, row["output_logprobs"][:common], logprobs
        )
    prompt_logprobs = completion.prompt_logprobs
    if prompt_logprobs is not None and row["prompt_logprobs"] is not None:
        agreement.prompt_logprob_difference = _largest(
            agreement.prompt_logprob_difference, row["prompt_logprobs"], prompt_logprobs
        )


def _largest(so_far: float | None, stored: Sequence[float | None], again: Logprobs) -> float | None:
    pairs: Iterable[tuple[float | None, float]] = zip(stored, again.logprobs, strict=False)
    found = [abs(one - other) for one, other in pairs if one is not None and not math.isnan(other)]
    return max([*found, *([] if so_far is None else [so_far])], default=None)
