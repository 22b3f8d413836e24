"""Text that comes from a file or a model, made fit to be shown."""


def printable(text: object, longest: int = 300) -> str:
    """`text` on one line, shortened, with nothing in it that a terminal would obey."""
    shown = str(text)
    cut = shown[:longest]
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return clean if len(shown) <= longest else f"{clean}..."
