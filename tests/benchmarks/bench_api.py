"""The API lanes against bare SDKs, limits and each other, on a loopback server that only answers.

Rates are those that the server counts, from the first request that it reads to the last answer that
it sends; "whole" is the process, from its start until every answer is in the store.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loopback_server import Calls, LoopbackServer
from measure import demo_model, median, report, run_role

MODELS: dict[str, dict[str, Any]] = {
    "claude": {"name": "claude-sonnet-4-5"},
    "gemini": {"name": "gemini-2.5-flash", "sdk": "google-genai"},
    "openai": {"name": "gpt-4.1-mini"},
}
MAX_TOKENS = 64
API_KEY = "sk-loopback"

ROUNDS = 3
CONNECTIONS = 200
LATENCY = 0.2
PROMPTS = 4_000
MEMORY_PROMPTS = (1_000, 100_000)

RATE = 600
BURST = 10
MINUTES = 2

LANE_LATENCIES = {"claude": 0.25, "gemini": 0.2, "openai": 0.15}
LANE_CONCURRENCY = 20
LANE_PROMPTS = 600

ENGINE_PROMPTS = 300
ENGINE_CONCURRENCY = 2
"""So that the API lane takes about as long as the engine."""


def write_prompts(folder: Path, count: int) -> Path:
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            entry = {"id": f"p{number}", "prompt": f"Does CVE-2024-{number} exist? What does it affect?"}
            file.write(json.dumps(entry) + "\n")
    return path


def hallubench(config: str) -> dict[str, Any]:
    from hallubench.config import Config
    from hallubench.generate import run

    result = run(Config.model_validate(json.loads(config)))
    if result.problems or result.failed:
        sys.exit("; ".join(result.problems) or f"{result.failed} requests failed")
    return {"answered": result.answered}


def lanes(config: str) -> dict[str, float]:
    """Seconds of each lane, from the loaded model or open client to its last answer."""
    from hallubench.config import Config
    from hallubench.generate import run
    from hallubench.progress import Silent

    begun: dict[str, float] = {}
    ended: dict[str, float] = {}

    class Clock(Silent):
        def begin(self, lane: str) -> None:
            begun[lane] = time.perf_counter()

        def advance(self, lane: str, **_: Any) -> None:
            ended[lane] = time.perf_counter()

    result = run(Config.model_validate(json.loads(config)), display=Clock())
    if result.problems or result.failed:
        sys.exit("; ".join(result.problems) or f"{result.failed} requests failed")
    return {lane: ended[lane] - begun[lane] for lane in ended}


def command(config: str) -> dict[str, Any]:
    """The same by the command, for its memory."""
    from hallubench.cli import main

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(config)
        file.flush()
        main(["generate", "--config", file.name], standalone_mode=False)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def bare_claude(url: str, prompts: str) -> dict[str, Any]:
    from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient
    from httpx2 import Limits

    async def main() -> int:
        limits = Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        client = AsyncAnthropic(
            api_key=API_KEY,
            base_url=url,
            max_retries=0,
            timeout=600.0,
            http_client=DefaultAsyncHttpxClient(limits=limits),
        )

        async def ask(prompt: str) -> object:
            return await client.messages.create(
                model=MODELS["claude"]["name"],
                max_tokens=MAX_TOKENS,
                messages=[{"role": "user", "content": prompt}],
            )

        async with client:
            return await ask_all(ask, read_prompts(prompts))

    return {"answered": asyncio.run(main())}


def bare_gemini(url: str, prompts: str) -> dict[str, Any]:
    import aiohttp
    from google import genai
    from google.genai.types import GenerateContentConfig, HttpOptions, HttpRetryOptions

    async def main() -> int:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
            options = HttpOptions(
                base_url=url,
                api_version="v1beta",
                retry_options=HttpRetryOptions(attempts=1),
                aiohttp_client=session,
            )
            client = genai.Client(vertexai=False, api_key=API_KEY, http_options=options)

            async def ask(prompt: str) -> object:
                return await client.aio.models.generate_content(
                    model=MODELS["gemini"]["name"],
                    contents=prompt,
                    config=GenerateContentConfig(max_output_tokens=MAX_TOKENS, seed=42),
                )

            return await ask_all(ask, read_prompts(prompts))

    return {"answered": asyncio.run(main())}


def read_prompts(path: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]


async def ask_all(ask: Callable[[str], Awaitable[object]], prompts: list[str]) -> int:
    """Ask by as many workers as there are connections; how many were answered."""
    waiting = iter(prompts)

    async def work() -> list[object]:
        return [await ask(prompt) for prompt in waiting]

    return sum(map(len, await asyncio.gather(*(work() for _ in range(CONNECTIONS)))))


def generate(
    folder: Path, urls: dict[str, str], prompts: Path, role: str = "hallubench", **settings: Any
) -> dict[str, Any]:
    """Run hallubench over a lane for each type in `urls`, as a process of its own."""
    models = [
        MODELS[type_] | {"type": type_, "base_url": url, "api_key": API_KEY, "max_tokens": MAX_TOKENS}
        for type_, url in urls.items()
    ]
    output = tempfile.mkdtemp(prefix="store-", dir=folder)
    config = {"prompts_file": str(prompts), "output_dir": output, "requests_per_minute": None}
    return run_role(__file__, role, json.dumps(config | settings | {"models": models}))


def timed(role: Callable[[str], dict[str, Any]], latency: float) -> tuple[Calls, float]:
    """What a server of its own counted of a role that is given its URL, and the whole's seconds."""
    with LoopbackServer(latency) as server:
        started = time.perf_counter()
        done = role(server.url)
        seconds = time.perf_counter() - started
        calls = server.calls()
    if len(calls.began) != done["answered"]:
        sys.exit(f"{len(calls.began)} calls for {done['answered']} answers")
    return calls, seconds


