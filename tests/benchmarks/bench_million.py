"""A million answers of the deterministic provider: written, resumed, merged, exported and read.

Each has five alternatives at each of 20 tokens. Every step is a process of its own, so that its peak
memory is its own; memory is compared with that of the same step over few rows.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import report, run_role

ROWS = 1_000_000
FEW = 10_000
LEGACY_ROWS = 50_000
"""Rows of which the legacy JSON is loaded: of a million, it would not fit into memory."""
PACED_ROWS = 20_000
PACE = 1_000
"""Answers a second of the paced run."""
TOKENS = 20
ALTERNATIVES = 5
STEP = 100_000
MIB = 2**20

LAYOUTS = ("runs", "per-model", "flat")


def write_config(folder: Path, rows: int, **engine: Any) -> Path:
    """A config with a prompts file of its own."""
    prompts = folder / f"prompts-{rows}.jsonl"
    with prompts.open("w") as file:
        for number in range(rows):
            entry = {"id": f"p{number}", "prompt": f"Does CVE-2024-{number} exist? What does it affect?"}
            file.write(json.dumps(entry | {"category": "cve_existence"}) + "\n")
    model = {"name": "echo", "type": "echo", "temperature": 0.0, "max_tokens": TOKENS, "engine": engine}
    config = {"prompts_file": str(prompts), "output_dir": str(folder / f"store-{rows}")}
    path = folder / f"config-{rows}.json"
    path.write_text(json.dumps(config | {"models": [model | {"logprobs": ALTERNATIVES}]}))
    return path


def generate(config: str) -> dict[str, Any]:
    """Run; rows/s and memory at every `STEP` answers, and the seconds that the store's thread was busy."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # as the command does
    from hallubench.config import load_config
    from hallubench.generate import run
    from hallubench.progress import Silent
    from hallubench.writer import Writer

    times: list[float] = []
    memory: list[int] = []

    class Clock(Silent):
        answered = 0

        def begin(self, lane: str) -> None:
            times.append(time.perf_counter())

        def advance(self, lane: str, **_: Any) -> None:
            self.answered += 1
            if self.answered % STEP == 0:
                times.append(time.perf_counter())
                memory.append(rss())

    busy = 0.0
    append = Writer._append

    def timed(self: Writer, rows: Any) -> None:
        nonlocal busy
        started = time.thread_time()
        append(self, rows)
        busy += time.thread_time() - started

    Writer._append = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    result = run(load_config(Path(config)), display=Clock())
    seconds = time.perf_counter() - started
    if result.problems or result.failed:
        sys.exit("; ".join(result.problems) or f"{result.failed} requests failed")
    return {
        "rates": [STEP / (end - begin) for begin, end in pairwise(times)],
        "memory": memory,
        "busy": busy,
        "seconds": seconds,
        "peak": peak(),
    }


def resume(config: str) -> dict[str, Any]:
    """Plan and compare with what is answered, as `generate` does before it asks anything."""
    started = time.perf_counter()
    from hallubench.config import load_config
    from hallubench.generate import run

    imported = time.perf_counter()
    result = run(load_config(Path(config)))
    if result.run_id is not None:
        sys.exit("something was left to ask")
    return {"seconds": time.perf_counter() - imported, "import": imported - started, "peak": peak()}


