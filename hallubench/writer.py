"""Rows on their way to the disk: the event loop hands them over and never waits for a write."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

from hallubench.schema import Row
from hallubench.store import Store

HAND_OVER_SECONDS = 0.1
MOST_WAITING = 10_000
"""Rows that may wait for the disk before providers have to wait too."""


class Writer:
    """Appends rows to a store from one thread; used with `async with`, whose end writes what is left.

    Raises:
        DiskError: (at the end) a write failed. `broken` is set as soon as that happens.
    """

    def __init__(self, store: Store) -> None:
        self.broken = asyncio.Event()
        self._store = store
        self._waiting: list[Row] = []
        self._room = asyncio.Event()
        self._closing = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._write())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        try:
            await self._task
        finally:
            self._thread.shutdown()
            for row in self._waiting:  # after a failed write: the end of the store tries once more
                self._store.append(row)

    async def put(self, row: Row) -> None:
        """Hand a row over; waits while too many are waiting for the disk."""
        self._waiting.append(row)
        while len(self._waiting) > MOST_WAITING and not self.broken.is_set():
            self._room.clear()
            await self._room.wait()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        closing = False
        try:
            while not closing:
                with suppress(TimeoutError):
                    async with asyncio.timeout(HAND_OVER_SECONDS):
                        closing = await self._closing.wait()
                rows, self._waiting = self._waiting, []
                await loop.run_in_executor(self._thread, self._append, rows)
                self._room.set()
            await loop.run_in_executor(self._thread, self._store.flush)
        except Exception:
            self.broken.set()
            raise
        finally:
            self._room.set()

    def _append(self, rows: list[Row]) -> None:
        for row in rows:
            self._store.append(row)
        if self._store.is_due():
            self._store.flush()
