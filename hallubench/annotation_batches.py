"""The store -> CSV batches for human annotators: blind, shuffled, one file for each of them.

    annotator-1.csv    prompt_id, model, annotator, hallucination_binary, hallucination_types, severity,
                       citation_correctness, notes, prompt, response, request_id
    model-key.csv      code, model, temperature, sample_index; not for annotators

An annotator fills the columns from `hallucination_binary` to `notes`, and leaves the others as they are.
`model` holds a code (model-3f2a) for a model as it was asked: its temperature, its other settings, and which
of its samples. So nobody sees which model or temperature an answer is from, and (prompt_id, model), by which
annotation tools know an answer, names only one. `request_id` joins on the store, the key on models.

A spreadsheet takes a cell that begins with = + - @, a tab or a carriage return for a formula. Such a cell,
and one that begins with an apostrophe, gets an apostrophe in front (`neutral`); `annotations` takes it off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import polars as pl

from hallubench.errors import StoreError
from hallubench.export_folder import alone_in, replace_exports
from hallubench.legacy import SETTINGS
from hallubench.store import scan
from hallubench.text import printable

LABELS = ("hallucination_binary", "hallucination_types", "severity", "citation_correctness", "notes")
"""The columns that an annotator fills."""
COLUMNS = ("prompt_id", "model", "annotator", *LABELS, "prompt", "response", "request_id")
KEY_FILE = "model-key.csv"
KEY_COLUMNS = ("code", "model", "temperature", "sample_index")
FORMULA = r"[=+\-@\t\r]"
"""What a formula begins with, for a spreadsheet."""

ROWS_AT_ONCE = 10_000
"""Answers whose texts are in memory at a time, some 50 MB; the store is read once for each so many."""
SHORTEST_CODE = 4


@dataclass(frozen=True, slots=True)
class Batches:
    """What was written."""

    files: Mapping[Path, int]
    """The batches, each with its number of answers."""
    key: Path
    shared: int
    """Answers that every annotator has."""
    errors: int
    """Requests that have no answer, and were left out."""


def export_batches(
    folder: Path,
    *,
    output: Path | None = None,
    annotators: int = 2,
    overlap: float = 1.0,
    seed: int = 42,
    models: str | None = None,
) -> Batches:
    """Write the answers of a store for annotators; memory does not grow with their texts.

    The same store and seed give the same files. A store that has grown keeps the codes of its models.

    Args:
        folder: of the store.
        output: where the files go; `folder`/annotation by default.
        annotators: how many; at least 1.
        overlap: the share of answers that every annotator gets, 0 to 1; the others are dealt out evenly.
        seed: of the order, of who gets what, and of the codes.
        models: a glob; only models whose name matches.

    Raises:
        StoreError: the folder holds no such answers, `output` cannot be used, or it holds batches already.
        DiskError: the files cannot be written; none was.
    """
    rows = scan(folder)
    if models is not None:
        names = rows.select("model").unique().collect(engine="streaming")["model"]
        rows = rows.filter(pl.col("model").is_in([name for name in names if fnmatchcase(name, models)]))
    answers = rows.filter(pl.col("error").is_null())
    variants = _variants(answers, seed)
    if variants.is_empty():
        which = "" if models is None else f" of models that match {models!r}"
        raise StoreError(f"{printable(folder)}: holds no answers{which}; see `hallubench status`")
    ids = answers.select("request_id").collect(engine="streaming")["request_id"].to_list()
    shared, batches = _deal(ids, annotators, overlap, seed)
    target = folder / "annotation" if output is None else output
    files = {target / f"{annotator}.csv": batch for annotator, batch in batches.items()}
    key = target / KEY_FILE
    with alone_in(target):
        for path in (key, *files):
            if path.exists():
                raise StoreError(
                    f"{printable(path)}: is there already and may hold an annotator's work; move it away, or "
                    "choose another --output"
                )
        documents: dict[Path, Iterable[bytes]] = {key: [_csv(variants.select(KEY_COLUMNS), header=True)]}
        for path, batch in files.items():
            documents[path] = _batch(answers, variants, path.stem, batch)
        replace_exports(target, [], documents)
    errors = rows.filter(pl.col("error").is_not_null()).select(pl.len()).collect(engine="streaming").item()
    return Batches({path: len(batch) for path, batch in files.items()}, key, shared, errors)


def export_lines(batches: Batches) -> Iterator[str]:
    """What `hallubench export-annotations` prints."""
    for path, answers in batches.files.items():
        yield f"{printable(path, longest=1000)}: {answers} answers, {batches.shared} of them in every batch"
    yield f"{printable(batches.key, longest=1000)}: which model is which; keep it from the annotators"
    if batches.errors:
        yield f"Left out, since they failed: {batches.errors}; `hallubench generate` asks them again"


def neutral(text: pl.Expr) -> pl.Expr:
    """Cells that no spreadsheet takes for a formula: an apostrophe stands before what could be one."""
    return text.str.replace(rf"^({FORMULA}|')", "'${1}")


def _variants(answers: pl.LazyFrame, seed: int) -> pl.DataFrame:
    """A row for each model as it was asked: `variant` tells it apart, and the columns of the key."""
    found = (
        answers.select(_variant(), "model", "temperature", "sample_index")
        .unique()
        .sort("variant")
        .collect(engine="streaming")
    )
    digests = [hashlib.blake2b(f"{seed} {variant}".encode()).hexdigest() for variant in found["variant"]]
    length = SHORTEST_CODE
    while len({digest[:length] for digest in digests}) < len(digests):
        length += 1
    codes = pl.Series("code", [f"model-{digest[:length]}" for digest in digests], dtype=pl.String)
    return found.with_columns(codes, neutral(pl.col("model"))).sort(
        "model", "temperature", "sample_index", "code"
    )


def _variant() -> pl.Expr:
    """What tells the variants of a model apart, as JSON."""
    settings = [column.alias(name) for name, column in SETTINGS.items()]
    return pl.struct("sample_index", *settings).struct.json_encode().alias("variant")


def _deal(ids: Iterable[str], annotators: int, overlap: float, seed: int) -> tuple[int, dict[str, list[str]]]:
    """How many answers are shared, and the request ids that each annotator gets, in their order."""
    order = _shuffled(ids, f"{seed} overlap")
    shared = round(overlap * len(order))
    names = [f"annotator-{number}" for number in range(1, annotators + 1)]
    return shared, {
        name: _shuffled(order[:shared] + order[shared + place :: annotators], f"{seed} {name}")
        for place, name in enumerate(names)
    }


def _shuffled(ids: Iterable[str], seed: str) -> list[str]:
    # By a hash: the same in every version of Python, and answers that come later do not mix up the others.
    return sorted(ids, key=lambda id_: hashlib.blake2b(f"{seed} {id_}".encode(), digest_size=16).digest())


def _batch(
    answers: pl.LazyFrame, variants: pl.DataFrame, annotator: str, ids: Sequence[str]
) -> Iterator[bytes]:
    """The CSV of one batch, piece by piece."""
    turn = pl.element().struct
    turns = pl.col("messages").list.eval(
        pl.concat_str(turn.field("role"), pl.lit(": "), turn.field("content"))
    )
    empty = [pl.lit(None, pl.String).alias(label) for label in LABELS]
    for start in range(0, max(1, len(ids)), ROWS_AT_ONCE):
        some = pl.DataFrame(
            {"request_id": ids[start : start + ROWS_AT_ONCE]}, schema={"request_id": pl.String}
        )
        texts = (
            answers.filter(pl.col("request_id").is_in(some["request_id"].implode()))
            .select(
                _variant(),
                "request_id",
                neutral(pl.col("prompt_id")),
                neutral(pl.coalesce("prompt", turns.list.join("\n\n"))).alias("prompt"),
                neutral(pl.col("full_response")).alias("response"),
            )
            .collect(engine="streaming")
        )
        rows = some.join(texts, on="request_id", how="left", maintain_order="left")
        codes = rows["variant"].replace_strict(variants["variant"], variants["code"], return_dtype=pl.String)
        rows = rows.with_columns(codes.alias("model"), *empty, annotator=pl.lit(annotator))
        yield _csv(rows.select(COLUMNS), header=start == 0)


def _csv(rows: pl.DataFrame, *, header: bool) -> bytes:
    # Everything in quotes: a bare carriage return would end a row.
    return rows.write_csv(include_header=header, quote_style="always").encode()
