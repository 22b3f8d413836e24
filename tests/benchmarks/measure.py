"""What the benchmarks share: whole processes run in turn, so that a slow minute of the machine hits both."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED_PROMPTS = ROOT.parent / "shared" / "data" / "hallu-sec-benchmark.json"
DEMO_PROMPTS = ROOT / "configs" / "demo_prompts.json"


def prompts_file() -> Path:
    """The 393 real prompts where they are, else the demo's 45."""
    return SHARED_PROMPTS if SHARED_PROMPTS.exists() else DEMO_PROMPTS


def demo_model() -> Path:
    """The model that `make demo` prepares."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    default = Path(cache) / "hallubench" / "SmolLM2-135M-Instruct"
    return Path(os.environ.get("HALLUBENCH_DEMO_MODEL", default))


def run_role(script: str, role: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark script as a process of its own; what its last line of JSON says."""
    done = subprocess.run(
        [sys.executable, script, role, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{script} {role} failed:\n{done.stderr[-3000:]}")
    # vLLM's processes may write to standard output after it.
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    result: dict[str, Any] = json.loads(line)
    return result


def report(what: str, measured: float, wanted: str, *, met: bool) -> None:
    """One line: what was measured, beside what it has to reach."""
    print(f"{what}: {measured:.3g} (to reach: {wanted}) {'ok' if met else 'NOT REACHED'}")


def median(values: list[float]) -> float:
    return statistics.median(values)
