"""Text that comes from a file or a model, made fit to be shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def printable(text: object, longest: int = 300) -> str:
    """`text` on one line, shortened, with nothing in it that a terminal would obey."""
    shown = str(text)
    cut = shown[:longest]
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return clean if len(shown) <= longest else f"{clean}..."


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Cells as the lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells])