def bench_speed(folder: Path, type_: str) -> None:
    prompts = write_prompts(folder, PROMPTS)
    ratios, wholes = [], []
    for _ in range(ROUNDS):
        ours, our_whole = timed(
            lambda url: generate(folder, {type_: url}, prompts, max_concurrency=CONNECTIONS), LATENCY
        )
        bare, bare_whole = timed(lambda url: run_role(__file__, f"bare_{type_}", url, str(prompts)), LATENCY)
        ratios.append(ours.per_second / bare.per_second)
        wholes.append(bare_whole / our_whole)
        print(
            f"{type_}: hallubench {ours.per_second:.0f} requests/s, whole {our_whole:.1f} s; "
            f"bare SDK {bare.per_second:.0f} requests/s, whole {bare_whole:.1f} s"
        )
    ratio, whole = median(ratios), median(wholes)
    report(f"{type_}: requests/s of hallubench over the bare SDK", ratio, ">= 0.85", met=ratio >= 0.85)
    report(f"{type_}: the same of whole processes", whole, ">= 0.85", met=whole >= 0.85)


def bench_memory(folder: Path) -> None:
    peaks = []
    for count in MEMORY_PROMPTS:
        prompts = write_prompts(folder, count)
        with LoopbackServer(latency=0.0) as server:
            done = generate(folder, {"claude": server.url}, prompts, "command", max_concurrency=CONNECTIONS)
            calls = server.calls()
        peaks.append(done["peak"])
        print(f"{count} prompts: peak {peaks[-1] / 1024:.0f} MiB, {calls.per_second:.0f} requests/s")
    growth = peaks[1] / peaks[0]
    few, many = MEMORY_PROMPTS
    report(f"peak memory at {many:,} prompts over that at {few:,}", growth, "<= 1.1", met=growth <= 1.1)


