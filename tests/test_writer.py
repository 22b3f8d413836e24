from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hallubench import store as store_module
from hallubench import writer as writer_module
from hallubench.errors import DiskError
from hallubench.schema import Row
from hallubench.store import Store, scan
from hallubench.types import Completion, Prompt, Request, SamplingParams
from hallubench.writer import Writer


def rows(count: int) -> Iterator[Row]:
    for number in range(count):
        request = Request(
            request_id=f"r{number}",
            prompt=Prompt(id=f"p{number}", index=number, text="x"),
            sample_index=0,
            provider="echo",
            model="m",
            system_prompt=None,
            params=SamplingParams(max_tokens=1),
        )
        now = datetime(2026, 1, 1, tzinfo=UTC)
        completion = Completion(request_id=f"r{number}", timestamp=now, elapsed_seconds=0.0, text="a")
        yield Row("run", request, completion, None)


async def write(folder: Path, count: int) -> Writer:
    with Store(folder, "run") as store:
        async with Writer(store) as writer:
            for row in rows(count):
                await writer.put(row)
    return writer


def test_every_row_handed_over_is_on_disk_at_the_end(tmp_path: Path) -> None:
    asyncio.run(write(tmp_path, 5))
    assert scan(tmp_path).collect().height == 5


def test_more_rows_than_may_wait_all_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MOST_WAITING", 2)
    monkeypatch.setattr(writer_module, "HAND_OVER_SECONDS", 0.001)
    asyncio.run(write(tmp_path, 20))
    assert scan(tmp_path).collect().height == 20


@pytest.mark.parametrize("error", [DiskError("full"), OverflowError("does not fit")])
def test_any_failure_is_told_at_once_and_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(writer_module, "MOST_WAITING", 2)
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(store_module, "write_part", refuse)

    async def until_broken() -> None:
        with Store(tmp_path, "run") as store:
            async with Writer(store) as writer:
                for row in rows(20):
                    await writer.put(row)
                await asyncio.wait_for(writer.broken.wait(), timeout=30)

    with pytest.raises(type(error)):
        asyncio.run(until_broken())
