"""What human annotators found, as it comes back in CSV files, on its way to the answers of a store.

    prompt_id,model,annotator,hallucination_binary,hallucination_types,severity,citation_correctness,notes
    prompt_0001,model-3f2a,annotator-1,1,"unsupported claim, fabricated package",high,fabricated,no such CVE

`prompt_id`, `model` and the label columns have to be there; the files of `hallubench export-annotations` have
them all. An empty cell is an absent value, a column of another name is passed over, and case does not matter.

    hallucination_binary    1 or 0, also true/false and yes/no
    hallucination_types     any words, separated by commas, semicolons or bars
    severity                low, medium or high
    citation_correctness    correct, partially correct, incorrect or fabricated
    annotator               who; may be left out where there is only one
    temperature,            which answer, where prompt_id and model
    sample_index,           alone do not say
    request_id
    response                what was annotated; it has to be what the store holds

A model is named as in the store, or by its code in a `model-key.csv` beside the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl

from hallubench.annotation_batches import FORMULA, KEY_COLUMNS, KEY_FILE, LABELS
from hallubench.errors import AnnotationError
from hallubench.labels import cohen_kappa
from hallubench.store import scan
from hallubench.text import printable
from hallubench.text_file import LineError, read_csv

REQUIRED = ("prompt_id", "model", *LABELS)
ANSWER = ("request_id", "prompt_id", "model", "temperature", "sample_index")
"""The columns that name an answer, as the store has them."""
NONE = {"", "n/a", "na", "none"}
BINARY = {
    "1": True,
    "1.0": True,
    "true": True,
    "yes": True,
    "0": False,
    "0.0": False,
    "false": False,
    "no": False,
}
SEVERITY = {"low": "low", "medium": "medium", "high": "high"}
CITATION = {
    "correct": "correct",
    "partially": "partially correct",
    "partially correct": "partially correct",
    "incorrect": "incorrect",
    "fabricated": "fabricated",
}
COMPARED = 200
"""Letters and digits of a response that are compared: a spreadsheet cuts long cells, and changes the rest."""
OTHER_SIGNS = "[^0-9A-Za-z]"

_LINE = pl.Schema(
    {
        "place": pl.String(),
        "request_id": pl.String(),
        "prompt_id": pl.String(),
        "model": pl.String(),
        "temperature": pl.Float64(),
        "sample_index": pl.Int32(),
        "response": pl.String(),
        "annotator": pl.String(),
        "hallucination_binary": pl.Boolean(),
        "hallucination_types": pl.List(pl.String()),
        "severity": pl.String(),
        "citation_correctness": pl.String(),
        "notes": pl.String(),
    }
)
"""A line as it was read: `place` names its file and number, `response` is what is compared of it."""
_AGREEMENT = pl.Schema(
    {
        "first": pl.String(),
        "second": pl.String(),
        "answers": pl.Int64(),
        "agreement": pl.Float64(),
        "kappa": pl.Float64(),
    }
)


def load_annotations(
    files: str | Path | Iterable[str | Path], folder: str | Path, *, key: str | Path | None = None
) -> pl.DataFrame:
    """Read the annotations of a store's answers.

    Args:
        files: the CSV files.
        folder: of the store.
        key: which code is which model; by default the `model-key.csv` beside each file, if there is one.

    Returns:
        A row for each annotated answer and annotator; lines without any label are left out. `request_id`,
        by which it joins on `scan(folder)`, `prompt_id`, `model`, `temperature` and `sample_index` are as in
        the store; `annotator` (String), `hallucination_binary` (Boolean), `hallucination_types` (List of
        String: lower case, sorted), `severity`, `citation_correctness` (String: lower case) and `notes`
        (String) as given, null where not.

    Raises:
        AnnotationError: a file cannot be read, a value is wrong, or a line annotates no answer of the store,
            more than one, or one that the same annotator has annotated already. Names the file and the line.
        StoreError: there is no store in the folder.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    folder, key = Path(folder), None if key is None else Path(key)
    lines = [line for path in paths for line in _labelled_lines(path, _read_key(path, key))]
    annotations = _resolve(pl.DataFrame(lines, schema=_LINE), folder)
    _refuse_repeated(annotations)
    _refuse_other_responses(annotations, folder)
    return annotations.select(*ANSWER, "annotator", *LABELS)


