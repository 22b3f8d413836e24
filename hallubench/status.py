"""The legacy summary of a store: for each model and temperature, what was answered and at what price."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from hallubench.store import RUNS, scan
from hallubench.text import aligned, printable

MEASURES = {
    # Of a million ids the hashes fit into memory easily.
    "prompts": pl.col("prompt_id").hash().n_unique(),
    "successes": pl.col("error").is_null().sum(),
    "errors": pl.col("error").is_not_null().sum(),
    "truncated": (pl.col("finish_reason") == "length").sum(),
    "mean_seconds": pl.col("elapsed_seconds").filter(pl.col("error").is_null()).mean(),
    "input_tokens": pl.col("input_tokens").sum(),
    "output_tokens": pl.col("output_tokens").sum(),
}


def summarize(folder: Path) -> pl.DataFrame:
    """One row for each model and temperature of a store.

    Raises:
        StoreError: the folder holds no store.
    """
    return (
        scan(folder)
        .group_by("provider", "model", "temperature")
        .agg(**MEASURES)
        .sort("provider", "model", "temperature")
        .collect(engine="streaming")
    )


def summary_lines(summary: pl.DataFrame) -> Iterator[str]:
    """The summary as an aligned table, a header first."""
    header = [
        "model",
        "temp",
        "prompts",
        "successes",
        "errors",
        "truncated",
        "mean s",
        "tokens in",
        "tokens out",
    ]
    rows = [
        [
            printable(row["model"], longest=60),
            "-" if row["temperature"] is None else f"{row['temperature']:g}",
            f"{row['prompts']}",
            f"{row['successes']}",
            f"{row['errors']}",
            f"{row['truncated']}",
            "-" if row["mean_seconds"] is None else f"{row['mean_seconds']:.2f}",
            f"{row['input_tokens']:,}",
            f"{row['output_tokens']:,}",
        ]
        for row in summary.iter_rows(named=True)
    ]
    yield from aligned([header, *rows])


def record_errors(folder: Path) -> pl.DataFrame:
    """How often each kind of error is the newest word on a request, with one message as an example."""
    return (
        scan(folder)
        .filter(pl.col("error").is_not_null())
        .group_by("model", "error_type")
        .agg(requests=pl.len(), example=pl.col("error").first())
        .sort("model", "error_type")
        .collect(engine="streaming")
    )


def status_lines(folder: Path) -> Iterator[str]:
    """What `hallubench status` prints: the summary, the errors, and the runs that wrote the store."""
    yield from summary_lines(summarize(folder))
    for row in record_errors(folder).iter_rows(named=True):
        model, kind = printable(row["model"], longest=60), printable(row["error_type"])
        yield f"{row['requests']} of {model} failed with {kind}: {printable(row['example'], longest=200)}"
    for path in sorted((folder / RUNS).glob("*.json")):
        yield _run_line(path)


def _run_line(path: Path) -> str:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in record["counts"].items())
        return printable(f"run {record['run_id']}: {record['status']}{f' ({counts})' if counts else ''}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"run {printable(path.stem)}: its record cannot be read ({printable(path)})"
