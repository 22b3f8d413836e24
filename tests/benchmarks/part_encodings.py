"""What was tried to make parts small: the rows of a store, written in one way after another.

Prints the bytes of each beside those of the store, and the seconds of writing. `bench_generate.py` shows
it on a real model's answers; on any other store: `python part_encodings.py STORE`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hallubench.parts import _SPLIT, _WRITER_OPTIONS
from hallubench.schema import SCHEMA

IDS = [path for path in _SPLIT if "token_ids" in path]
FLOATS = [path for path in _SPLIT if path not in IDS]
TEXTS = [
    f"{prefix}_{name}"
    for prefix in ("output", "prompt")
    for name in ("token_texts.list.element", "top_tokens.list.element.list.element")
]
DICTIONARY = _WRITER_OPTIONS["use_dictionary"]
assert isinstance(DICTIONARY, list)
OTHERS = [path for path in DICTIONARY if path not in TEXTS]

TRIED: Mapping[str, Mapping[str, Any]] = {
    "as parts are written": {},
    "snappy, dictionaries everywhere (pyarrow's default)": {
        "compression": "snappy",
        "compression_level": None,
        "use_byte_stream_split": False,
        "use_dictionary": True,
    },
    "zstd 3, dictionaries everywhere": {
        "compression_level": 3,
        "use_byte_stream_split": False,
        "use_dictionary": True,
    },
    "byte stream split of log-probabilities only, ids as dictionary": {
        "use_byte_stream_split": FLOATS,
        "use_dictionary": DICTIONARY + IDS,
    },
    "ids plain": {"use_byte_stream_split": FLOATS},
    "ids as deltas": {
        "use_byte_stream_split": FLOATS,
        "column_encoding": dict.fromkeys(IDS, "DELTA_BINARY_PACKED"),
    },
    "token texts plain": {"use_dictionary": OTHERS},
    "token texts as deltas of their lengths": {
        "use_dictionary": OTHERS,
        "column_encoding": dict.fromkeys(TEXTS, "DELTA_LENGTH_BYTE_ARRAY"),
    },
    "zstd 1": {"compression_level": 1},
    "zstd 3": {"compression_level": 3},
    "zstd 9": {"compression_level": 9},
    "zstd 12": {"compression_level": 12},
    "zstd 19": {"compression_level": 19},
}


def print_encodings(store: Path) -> None:
    """Write the rows of a store in each way that was tried."""
    rows = pa.concat_tables(pq.read_table(path, schema=SCHEMA) for path in store.glob("model*/*.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        base = 0
        for what, options in TRIED.items():
            seconds = written(rows, path, options)
            base = base or path.stat().st_size
            print(f"{path.stat().st_size / base:6.3f} {seconds:6.2f} s  {what}")
        seconds = written(flattened(rows), path, {"use_byte_stream_split": [], "use_dictionary": True})
        nested = Path(folder) / "nested.parquet"
        written(rows, nested, {"use_byte_stream_split": [], "use_dictionary": True})
        share = path.stat().st_size / nested.stat().st_size
        print(f"alternatives in one list a row instead of one a token, both without split: {share:.3f}")


def written(rows: pa.Table, path: Path, options: Mapping[str, Any]) -> float:
    started = time.perf_counter()
    with pq.ParquetWriter(path, rows.schema, **(dict(_WRITER_OPTIONS) | dict(options))) as writer:
        writer.write_table(rows)
    return time.perf_counter() - started


def flattened(rows: pa.Table) -> pa.Table:
    """The same with the alternatives of all tokens of a row in one list."""
    for number, field in enumerate(rows.schema):
        if pa.types.is_list(field.type) and pa.types.is_list(field.type.value_type):
            column = rows[number].combine_chunks()
            inner = column.values
            offsets = inner.offsets.take(column.offsets)
            flat = pa.ListArray.from_arrays(offsets, inner.values, mask=column.is_null())
            rows = rows.set_column(number, field.name, flat)
    return rows


if __name__ == "__main__":
    print_encodings(Path(sys.argv[1]))
