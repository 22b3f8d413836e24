"""Many connections of an HTTP client, in pools of a few.

httpcore's pool goes through all of its connections whenever a request begins or ends. With 200 of
them, that costs a third of all CPU time of a call; pools of 16 cost next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from ssl import SSLContext
from typing import Any, Generic, TypeVar

from httpx2 import Limits, create_ssl_context

Client = TypeVar("Client", bound=AbstractAsyncContextManager[Any, Any])

CONNECTIONS = 16
"""Of one pool."""
LIMITS = Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)


@asynccontextmanager
async def open_pools(
    connections: int, connect: Callable[[SSLContext], Client]
) -> AsyncIterator[Pools[Client]]:
    """Open as many clients as it takes.

    Args:
        connections: calls that are in flight at once, at most.
        connect: makes a client with `LIMITS`, and with the SSL context that all share: each takes 20 ms.
    """
    verify = create_ssl_context()
    clients = [connect(verify) for _ in range(math.ceil(connections / CONNECTIONS))]
    async with AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        yield Pools(clients)


class Pools(Generic[Client]):
    """Clients of one SDK, each with a pool of its own."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients
        self._in_flight = [0] * len(clients)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """One that has a connection to spare, for one call: the first, whose connections are warm."""
        place = next(
            (place for place, count in enumerate(self._in_flight) if count < CONNECTIONS),
            len(self._clients) - 1,
        )
        self._in_flight[place] += 1
        try:
            yield self._clients[place]
        finally:
            self._in_flight[place] -= 1