def agreement(annotations: pl.DataFrame, label: str = "hallucination_binary") -> pl.DataFrame:
    """How far each two annotators agree on the answers that both have labelled.

    Args:
        annotations: from `load_annotations`.
        label: the column that is compared.

    Returns:
        A row for each two annotators: `first`, `second`, `answers` (how many both labelled), `agreement` (the
        share of them with the same label; null if there are none) and `kappa` (null where it is undefined).
    """
    names = sorted(annotations["annotator"].drop_nulls().unique())
    of = {name: annotations.filter(annotator=name).select("request_id", label) for name in names}
    rows = []
    for first, second in combinations(names, 2):
        both = of[first].join(of[second], on="request_id", suffix="_of_second").drop_nulls()
        one, other = both[label], both[f"{label}_of_second"]
        rows.append((first, second, len(both), (one == other).mean(), cohen_kappa(one, other)))
    return pl.DataFrame(rows, schema=_AGREEMENT, orient="row")


# A file's lines.


def _read_key(path: Path, key: Path | None) -> dict[str, dict[str, str]]:
    """What each code in a file of annotations stands for, by the columns that name an answer."""
    if key is None:
        key = path.with_name(KEY_FILE)
        if not key.exists():
            return {}
    return {cells.pop("code"): cells for _, cells in _rows(key, KEY_COLUMNS) if "code" in cells}