def bench_limit(folder: Path) -> None:
    prompts = write_prompts(folder, BURST + RATE * MINUTES)
    calls, _ = timed(
        lambda url: generate(folder, {"claude": url}, prompts, requests_per_minute=RATE, burst=BURST), 0.1
    )
    minutes = (calls.began[-1] - calls.began[0]) / 60
    share = (len(calls.began) - BURST) / minutes / RATE
    most = calls.most_within(60)
    print(f"limit of {RATE} a minute, burst {BURST}: {share * RATE:.0f} a minute over {minutes:.2f} minutes")
    report("rate over the configured limit", share, ">= 0.97", met=share >= 0.97)
    report("most calls in any 60 s", most, f"<= {RATE + BURST}", met=most <= RATE + BURST)


def bench_lanes(folder: Path) -> None:
    prompts = write_prompts(folder, LANE_PROMPTS)
    ratios = []
    for _ in range(ROUNDS):
        alone = {type_: lane_seconds(folder, prompts, [type_]) for type_ in MODELS}
        together = lane_seconds(folder, prompts, MODELS)
        ratios.append(together / max(alone.values()))
        each = ", ".join(f"{type_} {seconds:.2f} s" for type_, seconds in alone.items())
        print(f"lanes alone: {each}; together {together:.2f} s")
    ratio = median(ratios)
    report("three lanes together over the slowest alone", ratio, "<= 1.05", met=ratio <= 1.05)


def bench_beside_engine(folder: Path) -> None:
    """How much an API lane and a local engine on the same cores cost each other: nothing to reach."""
    prompts = write_prompts(folder, ENGINE_PROMPTS)
    local = {"name": "demo", "type": "local", "model_path": str(demo_model()), "max_tokens": MAX_TOKENS}
    with LoopbackServer(LANE_LATENCIES["claude"]) as server:
        api = MODELS["claude"] | {"type": "claude", "base_url": server.url, "api_key": API_KEY}

        def seconds(*models: dict[str, Any]) -> dict[str, float]:
            output = tempfile.mkdtemp(prefix="store-", dir=folder)
            config = {"prompts_file": str(prompts), "output_dir": output, "requests_per_minute": None}
            settings = {"max_concurrency": ENGINE_CONCURRENCY, "models": models}
            return run_role(__file__, "lanes", json.dumps(config | settings))

        alone = seconds(local) | seconds(api)
        together = seconds(local, api)
    for lane, taken in together.items():
        print(f"{lane} lane: {alone[lane]:.1f} s alone, {taken:.1f} s beside the other")
    slowest = max(together.values()) / max(alone.values())
    print(f"a local and an API lane together over the slower alone, on the same cores: {slowest:.3g}")


def lane_seconds(folder: Path, prompts: Path, types: Iterable[str]) -> float:
    """From the first request of any lane to the last answer of any."""
    with ExitStack() as stack:
        servers = {type_: stack.enter_context(LoopbackServer(LANE_LATENCIES[type_])) for type_ in types}
        urls = {type_: server.url for type_, server in servers.items()}
        generate(folder, urls, prompts, max_concurrency=LANE_CONCURRENCY)
        calls = [server.calls() for server in servers.values()]
    return max(one.ended for one in calls) - min(one.began[0] for one in calls)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench_speed(folder, "claude")
        bench_speed(folder, "gemini")
        bench_lanes(folder)
        bench_beside_engine(folder)
        bench_limit(folder)
        bench_memory(folder)


if __name__ == "__main__":
    roles: dict[str, Callable[..., dict[str, Any]]] = {
        "hallubench": hallubench,
        "command": command,
        "lanes": lanes,
        "bare_claude": bare_claude,
        "bare_gemini": bare_gemini,
    }
    if len(sys.argv) > 1:
        print(json.dumps(roles[sys.argv[1]](*sys.argv[2:])))
    elif not demo_model().is_dir():
        sys.exit(f"{demo_model()} is not there; run `make demo` first")
    else:
        main()
