"""Many connections of an HTTP client, in pools of a few.

httpcore's pool goes through all of its connections whenever a request begins or ends. With 200 of
them, that costs a third of all CPU time of a call; pools of 16 cost next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from httpx2 import Limits

Client = TypeVar("Client")

CONNECTIONS = 16
"""Of one pool."""
LIMITS = Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)


class Pools(Generic[Client]):
    """Clients of one SDK, each with a pool of its own.

    Args:
        connections: calls that are in flight at once, at most.
        connect: makes a client with `LIMITS`; called once for each pool.
    """

    def __init__(self, connections: int, connect: Callable[[], Client]) -> None:
        self.clients = [connect() for _ in range(math.ceil(connections / CONNECTIONS))]
        self._in_flight = [0] * len(self.clients)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """One that has a connection to spare, for one call: the first, whose connections are warm."""
        place = next(
            (place for place, count in enumerate(self._in_flight) if count < CONNECTIONS),
            len(self.clients) - 1,
        )
        self._in_flight[place] += 1
        try:
            yield self.clients[place]
        finally:
            self._in_flight[place] -= 1
