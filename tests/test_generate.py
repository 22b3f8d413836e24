from __future__ import annotations

import _thread
import asyncio
import errno
import json
import os
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from hallubench import generate, store
from hallubench.config import Config
from hallubench.errors import ConfigError, DiskError, EngineDied, StoreError
from hallubench.generate import Result, run
from hallubench.progress import Silent
from hallubench.providers.echo import EchoProvider
from hallubench.store import Store, scan
from hallubench.types import Completion, Request


def entry(name: str = "echo-a", **keys: Any) -> dict[str, Any]:
    return {"name": name, "type": "echo", "temperature": 0} | keys


def make_config(folder: Path, *entries: dict[str, Any], prompts: int = 6, **keys: Any) -> Config:
    """A config of echo models whose first prompts are the same ones for every number of `prompts`."""
    file = folder / f"prompts-{prompts}.json"
    file.write_text(json.dumps([{"id": f"p{i}", "prompt": f"Is claim {i} true?"} for i in range(prompts)]))
    settings = {"prompts_file": str(file), "output_dir": str(folder / "out"), "models": entries or (entry(),)}
    return Config.model_validate(settings | keys)


def answers(folder: Path) -> dict[str, str]:
    rows = scan(folder).filter(pl.col("error").is_null()).select("request_id", "full_response").collect()
    return dict(rows.iter_rows())


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record(result: Result) -> dict[str, Any]:
    loaded = json.loads((result.output / "_runs" / f"{result.run_id}.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def counts(result: Result) -> tuple[int, int, int, int]:
    return result.already_answered, result.answered, result.failed, result.pending


def test_every_prompt_of_every_model_is_answered_once(tmp_path: Path) -> None:
    config = make_config(tmp_path, entry("a"), entry("a", temperature=1, n=2), entry("b"), prompts=5)
    result = run(config)
    assert counts(result) == (0, 20, 0, 0)
    rows = scan(result.output).select("model", "temperature", "prompt_id", "sample_index").collect()
    assert rows.height == rows.unique().height == 20


def test_a_finished_run_has_nothing_left_to_ask_and_writes_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    output = run(config).output
    before = files(output)
    again = run(config)
    assert again.run_id is None
    assert counts(again) == (6, 0, 0, 0)
    assert files(output) == before


def test_nothing_left_to_ask_counts_what_is_asked_not_what_is_stored(tmp_path: Path) -> None:
    run(make_config(tmp_path))
    assert run(make_config(tmp_path, num_prompts=2)).already_answered == 2


def test_only_the_first_prompts_are_asked_where_a_number_is_given(tmp_path: Path) -> None:
    result = run(make_config(tmp_path, num_prompts=2))
    assert sorted(scan(result.output).collect()["prompt_id"]) == ["p0", "p1"]


def test_added_prompts_and_models_are_all_that_is_asked(tmp_path: Path) -> None:
    first = answers(run(make_config(tmp_path, prompts=4)).output)
    more_prompts = run(make_config(tmp_path, prompts=6))
    assert counts(more_prompts) == (4, 2, 0, 0)
    more_models = run(make_config(tmp_path, entry(), entry("echo-b"), prompts=6))
    assert counts(more_models) == (6, 6, 0, 0)
    assert first.items() <= answers(more_models.output).items()


def test_a_failed_row_is_asked_again_and_replaced_by_its_answer(tmp_path: Path) -> None:
    failing = run(make_config(tmp_path, entry(engine={"error_rate": 0.5}), prompts=40))
    assert failing.failed > 0
    assert failing.answered > 0
    kept = answers(failing.output)
    still_failing = run(make_config(tmp_path, entry(engine={"error_rate": 0.5}), prompts=40))
    assert counts(still_failing) == (failing.answered, 0, failing.failed, 0)
    mended = run(make_config(tmp_path, prompts=40))
    assert counts(mended) == (failing.answered, failing.failed, 0, 0)
    rows = scan(mended.output).collect()
    assert rows.height == 40
    assert rows["error"].null_count() == 40
    assert kept.items() <= answers(mended.output).items()


def test_one_lane_that_dies_leaves_the_others_alone(tmp_path: Path) -> None:
    dying = entry("dying", api_key="first account", engine={"die_after": 2})
    result = run(make_config(tmp_path, dying, entry("living", api_key="second account")))
    assert counts(result) == (0, 8, 0, 4)
    (problem,) = result.problems
    assert problem.startswith("echo: echo died after 2 answers")
    assert record(result)["status"] == "failed"
    assert record(result)["problems"] == [problem]
    by_model = dict(scan(result.output).group_by("model").len().collect().iter_rows())
    assert by_model == {"dying": 2, "living": 6}
    mended = make_config(
        tmp_path, entry("dying", api_key="first account"), entry("living", api_key="second account")
    )
    assert counts(run(mended)) == (8, 4, 0, 0)


def test_an_unexpected_exception_stops_its_lane_alone_and_leaves_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = EchoProvider._complete

    def broken(self: EchoProvider, request: Request) -> Completion:
        if request.model == "broken":
            raise RuntimeError("a fault \udcff of an SDK")
        return complete(self, request)

    monkeypatch.setattr(EchoProvider, "_complete", broken)
    result = run(make_config(tmp_path, entry("broken", api_key="1"), entry("whole", api_key="2")))
    assert counts(result) == (0, 6, 0, 6)
    (problem,) = result.problems
    (traceback,) = (result.output / "_runs").glob("*.traceback.txt")
    assert "RuntimeError" in problem
    assert str(traceback) in problem
    assert "a fault \\udcff of an SDK" in traceback.read_text()


def test_a_request_without_a_completion_stays_pending_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgetful(self: EchoProvider, requests: Iterable[Request]) -> AsyncGenerator[Completion, None]:
        for request in requests:
            if request.prompt.id != "p3":
                yield self._complete(request)

    monkeypatch.setattr(EchoProvider, "generate", forgetful)
    result = run(make_config(tmp_path))
    assert counts(result) == (0, 5, 0, 1)
    assert result.problems == ["echo: echo-a: 1 requests got no completion; run again to ask them"]


def test_it_runs_where_an_event_loop_runs_already(tmp_path: Path) -> None:
    async def notebook_cell() -> Result:
        return run(make_config(tmp_path))

    assert asyncio.run(notebook_cell()).answered == 6


def test_fresh_sets_the_answers_of_its_models_aside_and_deletes_nothing(tmp_path: Path) -> None:
    both = make_config(tmp_path, entry("a"), entry("b"))
    output = run(both).output
    before = answers(output)
    parts_of_a, parts_of_b = files(output / "model=a"), files(output / "model=b")
    result = run(make_config(tmp_path, entry("a")), fresh=True)
    assert counts(result) == (0, 6, 0, 0)
    (aside,) = tmp_path.glob("out.before-*")
    assert list(files(aside).values()) == list(parts_of_a.values())
    assert files(output / "model=b") == parts_of_b
    assert answers(output) == before


def test_fresh_moves_nothing_while_another_run_writes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    output = run(config).output
    with Store(output, "other-run"), pytest.raises(StoreError, match=f"process {os.getpid()}"):
        run(config, fresh=True)
    assert len(answers(output)) == 6
    assert not list(tmp_path.glob("out.before-*"))


def test_fresh_works_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, output_dir=".")
    output = tmp_path / "work"
    output.mkdir()
    monkeypatch.chdir(output)
    assert run(config).answered == 6
    assert run(config, fresh=True).answered == 6
    assert len(list(tmp_path.glob("work.before-*/model=*"))) == 1


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_with_foreign_parquet_is_refused_untouched(tmp_path: Path, fresh: bool) -> None:
    foreign = tmp_path / "out" / "table.parquet"
    foreign.parent.mkdir()
    pl.DataFrame({"a": [1]}).write_parquet(foreign)
    before = files(tmp_path / "out")
    config = make_config(tmp_path)
    with pytest.raises(StoreError, match=r"table\.parquet: not written by hallubench"):
        run(config, fresh=fresh)
    assert files(tmp_path / "out") == before


def test_a_half_written_part_of_a_killed_run_does_not_stop_the_next(tmp_path: Path) -> None:
    output = run(make_config(tmp_path, prompts=4)).output
    half = output / "model=echo-a" / "part-20260101-000000-abcdef-000001.parquet.writing"
    half.write_bytes(b"PAR1")
    assert scan(output).collect().height == 4
    assert counts(run(make_config(tmp_path, prompts=6))) == (4, 2, 0, 0)
    assert not half.exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "x" * 300, "é" * 300, "a b=c%2F", "\x1b[31mred"])
