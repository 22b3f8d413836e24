"""Secrets out of text that others wrote: errors of SDKs and servers may repeat the key."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote, quote_plus

MASK = "***"


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` with every one of `secrets` masked, also as it stands in a URL or in an escaped string."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        for spelling in (secret, quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]):
            text = text.replace(spelling, MASK)
    return text
