"""What hallubench costs beside the models: start-up, a run with nothing to do, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import median, prompts_file, report

COMMAND = [sys.executable, "-m", "hallubench"]
ROUNDS = 5


def seconds(*arguments: str) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run(
            [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
        )
        times.append(time.perf_counter() - started)
    return median(times)


def write_config(folder: Path, prompts: Path, **entry: Any) -> Path:
    model = {"name": "echo", "type": "echo", "temperature": 0.0, "logprobs": 5, "prompt_logprobs": 5}
    config = {"prompts_file": str(prompts), "output_dir": str(folder / "out"), "models": [model | entry]}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def bench_start_up(folder: Path) -> None:
    report("seconds of `hallubench --help`", value := seconds("--help"), "< 0.25", met=value < 0.25)
    config = str(write_config(folder, prompts_file()))
    subprocess.run([*COMMAND, "generate", "--config", config], check=True, capture_output=True)
    value = seconds("generate", "--config", config)
    report("seconds of a `generate` with nothing left to do", value, "< 1.5", met=value < 1.5)


def bench_memory(folder: Path) -> None:
    """Peak memory of runs over 1,000 and 100,000 pending requests that are interrupted by their provider."""
    peaks = []
    for count in (1_000, 100_000):
        home = folder / str(count)
        home.mkdir()
        prompts = home / "prompts.jsonl"
        with prompts.open("w") as file:
            for number in range(count):
                file.write(
                    json.dumps({"id": f"p{number}", "prompt": f"Does CVE-2024-{number} exist?"}) + "\n"
                )
        config = write_config(home, prompts, engine={"die_after": 900})
        process = subprocess.Popen(
            [*COMMAND, "generate", "--config", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, _, usage = os.wait4(process.pid, 0)
        peaks.append(usage.ru_maxrss)
    growth = peaks[1] / peaks[0]
    report("peak memory at 100,000 pending requests over that at 1,000", growth, "<= 1.1", met=growth <= 1.1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        bench_start_up(Path(scratch))
        bench_memory(Path(scratch))
