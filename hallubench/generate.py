"""The straight line of a run.

Plan the requests of a config, leave out those already answered, let every provider answer its share,
all providers at once, and append each answer to the store the moment it is whole.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Container, Iterator, Set
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from hallubench.checks import require_ready
from hallubench.config import Config
from hallubench.errors import ConfigError, EngineDied, HallubenchError, LaneError
from hallubench.plan import Group, Lane, Plan, Survey, make_plan
from hallubench.prices import Purse, Spending
from hallubench.progress import Display, Silent
from hallubench.prompts import PromptFile
from hallubench.provenance import RunRecord, Status, new_run_id
from hallubench.providers import Context, open_provider
from hallubench.redact import redact
from hallubench.schema import Row
from hallubench.store import Store, answered_ids, compact, set_aside
from hallubench.text import printable
from hallubench.types import Completion, Request
from hallubench.writer import Writer

GRACE_SECONDS = 5.0
"""After an interrupt, requests in flight may finish for so long: they may be paid for."""

SIGNAL_SECONDS = 0.2
"""How long a Ctrl-C may go unnoticed. polars installs a signal handler that restarts system calls, so a
wait without an end would not be woken."""


@dataclass(slots=True)
class Result:
    """How a run ended."""

    run_id: str | None
    """None if nothing was left to ask, so that nothing ran."""
    output: Path
    already_answered: int = 0
    answered: int = 0
    failed: int = 0
    """Requests whose newest completion is an error; the next run asks them again."""
    pending: int = 0
    """Requests that were not asked to the end; the next run asks them."""
    problems: list[str] = field(default_factory=list)
    """One line for each lane that could not finish."""
    interrupted: bool = False


def run(config: Config, *, fresh: bool = False, display: Display | None = None) -> Result:
    """Ask what a config asks and has no answer yet; also where an event loop runs already (Jupyter).

    Ctrl-C ends it within seconds with every finished answer on disk; a second one ends it at once.

    Args:
        config: what to ask.
        fresh: set the answers of the config's models aside first, and ask everything.
        display: where progress is shown; nowhere by default.

    Raises:
        InputError: the config, the prompts or the output folder cannot be used; nothing was asked.
        DiskError: answers can no longer be written; those written before are whole.
    """
    with display or Silent() as shown:
        output, plan = prepare(config)
        stored = answered_ids(output)  # refuses a folder that is no store, with `fresh` too
        answered: Set[str] = frozenset() if fresh else stored
        survey = plan.survey(answered)
        if not any(survey.pending):
            compact(output, new_run_id(datetime.now(UTC)), shown.note)
            return Result(None, output, already_answered=survey.requests)
        require_ready([entry for entry, count in zip(config.models, survey.pending, strict=True) if count])
        with Store(output, run_id := new_run_id(datetime.now(UTC)), notify=shown.note) as store:
            models = {entry.name for entry in config.models}
            aside = set_aside(output, models, datetime.now(UTC)) if fresh else None
            now_answered = answered_ids(output)  # again, now that nobody else writes
            if now_answered != answered:
                answered, survey = now_answered, plan.survey(now_answered)
            generation = _Generation(plan, survey, store, run_id, answered, shown, aside)
            with ThreadPoolExecutor(1, thread_name_prefix="hallubench") as thread:
                ending = thread.submit(generation.run_until_complete)
                while True:
                    try:
                        while not ending.done():
                            wait([ending], timeout=SIGNAL_SECONDS)
                        return ending.result()
                    except KeyboardInterrupt:
                        generation.interrupt()


def prepare(config: Config) -> tuple[Path, Plan]:
    """The output folder and the plan of a config; needs no weights, no network and no SDK.

    Raises:
        ConfigError: the config cannot be asked as it is.
    """
    if config.prompts_file is None:
        raise ConfigError("no prompts: set `prompts_file` in the config, or give --prompts FILE")
    if config.output_dir is None:
        raise ConfigError("no output folder: set `output_dir` in the config, or give --output DIR")
    prompts = PromptFile(Path(config.prompts_file), config.num_prompts)
    return Path(config.output_dir), make_plan(config, prompts)


class _Generation:
    """One run, from the first request to the last row."""

    def __init__(
        self,
        plan: Plan,
        survey: Survey,
        store: Store,
        run_id: str,
        answered: Container[str],
        display: Display,
        set_aside: Path | None,
    ) -> None:
        self._plan = plan
        self._survey = survey
        self._store = store
        self._run_id = run_id
        self._answered = answered
        self._display = display
        self._set_aside = set_aside
        open_ = sum(survey.pending)
        self._result = Result(run_id, store.folder, survey.requests - open_, pending=open_)
        self._loop = asyncio.new_event_loop()
        self._purse = Purse.of(plan.config)
        self._interrupts = 0
        self._end_soon = asyncio.Event()
        self._end_now = asyncio.Event()

    def interrupt(self) -> None:
        """End soon; called again, end now. May be called from any thread."""
        self._interrupts += 1
        event = self._end_soon if self._interrupts == 1 else self._end_now
        with suppress(RuntimeError):  # the loop has just ended by itself
            self._loop.call_soon_threadsafe(event.set)

    def run_until_complete(self) -> Result:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            return runner.run(self._run())

    async def _run(self) -> Result:
        result = self._result
        self._record = RunRecord(
            self._store.runs_dir,
            self._run_id,
            self._plan.config,
            self._plan.prompts.facts() | {"count": self._survey.prompts},
            set_aside=self._set_aside,
        )
        try:
            async with Writer(self._store) as self._writer:
                await self._run_lanes()
        except Exception as error:
            result.problems.append(str(error))
            raise
        finally:
            status: Status = (
                "failed" if result.problems else "interrupted" if result.interrupted else "finished"
            )
            counts = {
                name: getattr(result, name) for name in ("answered", "failed", "pending", "already_answered")
            }
            self._record.end(status, counts, result.problems)
        return result

    async def _run_lanes(self) -> None:
        """All lanes at once, until each has ended, the user interrupts, or the disk refuses."""
        lanes = [lane for lane in self._plan.lanes if self._pending(lane)]
        self._display.start({lane.name: self._pending(lane) for lane in lanes})
        running = asyncio.gather(*map(self._run_lane, lanes))
        soon, now, broken = (
            asyncio.ensure_future(event.wait())
            for event in (self._end_soon, self._end_now, self._writer.broken)
        )
        try:
            await _first(running, soon, broken)
            if soon.done() and not running.done():
                self._display.note("Interrupted: finishing what is in flight; press Ctrl-C again to end now.")
                await _first(running, now, broken, seconds=GRACE_SECONDS)
        finally:
            for future in (running, soon, now, broken):
                future.cancel()
            with suppress(asyncio.CancelledError):
                await running
            self._result.interrupted = self._end_soon.is_set() and self._result.pending > 0

    async def _run_lane(self, lane: Lane) -> None:
        purses = (*self._purse, *Purse.of(lane.groups[0].entries[0]))
        for group in lane.groups:
            if not self._pending(lane, group) or self._end_soon.is_set():
                continue
            try:
                await self._run_group(lane, group, Spending(self._plan.config, purses))
            except HallubenchError as error:
                self._problem(lane, str(error))
            except Exception as error:  # a fault of ours or of an SDK must not touch the other lanes
                secrets = self._plan.config.secrets
                log = self._store.runs_dir / f"{self._run_id}.traceback.txt"
                with suppress(OSError):  # a full disk is the writer's to report
                    trace = redact(traceback.format_exc(), secrets)
                    log.write_text(trace, encoding="utf-8", errors="backslashreplace")
                words = printable(redact(f"{type(error).__name__}: {error}", secrets))
                self._problem(lane, f"{group.name}: unexpected {words} (see {log})")

    async def _run_group(self, lane: Lane, group: Group, spending: Spending) -> None:
        """One provider answers its share; another one goes on if its engine dies."""
        requests = self._plan.requests(group, self._answered)
        in_flight: dict[str, Request] = {}
        try:
            await self._ask(lane, group, spending, requests, in_flight)
        except EngineDied as death:
            if self._end_soon.is_set():
                raise
            self._display.note(f"{group.name}: {death}: loading it once more, to go on")
            try:
                await self._ask(lane, group, spending, requests, in_flight)
            except EngineDied as error:
                raise LaneError(f"{error}, for the second time; run again to go on") from error
        if in_flight and not self._end_soon.is_set():
            raise LaneError(
                f"{group.name}: {len(in_flight)} requests got no completion; run again to ask them"
            )
        spending.check_finished()

    async def _ask(
        self,
        lane: Lane,
        group: Group,
        spending: Spending,
        requests: Iterator[Request],
        in_flight: dict[str, Request],
    ) -> None:
        """Open the group's provider and put each answer into the store as soon as it is whole.

        `in_flight` has the requests that were drawn and not answered: these are asked first.
        """
        again = iter(tuple(in_flight.values()))

        def draw() -> Iterator[Request]:
            for request in chain(again, spending.affordable(requests)):
                if self._end_soon.is_set():
                    return
                in_flight[request.request_id] = request
                yield request

        context = Context(
            config=self._plan.config,
            entries=group.entries,
            run_id=self._run_id,
            runs_dir=self._store.runs_dir,
            record=self._record.add,
            notify=self._display.note,
            stopping=self._end_soon,
        )
        async with open_provider(group.entries[0].type, context) as provider:
            self._display.begin(lane.name)
            while not self._end_soon.is_set():
                async with aclosing(provider.generate(draw())) as completions:
                    async for completion in completions:
                        request = in_flight.pop(completion.request_id)
                        cost_usd = spending.settle(request, completion)
                        await self._writer.put(Row(self._run_id, request, completion, cost_usd))
                        self._count(lane, completion, cost_usd)
                if in_flight or not spending.can_go_on:
                    break

    def _pending(self, lane: Lane, group: Group | None = None) -> int:
        groups = lane.groups if group is None else (group,)
        entries = [entry for group in groups for entry in group.entries]
        return sum(
            count
            for entry, count in zip(self._plan.config.models, self._survey.pending, strict=True)
            if any(entry is one for one in entries)
        )

    def _count(self, lane: Lane, completion: Completion, cost_usd: float | None) -> None:
        failed = completion.error is not None
        self._result.failed += failed
        self._result.answered += not failed
        self._result.pending -= 1
        tokens = completion.usage.output_tokens or 0
        self._display.advance(lane.name, failed=failed, tokens=tokens, cost_usd=cost_usd or 0.0)

    def _problem(self, lane: Lane, message: str) -> None:
        self._result.problems.append(f"{lane.name}: {message}")
        self._display.note(f"{lane.name} stopped: {message}")


async def _first(*futures: asyncio.Future[Any], seconds: float | None = None) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED, timeout=seconds)