def compact(store: str) -> dict[str, Any]:
    """Merge all parts of a store, as the end of a run does with those that the run wrote."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    from hallubench.parts import live_parts
    from hallubench.store import Store

    (model_dir,) = Path(store).glob("model=*")
    with Store(Path(store), "bench") as open_store:
        started = time.perf_counter()
        open_store._merge(model_dir, live_parts(model_dir))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": peak()}


def export(store: str, layout: str) -> dict[str, Any]:
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    from datetime import UTC, datetime

    from hallubench.legacy import export_json

    with tempfile.TemporaryDirectory(dir=Path(store).parent) as target:
        started = time.perf_counter()
        files = export_json(
            Path(store),
            output=Path(target),
            layout=layout,  # type: ignore[arg-type]
            logprob_tokens=None,
            now=datetime.now(UTC),
        )
        seconds = time.perf_counter() - started
        written = sum(path.stat().st_size for path in files)
    return {"seconds": seconds, "peak": peak(), "bytes": written}


def load_parquet(store: str) -> dict[str, Any]:
    """Load the columns that the legacy JSON has."""
    import polars as pl

    from hallubench.result_text import COLUMNS

    started = time.perf_counter()
    rows = pl.scan_parquet(f"{store}/**/*.parquet", hive_partitioning=True).select(COLUMNS).collect()
    return {"rows": rows.height, "seconds": time.perf_counter() - started}


def load_legacy(file: str) -> dict[str, Any]:
    started = time.perf_counter()
    with Path(file).open() as opened:
        document = json.load(opened)
    rows = sum(len(run["results"]) for run in document["runs"])
    return {"rows": rows, "seconds": time.perf_counter() - started}


def select(store: str, *columns: str) -> dict[str, Any]:
    """Read some columns of all rows; the bytes that the kernel fetched of the files."""
    import polars as pl

    for path in Path(store).rglob("*.parquet"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = fetched()
    started = time.perf_counter()
    rows = pl.scan_parquet(f"{store}/**/*.parquet", hive_partitioning=True).select(columns).collect()
    return {"rows": rows.height, "seconds": time.perf_counter() - started, "bytes": fetched() - before}


def fetched() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_write(folder: Path, few: Path, many: Path) -> None:
    run_role(__file__, "generate", str(few))
    done = run_role(__file__, "generate", str(many))
    rates, memory = done["rates"], done["memory"]
    print(f"{ROWS:,} answers written in {done['seconds']:.0f} s; rows/s of each {STEP:,}: {rounded(rates)}")
    print(f"memory at each {STEP:,} answers, MiB: {rounded([used / MIB for used in memory])}")
    spread = max(rates) / min(rates)
    growth = max(memory) / memory[0]
    report(f"fastest {STEP:,} rows over the slowest", spread, "<= 1.2", met=spread <= 1.2)
    report(f"memory over that after the first {STEP:,}", growth, "<= 1.1", met=growth <= 1.1)


def bench_pace(folder: Path) -> None:
    config = write_config(folder, PACED_ROWS, delay=1 / PACE)
    done = run_role(__file__, "generate", str(config))
    share = done["busy"] / done["seconds"]
    print(f"{PACED_ROWS / done['seconds']:.0f} answers/s for {done['seconds']:.0f} s")
    report("CPU time of appending over the wall time", share, "< 0.05", met=share < 0.05)


def bench_resume(many: Path) -> None:
    done = run_role(__file__, "resume", str(many))
    print(f"peak memory of finding that nothing is left: {done['peak'] / MIB:.0f} MiB")
    report("seconds to plan and compare a finished million", done["seconds"], "< 5", met=done["seconds"] < 5)


def bench_memory(few: Path, many: Path) -> None:
    """The peak of what goes through all rows, over that of the same with few."""

    def compare(what: str, role: str, *arguments: str) -> dict[str, Any]:
        least, most = (run_role(__file__, role, str(store), *arguments) for store in (few, many))
        more = (most["peak"] - least["peak"]) / MIB
        print(f"{what}: {most['seconds']:.0f} s, peak {most['peak'] / MIB:.0f} MiB")
        report(f"{what}: MiB more than with {FEW:,} rows", more, "< 500", met=more < 500)
        return most

    compare("merge", "compact")
    for layout in LAYOUTS:
        written = compare(f"export-json --layout {layout}", "export", layout)["bytes"]
    parquet = size(many)
    per_row = (parquet / ROWS, written / ROWS)
    print(f"bytes a row: Parquet {per_row[0]:.0f}, legacy JSON {per_row[1]:.0f}")
    print(f"bytes a token: Parquet {per_row[0] / TOKENS:.1f}, legacy JSON {per_row[1] / TOKENS:.1f}")


def bench_read(folder: Path, many: Path) -> None:
    columns = ("model", "finish_reason", "output_logprobs")
    done = run_role(__file__, "select", str(many), *columns)
    share = done["bytes"] / size(many)
    print(
        f"{', '.join(columns)} of {done['rows']:,} rows: {done['seconds']:.1f} s, "
        f"{done['bytes'] / MIB:.0f} MiB read"
    )
    report(
        "bytes read over those of the store",
        share,
        f"<= {wanted(many, columns):.3g}",
        met=share <= wanted(many, columns),
    )
    legacy = write_config(folder, LEGACY_ROWS)
    run_role(__file__, "generate", str(legacy))
    store = folder / f"store-{LEGACY_ROWS}"
    from datetime import UTC, datetime

    from hallubench.legacy import export_json

    (file,) = export_json(store, output=folder / "legacy", logprob_tokens=None, now=datetime.now(UTC))
    parquet, json_ = (
        run_role(__file__, "load_parquet", str(store)),
        run_role(__file__, "load_legacy", str(file)),
    )
    times = json_["seconds"] / parquet["seconds"]
    print(
        f"the same of {LEGACY_ROWS:,} rows: Parquet {parquet['seconds']:.2f} s, "
        f"legacy JSON {json_['seconds']:.1f} s"
    )
    report("seconds to load legacy JSON over those of Parquet", times, ">= 20", met=times >= 20)


def wanted(store: Path, columns: tuple[str, ...]) -> float:
    """The share of a store's bytes that some columns have, and a fifth more for footers and read-ahead."""
    import pyarrow.parquet as pq

    bytes_ = 0
    for path in store.rglob("*.parquet"):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            chunks = (metadata.row_group(group).column(number) for number in range(metadata.num_columns))
            bytes_ += sum(
                chunk.total_compressed_size
                for chunk in chunks
                if chunk.path_in_schema.split(".")[0] in columns
            )
    return 1.2 * bytes_ / size(store)


def size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*.parquet"))


def rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        few, many = write_config(folder, FEW), write_config(folder, ROWS)
        bench_write(folder, few, many)
        bench_pace(folder)
        bench_resume(many)
        bench_memory(folder / f"store-{FEW}", folder / f"store-{ROWS}")
        bench_read(folder, folder / f"store-{ROWS}")


if __name__ == "__main__":
    roles: dict[str, Callable[..., dict[str, Any]]] = {
        role.__name__: role for role in (generate, resume, compact, export, load_parquet, load_legacy, select)
    }
    if len(sys.argv) > 1:
        print(json.dumps(roles[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
