"""Starts runs in which something goes wrong, and checks what they leave on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow.parquet as pq

from hallubench.store import RUNS, answered_ids, scan

DRIVER = Path(__file__).with_name("driver.py")
OF_THIS_RUN = ("run_id", "timestamp", "elapsed_seconds")
"""The columns that differ when the same is asked again."""


class Fault(NamedTuple):
    """What goes wrong: see driver.py."""

    when: str
    call: str
    number: int
    act: str = "SIGKILL"


@dataclass
class Log:
    """What a run asked and wrote, by the ids of requests."""

    asked: list[str] = field(default_factory=list)
    flushed: set[str] = field(default_factory=set)
    fault: str | None = None
    """The call that went wrong; None while none did."""
    final: bool = False
    """Whether the run has come to its end, where it compacts."""


@dataclass
class Job:
    """A command to run again and again, with one thing or another going wrong, on one output folder."""

    folder: Path
    """Of the config, the prompts and the logs."""
    output: Path
    runs: int = 0

    def start(self, *command: str, fault: Fault | None = None, **options: Any) -> subprocess.Popen[str]:
        """The command in a process of its own; `options` are the driver's."""
        self.runs += 1
        settings = {"log": str(self._log), "fault": fault} | options
        return subprocess.Popen(
            [sys.executable, str(DRIVER), json.dumps(settings), *(command or self.generate)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def generate(self) -> tuple[str, ...]:
        return ("generate", "--config", str(self.folder / "config.json"), "--output", str(self.output))

    @property
    def log(self) -> Log:
        """Of the newest run."""
        log = Log()
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            match line.split(" ", 1):
                case "asked", id_:
                    log.asked.append(id_)
                case "flushed", id_:
                    log.flushed.add(id_)
                case "fault", call:
                    log.fault = call
                case "final", *_:
                    log.final = True
        return log

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.output.name}-{self.runs}.log"


def write_config(folder: Path, *, prompts: int, **entry: Any) -> None:
    """Two models, one asked twice; one in seven requests fails whenever it is asked."""
    questions = [{"id": f"p{i}", "prompt": f"Is claim {i} true?"} for i in range(prompts)]
    (folder / "prompts.json").write_text(json.dumps(questions))
    common = {"type": "echo", "temperature": 0, "engine": {"delay": 0.003, "error_rate": 1 / 7}} | entry
    models = [{"name": "org/model-a", "n": 2} | common, {"name": "model-b"} | common]
    config = {"prompts_file": str(folder / "prompts.json"), "models": models}
    (folder / "config.json").write_text(json.dumps(config))


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Its two outputs, when it has ended."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, (process.returncode, stdout, stderr)
    assert "Traceback" not in stderr, stderr
    return stdout, stderr


def check_whole(folder: Path, flushed: set[str]) -> None:
    """A store as it may be found at any time: every file whole, no request twice, nothing flushed missing."""
    parts = list(folder.rglob("*.parquet"))
    for path in parts:
        pq.read_table(path)
    for path in folder.glob(f"{RUNS}/*.json"):
        json.loads(path.read_text())
    if parts:
        raw = pl.scan_parquet(f"{folder}/**/*.parquet", hive_partitioning=True).collect()
        assert flushed <= set(raw["request_id"]), "an answer that was flushed is missing in the files"
    if (folder / RUNS).exists():
        ids = scan(folder).select("request_id").collect().to_series()
        assert ids.n_unique() == len(ids), "a request is there twice"
    assert flushed <= answered_ids(folder), "an answer that was flushed is missing"


def check_finished(folder: Path) -> None:
    """A store after a run that came to its end: one part a model, nothing half-written."""
    for model_dir in folder.glob("model=*"):
        assert [path.suffix for path in model_dir.iterdir()] == [".parquet"], list(model_dir.iterdir())


def contents(folder: Path) -> pl.DataFrame:
    """All that a store holds, without what belongs to the single run."""
    return scan(folder).drop(OF_THIS_RUN).sort("request_id").collect()


def exported_ids(folder: Path) -> set[str]:
    """The requests whose results the exported files of a folder hold, each once."""
    ids = [
        result["request_id"]
        for path in folder.rglob("pilot_*.json")
        for run in json.loads(path.read_text())["runs"]
        for result in run["results"]
    ]
    assert len(set(ids)) == len(ids), "a result is there twice"
    return set(ids)