def _labelled_lines(path: Path, key: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    for number, cells in _rows(path, REQUIRED):
        if cells.keys().isdisjoint(LABELS):
            continue
        place = f"{printable(path)}: line {number}"
        try:
            values = _line({**cells, **key.get(cells.get("model", ""), {})})
        except ValueError as problem:
            raise AnnotationError(f"{place}: {problem}") from None
        yield {"place": place} | values


def _rows(path: Path, required: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with their lines, without the apostrophes of `neutral`."""
    columns: list[str] = []

    def check(header: list[str]) -> None:
        columns.extend(header)
        if missing := [name for name in required if name not in header]:
            raise LineError(
                f"no column {', '.join(missing)}: add it, and save the file as comma-separated CSV"
            )
        if repeated := {name for name in header if name in _LINE and header.count(name) > 1}:
            raise LineError(f"two columns are named {min(repeated)}: rename one")

    try:
        for number, cells in read_csv(path, check):
            yield number, {name: re.sub(rf"^'(?={FORMULA}|')", "", cell) for name, cell in cells.items()}
        if not columns:
            raise LineError("holds nothing: give a file of annotations")
    except LineError as problem:
        raise AnnotationError(f"{printable(path)}: {problem}") from None
    except OSError as error:
        reason = printable(error.strerror or error)
        raise AnnotationError(f"{printable(path)}: cannot be read ({reason}): check the file") from None


def _line(cells: Mapping[str, str]) -> dict[str, Any]:
    """The values of a line.

    Raises:
        ValueError: one of them is wrong.
    """
    for name in ("prompt_id", "model"):
        if name not in cells:
            raise ValueError(f"no {name}: fill it as it was exported")
    texts = ("request_id", "prompt_id", "model", "annotator", "notes")
    return {name: cells.get(name) for name in texts} | {
        "response": re.sub(OTHER_SIGNS, "", cells["response"])[:COMPARED] if "response" in cells else None,
        "temperature": _number(cells, "temperature", float),
        "sample_index": _number(cells, "sample_index", int),
        "hallucination_binary": _one_of(BINARY, cells, "hallucination_binary", wanted="1 or 0"),
        "hallucination_types": _types(cells.get("hallucination_types", "")),
        "severity": _one_of(SEVERITY, cells, "severity"),
        "citation_correctness": _one_of(CITATION, cells, "citation_correctness"),
    }


def _number(cells: Mapping[str, str], name: str, kind: type[int | float]) -> float | None:
    if name not in cells:
        return None
    try:
        number = float(cells[name])
        if math.isfinite(number) and kind(number) == number:
            return kind(number)
    except ValueError:
        pass
    wanted = "a number, such as 0.7" if kind is float else "a whole number"
    raise ValueError(f"{name} is {printable(cells[name], 60)!r}: write {wanted}")


def _one_of(
    values: Mapping[str, Any], cells: Mapping[str, str], name: str, *, wanted: str | None = None
) -> Any:
    word = _word(cells.get(name, ""))
    if word in NONE:
        return None
    if word not in values:
        wanted = wanted or ", ".join(dict.fromkeys(values.values()))
        raise ValueError(f"{name} is {printable(cells[name], 60)!r}: write {wanted}, or leave it empty")
    return values[word]


def _types(cell: str) -> list[str]:
    return sorted({_word(part) for part in re.split("[,;|]", cell)} - NONE)


def _word(text: str) -> str:
    return " ".join(re.split(r"[\s_-]+", text.strip().lower()))


# The answers that they are about.


def _resolve(lines: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """The lines with the names that the store has for the answers they annotate."""
    lines = lines.with_row_index("line")
    asked = {name: pl.col(f"{name}_asked") for name in ANSWER if name != "prompt_id"}
    # A request id says which answer: beside it a model may be a code without its key.
    model = asked.pop("model") == pl.col("model")
    fits = [asked["request_id"].is_not_null() | model]
    fits += [value.is_null() | (value == pl.col(name)) for name, value in asked.items()]
    answers = scan(folder).filter(pl.col("error").is_null()).select(ANSWER)
    candidates = answers.join(lines.lazy().select("line", *ANSWER), on="prompt_id", suffix="_asked")
    found = candidates.filter(*fits).collect(engine="streaming")
    _refuse_unknown(lines, found, folder)
    _refuse_ambiguous(lines, found)
    return lines.drop(ANSWER).join(found.select("line", *ANSWER), on="line", maintain_order="left")


def _refuse_unknown(lines: pl.DataFrame, found: pl.DataFrame, folder: Path) -> None:
    if line := _first(lines.filter(~pl.col("line").is_in(found["line"].implode()))):
        what = ", ".join(f"{name} {printable(line[name], 60)}" for name in ANSWER if line[name] is not None)
        raise AnnotationError(
            f"{line['place']}: {printable(folder)} has no answer of {what}: correct the line, or give the "
            f"folder that was annotated, and its {KEY_FILE}"
        )


def _refuse_ambiguous(lines: pl.DataFrame, found: pl.DataFrame) -> None:
    several = pl.col("temperature", "sample_index").n_unique() > 1
    counts = found.group_by("line").agg(several, answers=pl.len()).filter(pl.col("answers") > 1)
    if count := _first(counts.sort("line")):
        line = lines.row(count["line"], named=True)
        columns = [name for name in ("temperature", "sample_index") if count[name]] or ["request_id"]
        raise AnnotationError(
            f"{line['place']}: {count['answers']} answers of {printable(line['model'], 60)} to "
            f"{printable(line['prompt_id'], 60)} may be meant: say which in a column {' and '.join(columns)}"
        )


def _refuse_repeated(annotations: pl.DataFrame) -> None:
    by = ("request_id", "annotator")
    first = pl.col("place").first().over(by).alias("first")
    if line := _first(annotations.with_columns(first).filter(~pl.struct(by).is_first_distinct())):
        who = "nobody named" if line["annotator"] is None else printable(line["annotator"], 60)
        raise AnnotationError(
            f"{line['place']}: its answer is annotated by {who} already, in {line['first']}: remove one, or "
            "say in a column annotator who is who"
        )


def _refuse_other_responses(annotations: pl.DataFrame, folder: Path) -> None:
    given = annotations.filter(pl.col("response").is_not_null())
    answers = scan(folder).filter(pl.col("request_id").is_in(given["request_id"].implode()))
    begin = pl.col("full_response").str.replace_all(OTHER_SIGNS, "").str.head(COMPARED)
    stored = answers.select("request_id", begin).collect(engine="streaming")
    compared = given.join(stored, on="request_id", maintain_order="left")
    if line := _first(compared.filter(pl.col("response") != pl.col("full_response"))):
        raise AnnotationError(
            f"{line['place']}: {printable(folder)} holds another response, since it was asked again: "
            "annotate that one, or give the folder that was annotated"
        )


def _first(rows: pl.DataFrame) -> dict[str, Any] | None:
    return None if rows.is_empty() else rows.row(0, named=True)
