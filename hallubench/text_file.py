"""UTF-8 files of lines, and of comma-separated rows, read piece by piece; each piece knows its line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path


class LineError(ValueError):
    """What is wrong with a line, its number first, and the fix. The caller knows the file."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, with their ends, numbered from 1; a byte order mark is left out.

    Raises:
        LineError: a line is not UTF-8.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise LineError(f"line {number}: not UTF-8: save the file as UTF-8") from None


def read_csv(path: Path, check_header: Callable[[list[str]], None]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the header of a CSV file, each with the line it begins on; empty cells are left out.

    Args:
        path: of the file.
        check_header: given the names of the columns; raises what it has against them.

    Raises:
        LineError: a line is not UTF-8, or a row is not like the header.
        OSError: the file cannot be read.
    """
    csv.field_size_limit(2**31 - 1)  # holds for the process; the default, 128 KiB, is less than a long prompt
    rows = csv.reader((line for _, line in read_lines(path)), strict=True)
    header: list[str] = []
    next_line = 1
    try:
        for row in rows:
            line, next_line = next_line, rows.line_num + 1
            if not row:
                continue
            if not header:
                header = row
                check_header(header)
            elif len(row) != len(header):
                problem = f"{len(row)} cells under {len(header)} columns: quote the cells that hold commas"
                raise LineError(f"line {line}: {problem}")
            else:
                yield line, {column: cell for column, cell in zip(header, row, strict=True) if cell}
    except csv.Error as error:
        reason = str(error).partition(" - ")[0]
        raise LineError(f"line {next_line}: malformed CSV ({reason}): check its quotes") from None
