from __future__ import annotations

from contextlib import ExitStack
from itertools import count

import pytest

from hallubench.providers.pools import CONNECTIONS, Pools


@pytest.mark.parametrize("connections", [1, CONNECTIONS, CONNECTIONS + 1, 200])
def test_as_many_calls_find_a_connection_as_were_asked_for(connections: int) -> None:
    numbers = count()
    pools = Pools(connections, lambda: next(numbers))
    with ExitStack() as calls:
        clients = [calls.enter_context(pools.client()) for _ in range(connections)]
    assert max(clients.count(client) for client in clients) <= CONNECTIONS


def test_few_calls_share_the_warm_connections_of_one_client() -> None:
    numbers = count()
    pools = Pools(200, lambda: next(numbers))
    for _ in range(3):
        with pools.client() as one, pools.client() as other:
            assert one == other == 0


def test_a_failed_call_gives_its_connection_back() -> None:
    numbers = count()
    pools = Pools(2 * CONNECTIONS, lambda: next(numbers))
    for _ in range(CONNECTIONS):
        with pytest.raises(OSError, match="reset"), pools.client():
            raise OSError("reset")
    with pools.client() as client:
        assert client == 0
