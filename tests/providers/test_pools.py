from __future__ import annotations

import asyncio
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import pytest

from hallubench.providers.pools import CONNECTIONS, Pools, open_pools


class Client:
    open = False

    async def __aenter__(self) -> Self:
        self.open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open = False


@pytest.mark.parametrize("connections", [1, CONNECTIONS, CONNECTIONS + 1, 200])
def test_as_many_calls_find_a_connection_as_were_asked_for(connections: int) -> None:
    async def main() -> list[Client]:
        async with open_pools(connections, lambda verify: Client()) as pools:
            with ExitStack() as calls:
                clients = [calls.enter_context(pools.client()) for _ in range(connections)]
            assert all(client.open for client in clients)
        return clients

    clients = asyncio.run(main())
    assert max(clients.count(client) for client in clients) <= CONNECTIONS
    assert not any(client.open for client in clients)


def test_few_calls_share_the_warm_connections_of_one_client() -> None:
    pools = Pools(clients := [Client() for _ in range(10)])
    for _ in range(3):
        with pools.client() as one, pools.client() as other:
            assert one is other is clients[0]


def test_a_failed_call_gives_its_connection_back() -> None:
    pools = Pools(clients := [Client(), Client()])
    for _ in range(CONNECTIONS):
        with pytest.raises(OSError, match="reset"), pools.client():
            raise OSError("reset")
    with pools.client() as client:
        assert client is clients[0]