def test_no_model_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "inner").mkdir()
    config = make_config(tmp_path, entry(name), output_dir=str(tmp_path / "inner" / "out"))
    output = run(config).output
    assert scan(output).collect()["model"].unique().to_list() == [name]
    assert len(list(output.glob("model*/*.parquet"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"inner", "prompts-6.json"}
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["out"]
    assert run(config).run_id is None


class InterruptingDisplay(Silent):
    """Presses Ctrl-C when a lane begins, or after some answers, and again when told of it if it `insists`."""

    def __init__(self, *, after: int = 0, insists: bool = False) -> None:
        self._left = after
        self._insists = insists

    def begin(self, lane: str) -> None:
        if self._left == 0:
            _thread.interrupt_main()

    def advance(self, lane: str, *, failed: bool, tokens: int, cost_usd: float = 0.0) -> None:
        self._left -= 1
        if self._left == 0:
            _thread.interrupt_main()

    def note(self, line: str) -> None:
        if self._insists and line.startswith("Interrupted"):
            _thread.interrupt_main()


class Mortal:
    """Stands in for EchoProvider.generate: each engine that is opened dies after so many answers."""

    def __init__(self, *lives: int) -> None:
        self.drawn: list[str] = []
        self._lives = iter(lives)
        self._generate = EchoProvider.generate

    async def __call__(
        self, provider: EchoProvider, requests: Iterable[Request]
    ) -> AsyncGenerator[Completion, None]:
        life = next(self._lives, None)
        batch = iter(list(requests))  # all are in flight at once, as in a real engine
        answered = 0
        async with aclosing(self._generate(provider, self._noted(batch))) as completions:
            async for completion in completions:
                yield completion
                answered += 1
                if answered == life:
                    raise EngineDied("the engine died")

    def _noted(self, requests: Iterable[Request]) -> Iterator[Request]:
        for request in requests:
            self.drawn.append(request.request_id)
            yield request


def mortal(monkeypatch: pytest.MonkeyPatch, *lives: int) -> Mortal:
    provider = Mortal(*lives)
    monkeypatch.setattr(EchoProvider, "generate", lambda self, requests: provider(self, requests))
    return provider


def test_a_lane_whose_engine_dies_goes_on_with_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = mortal(monkeypatch, 4)
    result = run(make_config(tmp_path, prompts=10))
    assert counts(result) == (0, 10, 0, 0)
    assert result.problems == []
    assert len(provider.drawn) == len(set(provider.drawn)) == len(answers(result.output)) == 10


def test_a_lane_whose_engine_dies_twice_ends_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        mortal(patch, 4, 3)
        result = run(make_config(tmp_path, prompts=10))
    assert counts(result) == (0, 7, 0, 3)
    assert result.problems == ["echo: the engine died, for the second time; run again to go on"]
    assert len(answers(result.output)) == 7
    assert counts(run(make_config(tmp_path, prompts=10))) == (7, 3, 0, 0)


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(tmp_path: Path) -> None:
    slow = make_config(tmp_path, entry(engine={"delay": 0.02}), prompts=100)
    result = run(slow, display=InterruptingDisplay(after=3))
    assert result.interrupted
    assert result.answered >= 3
    assert result.answered + result.pending == 100
    assert len(answers(result.output)) == result.answered
    assert record(result)["status"] == "interrupted"
    assert record(result)["counts"]["pending"] == result.pending
    assert counts(run(make_config(tmp_path, prompts=100))) == (result.answered, result.pending, 0, 0)


def test_an_interrupt_waits_for_requests_in_flight_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "GRACE_SECONDS", 0.0)
    endless = make_config(tmp_path, entry(engine={"delay": 3600}))
    result = run(endless, display=InterruptingDisplay())
    assert result.interrupted
    assert counts(result) == (0, 0, 0, 6)
    assert result.problems == []


def test_a_second_interrupt_ends_a_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "GRACE_SECONDS", 3600.0)
    endless = make_config(tmp_path, entry(engine={"delay": 3600}))
    assert run(endless, display=InterruptingDisplay(insists=True)).interrupted


