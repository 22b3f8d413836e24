"""What a run shows: a bar for each lane in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from hallubench.text import printable

SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """What `generate` tells of a run; a context manager for as long as it is shown."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start(self, totals: Mapping[str, int]) -> None:
        """Name the lanes and how many requests each has to answer."""

    def begin(self, lane: str) -> None:
        """A lane can ask now; until then it was loading."""

    def advance(self, lane: str, *, failed: bool, tokens: int, cost_usd: float = 0.0) -> None:
        """One more request of a lane has its completion."""

    def note(self, line: str) -> None:
        """Show a line that stays."""


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, totals: Mapping[str, int]) -> None:
        pass

    def begin(self, lane: str) -> None:
        pass

    def advance(self, lane: str, *, failed: bool, tokens: int, cost_usd: float = 0.0) -> None:
        pass

    def note(self, line: str) -> None:
        pass


def display() -> Display:
    """Bars if standard error is a terminal, else lines. Results go to standard output, progress here.

    It writes to a duplicate of standard error, since the engine's own output is sent to its log by
    redirecting the original for a while.
    """
    stream: TextIO = sys.stderr
    with suppress(OSError, ValueError, AttributeError):  # a notebook's has no file behind it
        stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace")
    console = Console(file=stream)
    return _Bars(console) if console.is_terminal else _Lines(stream, time.monotonic)


class _Bars(Silent):
    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TextColumn("{task.fields[errors]}", style="red", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=60,
        )
        self._tasks: dict[str, TaskID] = {}
        self._counts: dict[str, _Count] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, totals: Mapping[str, int]) -> None:
        for lane, total in totals.items():
            self._counts[lane] = _Count(total, time.monotonic)
            self._tasks[lane] = self._progress.add_task(printable(lane), total=total, rate="", errors="")

    def begin(self, lane: str) -> None:
        self._counts[lane].begin()

    def advance(self, lane: str, *, failed: bool, tokens: int, cost_usd: float = 0.0) -> None:
        count = self._counts[lane]
        count.add(failed=failed, tokens=tokens, cost_usd=cost_usd)
        self._progress.update(
            self._tasks[lane],
            advance=1,
            rate=count.rate(),
            errors=f"{count.failed} failed" if count.failed else "",
        )

    def note(self, line: str) -> None:
        self._progress.console.print(Text(printable(line, longest=1000)))


class _Lines(Silent):
    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._counts: dict[str, _Count] = {}
        self._shown: dict[str, float] = {}

    def start(self, totals: Mapping[str, int]) -> None:
        self._counts = {lane: _Count(total, self._clock) for lane, total in totals.items()}
        self._shown = dict.fromkeys(totals, self._clock())
        for lane, total in totals.items():
            self.note(f"{lane}: {total} requests")

    def begin(self, lane: str) -> None:
        self._counts[lane].begin()

    def advance(self, lane: str, *, failed: bool, tokens: int, cost_usd: float = 0.0) -> None:
        count = self._counts[lane]
        count.add(failed=failed, tokens=tokens, cost_usd=cost_usd)
        if count.done == count.total or self._clock() - self._shown[lane] >= SECONDS_BETWEEN_LINES:
            self._shown[lane] = self._clock()
            self.note(f"{lane}: {count.line()}")

    def note(self, line: str) -> None:
        with suppress(OSError):  # nobody reads any more: no reason to stop asking
            print(printable(line, longest=1000), file=self._stream, flush=True)


@dataclass
class _Count:
    total: int
    clock: Callable[[], float]
    done: int = 0
    failed: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    begun: float | None = None

    def begin(self) -> None:
        if self.begun is None:
            self.begun = self.clock()

    def add(self, *, failed: bool, tokens: int, cost_usd: float) -> None:
        self.done += 1
        self.failed += failed
        self.tokens += tokens
        self.cost_usd += cost_usd

    def _seconds(self) -> float:
        return max(self.clock() - (self.begun or 0.0), 1e-9)

    def rate(self) -> str:
        spent = f" {self.cost_usd:.2f} USD" if self.cost_usd else ""
        return f"{self.done / self._seconds():.1f}/s {self.tokens / self._seconds():,.0f} tokens/s{spent}"

    def line(self) -> str:
        left = (self.total - self.done) * self._seconds() / self.done
        parts = [f"{self.done}/{self.total}", self.rate(), f"{self.failed} failed"]
        if self.done < self.total:
            parts.append(f"{left:.0f} s left")
        return ", ".join(part for part in parts if part)
