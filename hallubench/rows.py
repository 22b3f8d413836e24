"""Rows of a store in order and in flat memory: what the exporter and compaction are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hallubench.parts import ROW_GROUP_BYTES, Part

KEYS = ("request_id", "prompt_index", "temperature", "sample_index", "timestamp", "error_type")
ORDER = ("prompt_index", "temperature", "sample_index", "request_id")
CACHED_BYTES = 4 * ROW_GROUP_BYTES


def read_in_order(
    parts: Sequence[Part],
    *,
    where: pl.Expr | None = None,
    columns: Sequence[str] | None = None,
    batch_bytes: int = ROW_GROUP_BYTES // 4,
) -> Iterator[pa.Table]:
    """The rows that count, by prompt, temperature and sample, in tables of about `batch_bytes` in memory.

    Reads the key columns first, which decide the order, and then only the row groups that a batch
    needs. Runs write nearly in this order, so that few are needed at a time.

    Args:
        parts: where the rows are.
        where: which rows; an expression over columns that are not lists.
        columns: which columns; all of them by default.
        batch_bytes: the size of a table.
    """
    places = _places(parts, where)
    groups = _RowGroups(parts, columns)
    start = 0
    while start < places.height:
        count = max(1, int(batch_bytes / groups.bytes_per_row(places.row(start, named=True))))
        yield groups.take(places.slice(start, count))
        start += count


def newest(keys: pl.DataFrame) -> pl.DataFrame:
    """Of all rows of a request the one that counts: an answer before an error, then the newest."""
    ranked = keys.sort(pl.col("error_type").is_null(), "timestamp")
    return ranked.unique("request_id", keep="last", maintain_order=True)


def read_keys(parts: Sequence[Part], columns: Sequence[str] = KEYS) -> pl.DataFrame:
    """Some columns of all rows of some parts, with each row's place: part, group and row, all from 0."""
    frames = [pl.DataFrame(schema={"part": pl.Int32, "group": pl.Int32, "row": pl.UInt32})]
    for number, part in enumerate(parts):
        with pq.ParquetFile(part.path) as file:
            for group in range(file.num_row_groups):
                frame = pl.from_arrow(file.read_row_group(group, columns=list(columns), use_threads=False))
                assert isinstance(frame, pl.DataFrame)
                place = (pl.lit(number, pl.Int32).alias("part"), pl.lit(group, pl.Int32).alias("group"))
                frames.append(frame.with_row_index("row").with_columns(*place))
    return pl.concat(frames, how="diagonal")


def _places(parts: Sequence[Part], where: pl.Expr | None) -> pl.DataFrame:
    asked = where.meta.root_names() if where is not None else []
    rows = newest(read_keys(parts, list(dict.fromkeys((*KEYS, *asked)))))
    wanted = rows if where is None else rows.filter(where)
    return wanted.sort(ORDER).select("part", "group", "row")


class _RowGroups:
    """Row groups, read when they are needed; those used last are kept."""

    def __init__(self, parts: Sequence[Part], columns: Sequence[str] | None) -> None:
        self._parts = parts
        self._columns = None if columns is None else list(columns)
        self._kept: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def bytes_per_row(self, place: dict[str, int]) -> float:
        group = self._read(place["part"], place["group"])
        return max(1.0, float(group.nbytes) / float(group.num_rows))

    def take(self, places: pl.DataFrame) -> pa.Table:
        """The rows at some places, in their order."""
        pieces, positions = [], []
        for (part, group), rows in places.with_row_index("position").group_by(
            "part", "group", maintain_order=True
        ):
            pieces.append(self._read(part, group).take(rows["row"].to_arrow()))
            positions.append(rows["position"])
        return pa.concat_tables(pieces).take(pl.concat(positions).arg_sort().to_arrow())

    def _read(self, part: int, group: int) -> pa.Table:
        table = self._kept.pop((part, group), None)
        if table is None:
            with pq.ParquetFile(self._parts[part].path) as file:
                table = file.read_row_group(group, columns=self._columns)
        self._kept[part, group] = table
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > CACHED_BYTES:
            self._kept.popitem(last=False)
        return table
