"""Rows of several parts, merged in order and in flat memory: what compaction and the exporter are made of."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hallubench.parts import ORDER, Source, scan_parts

BATCH_BYTES = 2 * 2**20
"""Of the rows of one part that are in memory at a time."""
LONGEST_BATCH = 1024

_Place: TypeAlias = tuple[tuple[Any, ...], pa.RecordBatch | None, int, float]
"""A row's sort key, the batch it is in and its place there, and its share of the batch's bytes."""


def outdated_rows(parts: Sequence[Source]) -> list[pl.Series]:
    """The rows that do not count, for each part, as sorted row numbers.

    Of all rows of a request one counts: an answer before an error, then the newest. Reads the request ids
    and, only if some occur twice, when and whether these were answered.
    """
    none = [pl.Series(dtype=pl.UInt32)] * len(parts)
    if len(parts) < 2:
        return none  # within one part no request occurs twice
    hashed = pl.col("request_id").hash()
    ids = pl.concat([_hashed_ids(part) for part in parts])
    if ids.n_unique() == len(ids):
        return none
    repeated = ids.filter(ids.is_duplicated()).unique().implode()
    rows = pl.concat(
        scan_parts([part])
        .with_row_index("row")
        .filter(hashed.is_in(repeated))
        .select("request_id", "row", "timestamp", answered=pl.col("error").is_null(), part=pl.lit(number))
        .collect()
        for number, part in enumerate(parts)
    )
    ranked = rows.sort("answered", "timestamp", "part")
    outdated = ranked.filter(~pl.col("request_id").is_last_distinct())
    return [outdated.filter(pl.col("part") == number)["row"].sort() for number in range(len(parts))]


def _hashed_ids(part: Source) -> pl.Series:
    """Read batch by batch: polars would hold all of the part's ids, and buffers for each of its threads."""
    with pq.ParquetFile(part, pre_buffer=False) as file:
        batches = file.iter_batches(columns=["request_id"], use_threads=False)
        hashes = [pl.Series(batch["request_id"]).hash() for batch in batches]
    if not isinstance(part, Path):
        part.seek(0)  # polars reads an open file from where it stands
    return pl.concat([pl.Series(dtype=pl.UInt64), *hashes])


def read_in_order(
    parts: Sequence[Source],
    *,
    where: pl.Expr | None = None,
    columns: Sequence[str] | None = None,
    table_bytes: int = 4 * 2**20,
) -> Iterator[pa.Table]:
    """The rows that count, by prompt, temperature, sample and request id, in tables of about `table_bytes`.

    Each part is in this order, so they are merged as they are read, each once and none before the first of
    its rows has its turn. Runs write nearly in this order: few parts are in memory at a time.

    Args:
        parts: where the rows are.
        where: which rows; an expression over columns that are not lists.
        columns: which columns; all of them by default.
        table_bytes: the size of a table in memory.
    """
    streams = [
        _places(part, outdated, where, columns)
        for part, outdated in zip(parts, outdated_rows(parts), strict=True)
    ]
    picked: list[tuple[pa.RecordBatch, int]] = []
    size = 0.0
    for _, batch, row, weight in heapq.merge(*streams, key=itemgetter(0)):
        if batch is None:
            continue
        picked.append((batch, row))
        size += weight
        if size >= table_bytes:
            yield _gather(picked, columns)
            picked, size = [], 0.0
    if picked:
        yield _gather(picked, columns)


def _places(
    part: Source, outdated: pl.Series, where: pl.Expr | None, columns: Sequence[str] | None
) -> Iterator[_Place]:
    """The rows of a part that count and are wanted, and before them one place without a row.

    `merge` asks every stream for its first place at once: only for the second one the part has to be read.
    """
    first = _smallest_index(part)
    if first is None:
        return
    yield (first, -math.inf), None, 0, 0.0
    asked = [] if where is None else where.meta.root_names()
    needed = None if columns is None else list(dict.fromkeys((*columns, *ORDER, *asked)))
    start = 0
    with pq.ParquetFile(part, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            length = _batch_length(file.metadata.row_group(group))
            for batch in file.iter_batches(length, row_groups=[group], columns=needed, use_threads=False):
                end = start + batch.num_rows
                kept = _kept(batch, outdated, start, where)
                if kept.num_rows:
                    keys = zip(
                        kept["prompt_index"].to_pylist(),
                        kept["temperature"].fill_null(-math.inf).to_pylist(),
                        kept["sample_index"].to_pylist(),
                        kept["request_id"].to_pylist(),
                        strict=True,
                    )
                    weight = kept.nbytes / kept.num_rows
                    yield from zip(keys, repeat(kept), range(kept.num_rows), repeat(weight))
                start = end


def _kept(batch: pa.RecordBatch, outdated: pl.Series, start: int, where: pl.Expr | None) -> pa.RecordBatch:
    """The rows of a batch, which begins at row `start` of its part, that count and are wanted."""
    if where is None and outdated.is_empty():
        return batch
    asked = [ORDER[0]] if where is None else where.meta.root_names()
    frame = pl.DataFrame(pa.Table.from_batches([batch.select(list(dict.fromkeys((ORDER[0], *asked))))]))
    kept = (
        frame.lazy()
        .with_row_index("row")
        .filter(True if where is None else where)
        .select("row")
        .collect()["row"]
    )
    kept = kept.filter(~(kept + start).is_in(outdated.implode()))
    return batch if len(kept) == batch.num_rows else batch.take(kept.to_arrow())


def _gather(picked: Sequence[tuple[pa.RecordBatch, int]], columns: Sequence[str] | None) -> pa.Table:
    begins: dict[int, int] = {}
    batches: list[pa.RecordBatch] = []
    places = array("q")
    end = 0
    for batch, row in picked:
        if id(batch) not in begins:
            begins[id(batch)] = end
            batches.append(batch)
            end += batch.num_rows
        places.append(begins[id(batch)] + row)
    table = pa.Table.from_batches(batches)
    if columns is not None:
        table = table.select(list(columns))
    if places[-1] - places[0] == len(places) - 1 and all(map(int.__lt__, places, places[1:])):
        return table.slice(places[0], len(places))
    return table.take(pa.Array.from_buffers(pa.int64(), len(places), [None, pa.py_buffer(places)]))


def _smallest_index(part: Source) -> int | None:
    """The smallest prompt_index of a part, from its footer; None if it has no rows.

    Here and not in `_places`, whose frame would keep the footers of all parts until their turn.
    """
    with pq.ParquetFile(part, pre_buffer=False) as file:
        metadata = file.metadata
    column = next(n for n in range(metadata.num_columns) if metadata.schema.column(n).path == ORDER[0])
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return min((group.column(column).statistics.min for group in groups if group.num_rows), default=None)


def _batch_length(group: pq.RowGroupMetaData) -> int:
    # In memory rows take about twice what they take encoded.
    per_row = 2 * group.total_byte_size / max(1, group.num_rows)
    return max(1, min(LONGEST_BATCH, int(BATCH_BYTES / max(1.0, per_row))))
