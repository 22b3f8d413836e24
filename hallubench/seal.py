"""A part's seal: a digest of the whole file, by which a flipped bit is found wherever it is.

    PAR1, row groups, page index | "hallubench seal", digest | footer, its length, PAR1

Parquet's checksums are of pages only. A damaged footer can still be read, change what a query skips, and
crash Arrow or polars. Readers of Parquet find the footer from the end of the file and all else by what it
says, so nobody looks at the place before it.
"""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

MARK = b"hallubench seal\n"
DIGEST_BYTES = 16
LENGTH = len(MARK) + DIGEST_BYTES
_CHUNK = 2**20


def seal(file: BinaryIO) -> None:
    """Seal a whole Parquet file that is open for reading and writing."""
    start, footer = _footer(file)
    mark = MARK + _digest(file, start, footer)
    file.seek(start)
    file.write(mark + footer)


def is_intact(file: BinaryIO) -> bool:
    """Whether a file is, bit for bit, as it was when it was sealed."""
    start, footer = _footer(file)
    start -= LENGTH
    if start < 0:
        return False
    file.seek(start)
    return file.read(LENGTH) == MARK + _digest(file, start, footer)


def _footer(file: BinaryIO) -> tuple[int, bytes]:
    """Where the footer begins, and all bytes from there."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    start = max(0, size - 8 - int.from_bytes(file.read(4), "little"))
    file.seek(start)
    return start, file.read()


def _digest(file: BinaryIO, end: int, footer: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    file.seek(0)
    while chunk := file.read(min(_CHUNK, end - file.tell())):
        digest.update(chunk)
    digest.update(footer)
    return digest.digest()
