"""`kill -9` at any instant loses no answer, asks none twice, and leaves a store that can be read.

Each of several stores is killed again and again, at one call or another of its runs and at times by the
clock, and then comes to its end. `pytest -rP tests/faults/test_kill.py` prints how often each was killed.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from random import Random

import polars as pl
import pytest
from faulty_runs import Fault, Job, check_finished, check_whole, contents, exported_ids, finish, write_config

from hallubench.store import answered_ids

SEED = 20261123
KILLS = 200
KILLS_OF_A_STORE = 20
PROMPTS = 60
CLOCK = "the clock"
MORE_TRIES = 4

# The calls that are killed, with a number that each run reaches: the n-th one is killed, n drawn up to it.
FIRST = {"mkdir folder": 2}
RUN = {
    "import": 700,
    "lock": 1,
    "fsync record": 1,
    "replace record": 1,
    "write_table part": 6,
    "close part": 6,
    "fsync part": 6,
    "rename part": 6,
    "fsync folder": 6,
    "write_table merged": 2,
    "close merged": 2,
    "fsync merged": 2,
    "rename merged": 2,
    "unlink part": 4,
}
END = {
    "final fsync record": 1,
    "final replace record": 1,
    "final write_table merged": 1,
    "final close merged": 1,
    "final fsync merged": 1,
    "final rename merged": 1,
    "final unlink part": 2,
    "final fsync folder": 1,
}
EXPORT = {"fsync export": 2, "unlink export": 2, "replace export": 2}


def draw(random: Random, calls: dict[str, int]) -> Iterator[Fault]:
    """Faults without an end: every one comes once before any comes again."""
    points = [
        (when, call) for call in calls for when in ("before", "after") if (when, call) != ("after", "import")
    ]
    random.shuffle(points)
    for when, call in cycle(points):
        yield Fault(when, call, random.randint(1, calls[call]))


def make_plan(random: Random) -> list[list[Fault]]:
    """The kills of each store, in the order in which a run comes to them."""
    first, run, end, export = (draw(random, calls) for calls in (FIRST, RUN, END, EXPORT))
    plan = []
    for _ in range(KILLS // KILLS_OF_A_STORE):
        middle = [*islice(run, 8), *[Fault("at", CLOCK, 1)] * 4]
        random.shuffle(middle)
        plan.append([next(first), *middle, *islice(end, 4), *islice(export, 3)])
    return plan


class Victim:
    """One store, killed at all that its plan names."""

    def __init__(self, folder: Path, number: int, plan: list[Fault]) -> None:
        self.job = Job(folder, folder / f"store-{number}")
        self.killed: Counter[str] = Counter()
        self._plan = plan
        self._random = Random(SEED + number)
        self._longest = 1.5
        """Seconds within which the clock kills a run: those of the last one that ended by itself."""
        self._flushed: set[str] = set()

    def live(self) -> None:
        """Be killed again and again, then go on to the end.

        Raises:
            AssertionError: an answer was lost, doubled or asked for again; a note says after which kill.
        """
        exports = False
        try:
            for fault in self._plan:
                if not exports and fault.call in EXPORT:
                    self._finish()
                    self._export()
                    exports = True
                for number in (fault.number, *[1] * MORE_TRIES):
                    if self._kill(fault._replace(number=number)):
                        break
                else:
                    raise AssertionError(f"no run came to {fault}")
            self._export()
        except Exception as error:
            error.add_note(f"{self.job.output.name}, run {self.job.runs}, seed {SEED}: {self.job.log.fault}")
            raise

    def _kill(self, fault: Fault) -> bool:
        """Run until the fault; false if the run ended before it came to it."""
        before = answered_ids(self.job.output)
        if fault.call in EXPORT:
            process = self.job.start(*self._export_command, fault=fault)
        else:
            process = self.job.start(fault=None if fault.call == CLOCK else fault)
        started = time.monotonic()
        try:
            within = self._random.uniform(0, self._longest) if fault.call == CLOCK else 60
            _, stderr = process.communicate(timeout=within)
            self._longest = time.monotonic() - started
        except subprocess.TimeoutExpired:
            process.kill()
            _, stderr = process.communicate()
        log = self.job.log
        assert process.returncode in (0, -9), stderr
        assert before.isdisjoint(log.asked), "an answer that was there is asked for again"
        self._flushed |= log.flushed
        check_whole(self.job.output, self._flushed)
        if fault.call in EXPORT:
            exported_ids(self.job.output / "export")
        killed = process.returncode == -9
        self.killed[f"{fault.when} {fault.call}"] += killed
        return killed

    def _finish(self) -> None:
        before = answered_ids(self.job.output)
        finish(self.job.start())
        assert before.isdisjoint(self.job.log.asked), "an answer that was there is asked for again"
        check_finished(self.job.output)

    def _export(self) -> None:
        finish(self.job.start(*self._export_command))
        exported = exported_ids(self.job.output / "export")
        assert exported == set(contents(self.job.output)["request_id"])

    @property
    def _export_command(self) -> tuple[str, ...]:
        return ("export-json", str(self.job.output), "--layout", "per-model")


@pytest.mark.slow
def test_whatever_is_killed_ends_with_what_an_undisturbed_run_gives(tmp_path: Path) -> None:
    write_config(tmp_path, prompts=PROMPTS)
    alone = Job(tmp_path, tmp_path / "alone")
    finish(alone.start())
    undisturbed = contents(alone.output)
    assert undisturbed.height == 3 * PROMPTS
    victims = [Victim(tmp_path, *one) for one in enumerate(make_plan(Random(SEED)))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for victim in threads.map(lambda victim: victim.live() or victim, victims):
            assert contents(victim.job.output).equals(undisturbed), f"{victim.job.output.name}, seed {SEED}"
    killed = sum((victim.killed for victim in victims), Counter())
    print(
        f"{killed.total()} kills:", *(f"{count:4} {call}" for call, count in sorted(killed.items())), sep="\n"
    )
    assert killed.total() >= KILLS


def test_what_a_killed_compaction_left_is_done_by_a_run_with_nothing_left_to_ask(tmp_path: Path) -> None:
    write_config(tmp_path, prompts=8, engine={"delay": 0.003})
    job = Job(tmp_path, tmp_path / "out")
    job.start(fault=Fault("after", "final rename merged", 1)).communicate(timeout=60)
    assert job.log.fault is not None
    check_whole(job.output, job.log.flushed)
    stdout, _ = finish(job.start())
    assert stdout.startswith("Nothing left to ask: all 24 requests are answered")
    check_finished(job.output)
    assert pl.read_parquet(f"{job.output}/**/*.parquet")["request_id"].n_unique() == 24


@pytest.mark.slow
@pytest.mark.parametrize(("act", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_at_any_instant_ends_cleanly_and_prints_how_to_go_on(
    tmp_path: Path, act: str, code: int
) -> None:
    write_config(tmp_path, prompts=10, engine={"delay": 0.01})
    instants = [
        Fault("before", "import", 400, act),
        Fault("before", "fsync record", 1, act),
        Fault("before", "write_table part", 1, act),
        Fault("before", "rename merged", 1, act),
        Fault("before", "final replace record", 1, act),
        Fault("after", "final rename merged", 1, act),
    ]
    for number, fault in enumerate(instants):
        job = Job(tmp_path, tmp_path / f"{act}-{number}")
        process = job.start(fault=fault)
        _, stderr = process.communicate(timeout=60)
        assert job.log.fault is not None
        assert "Traceback" not in stderr, (fault, stderr)
        answered = answered_ids(job.output)
        check_whole(job.output, job.log.flushed)
        if process.returncode:
            assert process.returncode == code, (fault, process.returncode, stderr)
            assert stderr.endswith(f"\n  hallubench {' '.join(job.generate)}\n"), (fault, stderr)
        else:  # all was answered when the signal came
            assert len(answered) == 30, fault
        finish(job.start())
        assert answered.isdisjoint(job.log.asked)
        assert len(answered_ids(job.output)) == 30
        check_finished(job.output)
