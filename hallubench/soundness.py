"""What makes a part of a store sound: it is as it was written, and each row agrees with itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hallubench.errors import StoreError
from hallubench.findings import Finding, Remedy
from hallubench.parts import DAMAGE, MARK, ORDER, Source, model_folder
from hallubench.plan import request_id, settings_hash
from hallubench.schema import SCHEMA
from hallubench.seal import is_intact
from hallubench.text import printable
from hallubench.types import Message, Prompt, SamplingParams

IDENTITY = ("run_id", "request_id", "prompt_id", "prompt_index", "sample_index", "provider", "model")
"""Columns without which a row cannot be told from others."""
LONGEST_RUN_ID = 200
"""In bytes: files are named for it."""
_OF_THE_ID = (
    *("request_id", "prompt_id", "prompt", "messages", "sample_index", "seed", "provider", "model"),
    *("system_prompt", "temperature", "top_p", "top_k", "max_tokens", "stop", "options"),
)
"""A request's id, and what it is a hash of."""


class Verdict(NamedTuple):
    """What rows say of themselves."""

    contradictions: Mapping[str, pl.Series]
    """What is wrong, as the end of "3 of 9 rows ...", and with which rows."""
    unchecked: Mapping[str, pl.Series]
    """Why an id cannot be checked, as the end of "3 of 9 rows ...", and of which rows."""


def inspect_part(part: Source, path: Path, asked: Collection[str]) -> tuple[int, list[Finding]]:
    """Read a part from its beginning to its end.

    Args:
        part: where it is read from.
        path: where it lies, in the folder of its model.
        asked: as for `judge`.

    Returns:
        The number of its rows, and what is to be said of it.

    Raises:
        StoreError: it is of another version of hallubench.
        FileNotFoundError: it is gone.
        PermissionError: it may not be read.
    """
    try:
        with ExitStack() as opened:
            stream = opened.enter_context(part.open("rb")) if isinstance(part, Path) else part
            intact = is_intact(stream)
        file = open_part(part)
    except (FileNotFoundError, PermissionError):
        raise
    except DAMAGE as error:
        return 0, [Finding(path, f"is not a whole Parquet file ({printable(error, 80)})", Remedy.MOVE)]
    with file:
        mark = (file.metadata.metadata or {}).get(MARK)
        if mark is None:
            return 0, [Finding(path, "was not written by hallubench", Remedy.MOVE)]
        if mark != SCHEMA.metadata[MARK]:
            raise StoreError(f"{printable(path)}: written by another version of hallubench; use that one")
        if not file.schema_arrow.equals(SCHEMA):
            return 0, [Finding(path, "has other columns than a part", Remedy.MOVE)]
        findings = list(_check_rows(file, path, asked))
        if not intact and not any(finding.is_fault for finding in findings):
            findings.append(
                Finding(path, "is not as it was written, but all of it can be read", Remedy.SAVE_ROWS)
            )
        return file.metadata.num_rows, findings


def open_part(part: Source) -> pq.ParquetFile:
    """A part whose pages are compared with their checksums as they are read."""
    return pq.ParquetFile(part, pre_buffer=False, page_checksum_verification=True)


def read_row_groups(file: pq.ParquetFile) -> Iterator[pa.Table | None]:
    """The rows of a part, a row group in memory at a time; None for one that cannot be decoded."""
    for number in range(file.num_row_groups):
        try:
            table = file.read_row_group(number, use_threads=False)
            table.validate(full=True)  # without a checksum, text might not be UTF-8
        except DAMAGE:
            yield None
        else:
            yield pa.Table.from_arrays(table.columns, schema=SCHEMA)  # the footer's words may be wrong


def judge(rows: pl.DataFrame, asked: Collection[str]) -> Verdict:
    """Look for contradictions in each row.

    Args:
        rows: of a store, with all columns.
        asked: runs whose record says that they asked what they stored; the rows of others, such as imported
            results, may have any id.
    """
    contradictions = rows.select(**_CONTRADICTIONS).fill_null(value=False).to_dict()
    named = rows.select(_OF_THE_ID).iter_rows(named=True)
    unlike = pl.Series([not _id_follows(row) for row in named], dtype=pl.Boolean)
    foreign = ~rows["run_id"].is_in(list(asked)).fill_null(value=False)
    replaced = rows.select(_HOLDS_REPLACED_TEXT).to_series()
    # Of what was imported the prompt may be unknown.
    unprompted = rows["prompt"].is_null() & rows["messages"].is_null()
    contradictions["have neither a prompt nor messages"] = unprompted & ~foreign
    contradictions["do not hold what their request_id is a hash of"] = unlike & ~foreign & ~replaced
    unchecked = {
        "were imported, or their run left no record: their ids are their own": unlike & foreign,
        "hold U+FFFD, text that was not Unicode: their ids cannot be checked": unlike & ~foreign & replaced,
    }
    return Verdict(contradictions, unchecked)