def test_a_full_disk_ends_the_run_and_keeps_every_whole_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0.0)
    fsync, parts = os.fsync, 0

    def full_after_two_parts(descriptor: int) -> None:
        nonlocal parts
        parts += ".parquet.writing" in str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if parts > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    slow = make_config(tmp_path, entry(engine={"delay": 0.02}), prompts=60)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_two_parts)
        with pytest.raises(DiskError, match="model=echo-a: cannot be written: No space left on device"):
            run(slow)
    output = tmp_path / "out"
    kept = answers(output)
    assert 0 < len(kept) < 60
    assert not list(output.rglob("*.writing"))
    resumed = run(make_config(tmp_path, prompts=60))
    assert counts(resumed) == (len(kept), 60 - len(kept), 0, 0)
    assert kept.items() <= answers(output).items()


def test_a_run_that_the_store_fails_is_recorded_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rows: object) -> None:
        raise OverflowError("a value does not fit")

    monkeypatch.setattr(store, "to_table", refuse)
    with pytest.raises(OverflowError):
        run(make_config(tmp_path))
    (path,) = (tmp_path / "out" / "_runs").glob("*.json")
    assert json.loads(path.read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("prompts_file", "no prompts: set `prompts_file`"),
        ("output_dir", "no output folder: set `output_dir`"),
    ],
)
def test_what_a_run_needs_is_asked_for_by_its_key(tmp_path: Path, key: str, message: str) -> None:
    config = make_config(tmp_path).model_copy(update={key: None})
    with pytest.raises(ConfigError, match=message):
        run(config)
