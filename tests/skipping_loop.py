"""A clock for tests: hours of waiting in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still while there is work and skips to the next timer."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(SkippingSelector(self))

    def time(self) -> float:
        return self.now


class SkippingSelector(selectors.DefaultSelector):
    def __init__(self, loop: SkippingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits and no timer is set")
        self._loop.now += max(timeout, 0)
        return super().select(0)


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()
