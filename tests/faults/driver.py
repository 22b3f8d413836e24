"""Runs hallubench so that one chosen call in it goes wrong.

    python driver.py '{"log": "x.log", "fault": ["before", "rename part", 3, "SIGKILL"]}' generate ...

The calls that matter to a store are wrapped in this process and counted by name. A name is the call and what
it is done to: "rename part", "fsync merged", "replace record", and with "final" before it once all answers
of the run are written. At the n-th such call, before or after it, the process sends itself a signal, or the
call fails with an error: also each one after it or, with "once" behind the error's name, only that one.

The log has a line for each request drawn by the provider (`asked`) and for each answer whose part is written
(`flushed`), one for the call that went wrong (`fault`) and one when all answers are written (`final`). It is
written with one system call a line, which SIGKILL cannot undo.

Flushes and merges come much more often than in a real run, so that a short one has many of them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import wraps
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Driver:
    """Counts calls, and makes the chosen one go wrong."""

    def __init__(self, log: str, fault: list[Any] | None = None, small_parts: int = 3) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._fault = fault
        self._small_parts = small_parts
        self._count = 0
        self._final = ""
        self._written = ""
        self._store_is_wrapped = False

    def log(self, *words: object) -> None:
        os.write(self._log, f"{' '.join(map(str, words))}\n".encode())

    def passes(self, when: str, call: str) -> None:
        """Somewhere in a run: what is planned for this call happens."""
        if self._fault is None or [when, self._final + call] != self._fault[:2]:
            return
        *_, number, act = self._fault
        self._count += 1
        count = self._count
        name, _, once = act.partition(" ")
        if count == number or (count > number and name.startswith("E") and not once):
            self.log("fault", when, self._final + call)
            if name.startswith("SIG"):
                # To this thread, or it might go on for a moment.
                signal.pthread_kill(threading.get_ident(), signal.Signals[name])
            else:
                code = getattr(errno, name)
                raise OSError(code, os.strerror(code))

    def wrapped(self, function: Callable[..., Any], name: Callable[..., str | None]) -> Callable[..., Any]:
        """A function that tells of each call; `name` gets its arguments."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            what = name(*arguments)
            if what is None:
                return function(*arguments, **options)
            self.passes("before", what)
            result = function(*arguments, **options)
            self.passes("after", what)
            return result

        return call

    def wrap_system(self) -> None:
        """The calls that leave something on disk, and every import."""
        for call in ("rename", "replace", "unlink", "mkdir"):
            original = getattr(Path, call)
            setattr(Path, call, self.wrapped(original, lambda path, *_, call=call: _named(call, path)))
        Path.open = self.wrapped(  # type: ignore[method-assign]
            Path.open, lambda path, mode="r", *_: _named("open", path) if mode[0] in "wx" else None
        )
        os.fsync = self.wrapped(
            os.fsync, lambda descriptor: _named("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        )
        flock = self.wrapped(fcntl.flock, lambda *_: "lock")

        def lock(*arguments: Any) -> None:
            self.wrap_store()
            flock(*arguments)

        fcntl.flock = lock
        driver = self

        class Watch(MetaPathFinder):
            def find_spec(self, *_: object) -> None:
                driver.passes("before", "import")

        sys.meta_path.insert(0, Watch())

    def wrap_store(self) -> None:
        """What hallubench and Arrow do: later, since start-up is to import them in its own order."""
        if self._store_is_wrapped:
            return
        self._store_is_wrapped = True
        import pyarrow.parquet as pq

        from hallubench import parts, store, writer
        from hallubench.providers.echo import EchoProvider

        store.FLUSH_SECONDS = 0.0
        store.MOST_SMALL_PARTS = self._small_parts
        writer.HAND_OVER_SECONDS = 0.005
        for call in ("write_table", "close"):
            wrapped = self.wrapped(getattr(pq.ParquetWriter, call), lambda *_, c=call: f"{c} {self._written}")
            setattr(pq.ParquetWriter, call, wrapped)
        write_part, close, generate = parts.write_part, writer.Writer.__aexit__, EchoProvider.generate

        def write(path: Path, tables: Iterable[Any], replaces: Any = ()) -> None:
            self._written = _kind(path) or ""
            write_part(path, tables, replaces)
            if not replaces:
                for table in tables:
                    for id_, error in zip(table["request_id"], table["error"], strict=True):
                        if not error.is_valid:
                            self.log("flushed", id_)

        async def end(self_: Any, *arguments: Any) -> None:
            await close(self_, *arguments)
            self._final = "final "
            self.log("final")

        def drawn(requests: Iterable[Any]) -> Iterator[Any]:
            for request in requests:
                self.log("asked", request.request_id)
                yield request

        async def answer(self_: Any, requests: Iterable[Any]) -> AsyncIterator[Any]:
            async for completion in generate(self_, drawn(requests)):
                yield completion

        store.write_part = write  # type: ignore[attr-defined]
        writer.Writer.__aexit__ = end  # type: ignore[method-assign, assignment]
        EchoProvider.generate = answer  # type: ignore[assignment, method-assign]


def _named(call: str, path: Path) -> str | None:
    kind = _kind(path)
    return kind and f"{call} {kind}"


def _kind(path: Path) -> str | None:
    """What a path of a store is; None for all others."""
    name = path.name.removeprefix(".writing-")
    for start, kind in {"part-": "part", "merged-": "merged", "pilot_": "export", "model=": "folder"}.items():
        if name.startswith(start):
            return kind
    if name == "_runs":
        return "folder"
    return "record" if path.parent.name == "_runs" and ".json" in name else None


if __name__ == "__main__":
    driver = Driver(**json.loads(sys.argv.pop(1)))
    driver.wrap_system()
    from hallubench.cli import main

    main(prog_name="hallubench")