def model_folders_of(rows: pl.DataFrame) -> pl.Series:
    """The name of the folder where each row belongs."""
    models = rows["model"]
    names = {model: model_folder(model) for model in models.unique() if model is not None}
    return models.replace_strict(names, default=None, return_dtype=pl.String)


def goes_on(rows: pl.DataFrame, last: pl.DataFrame | None) -> bool:
    """Whether rows are in `ORDER` and come after another one, if there is one."""
    keys = rows.select(ORDER)
    if last is not None:
        keys = pl.concat([last.select(ORDER), keys])
    return keys.equals(keys.sort(ORDER, maintain_order=True))


def _check_rows(file: pq.ParquetFile, path: Path, asked: Collection[str]) -> Iterator[Finding]:
    read = lost = misplaced = 0
    wrong: Counter[str] = Counter()
    unchecked: Counter[str] = Counter()
    hashes = [pl.Series(dtype=pl.UInt64)]
    last: pl.DataFrame | None = None
    in_order = True
    for table in read_row_groups(file):
        if table is None:
            lost += 1
            continue
        rows = pl.DataFrame(table)
        verdict = judge(rows, asked)
        wrong.update({what: int(which.sum()) for what, which in verdict.contradictions.items()})
        unchecked.update({what: int(which.sum()) for what, which in verdict.unchecked.items()})
        misplaced += int((model_folders_of(rows) != path.parent.name).sum())
        in_order = in_order and goes_on(rows, last)
        last = rows.tail(1).select(ORDER)
        hashes.append(rows["request_id"].hash())
        read += rows.height
    ids = pl.concat(hashes)
    total = file.metadata.num_rows
    if lost:
        remedy = Remedy.SAVE_ROWS if read else Remedy.MOVE
        yield Finding(path, f"{total - read} of {total} rows cannot be read", remedy)
    wrong["belong into the folder of another model"] = misplaced
    wrong["answer a request that another one answers"] = len(ids) - ids.n_unique()
    for what, count in wrong.items():
        if count:
            yield Finding(path, f"{count} of {total} rows {what}", Remedy.SAVE_ROWS)
    if not in_order:
        yield Finding(path, f"its rows are not by {', '.join(ORDER)}", Remedy.SAVE_ROWS)
    for what, count in unchecked.items():
        if count:
            yield Finding(path, f"{count} of {total} rows {what}", is_fault=False)


def _uneven(prefix: str) -> pl.Expr:
    """Whether a row's lists, one value a token, differ in length, or at a token those of its alternatives."""
    alternatives = [pl.col(f"{prefix}_{name}") for name in ("top_token_ids", "top_tokens", "top_logprobs")]
    tokens = [pl.col(f"{prefix}_{name}") for name in ("token_ids", "token_texts", "logprobs", "ranks")]
    lengths = [column.list.len() for column in (*tokens, *alternatives)]
    ids, texts, logprobs = (column.list.eval(pl.element().list.len()) for column in alternatives)
    return (pl.min_horizontal(lengths) != pl.max_horizontal(lengths)) | (ids != texts) | (ids != logprobs)


def _id_follows(row: Mapping[str, Any]) -> bool:
    """Whether a row has the id that its request would be given."""
    if row["prompt_id"] is None:
        return False
    params = SamplingParams(
        max_tokens=row["max_tokens"],
        temperature=row["temperature"],
        top_p=row["top_p"],
        top_k=row["top_k"],
        stop=tuple(row["stop"] or ()),
    )
    try:
        options = json.loads(row["options"] or "{}")
    except (ValueError, RecursionError):
        return False
    settings = settings_hash(row["provider"], row["model"], row["system_prompt"], params, options)
    turns = None if row["messages"] is None else tuple(Message(**turn) for turn in row["messages"])
    prompt = Prompt(id=row["prompt_id"], index=0, text=row["prompt"], messages=turns)
    return bool(row["request_id"] == request_id(settings, prompt, row["sample_index"], row["seed"]))


_CONTRADICTIONS = {
    "have both an answer and an error, or neither": (
        pl.col("full_response").is_null() == pl.col("error").is_null()
    ),
    "have both a prompt and messages": pl.col("prompt").is_not_null() & pl.col("messages").is_not_null(),
    "have lists of unequal length for the same tokens": _uneven("output") | _uneven("prompt"),
    "lack one of " + ", ".join(IDENTITY): pl.any_horizontal(pl.col(IDENTITY).is_null()),
    "have a run_id that can name no file": (
        pl.col("run_id").str.contains(r"[/\x00]") | (pl.col("run_id").str.len_bytes() > LONGEST_RUN_ID)
    ),
}
_HOLDS_REPLACED_TEXT = pl.any_horizontal(
    pl.col("model", "system_prompt", "prompt_id", "prompt").str.contains("\ufffd", literal=True),
    pl.col("stop").list.join("").str.contains("\ufffd", literal=True),
    pl.col("messages")
    .list.eval(pl.element().struct.field("content"))
    .list.join("")
    .str.contains("\ufffd", literal=True),
).fill_null(value=False)
