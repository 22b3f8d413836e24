"""Whole runs over API lanes: the command as a process of its own, the servers on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import polars as pl
import pytest
from fault_server import ANTHROPIC, GEMINI, OPENAI, Call, Fault, FaultServer, Response, answer_to, serving

from hallubench.store import scan

pytestmark = pytest.mark.slow

KEYS = {"claude": "sk-ant-LiteralSecret", "gemini": "AIza-SecretOfTheEnvironment", "openai": "sk-proj-Secret"}
DEMO_PROMPTS = Path(__file__).parents[1] / "configs" / "demo_prompts.json"

Behave = Callable[[Call], Response | Fault | None]


class Servers:
    """A server for each of three accounts, and a config that asks them and the echo provider."""

    def __init__(self, folder: Path, **servers: FaultServer) -> None:
        self.folder = folder
        self.servers = servers
        self.output = folder / "out"

    def config(self, prompts: Path, **settings: Any) -> Path:
        entries: list[dict[str, Any]] = [
            {"name": "claude-3-5-sonnet-20241022", "type": "claude", "temperature": 0.7},
            {"name": "gemini-1.5-pro", "type": "gemini", "sdk": "google-genai", "temperature": 0.0},
            {"name": "tiny", "type": "openai"},
        ]
        for entry in entries:
            entry["base_url"] = self.servers[entry["type"]].url
        entries[0]["api_key"] = KEYS["claude"]
        entries[2]["api_key"] = "${SECRET_OF_OPENAI}"
        entries.append({"name": "echo", "type": "echo"})
        path = self.folder / "config.json"
        whole = {"prompts_file": str(prompts), "output_dir": str(self.output), "models": entries}
        path.write_text(json.dumps({"requests_per_minute": None, **whole, **settings}))
        return path

    def calls(self) -> int:
        return sum(len(server.calls) for server in self.servers.values())


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Servers]]:
    with ExitStack() as stack:

        def start(**behaves: Behave) -> Servers:
            wires = {"claude": ANTHROPIC, "gemini": GEMINI, "openai": OPENAI}
            return Servers(
                tmp_path,
                **{
                    type_: stack.enter_context(serving(wire, behaves.get(type_, lambda call: None)))
                    for type_, wire in wires.items()
                },
            )

        yield start


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hallubench", *map(str, arguments)]


ENVIRONMENT = os.environ | {
    "GOOGLE_API_KEY": KEYS["gemini"],
    "SECRET_OF_OPENAI": KEYS["openai"],
    "COLUMNS": "200",
}


def hallubench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )


def attempts(output: Path) -> list[dict[str, Any]]:
    lines = [line for log in output.glob("_runs/*.attempts.jsonl") for line in log.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def some_prompts(folder: Path, number: int) -> Path:
    path = folder / "prompts.json"
    path.write_text(json.dumps([{"id": f"p{i}", "prompt": f"Is claim {i} true?"} for i in range(number)]))
    return path


def in_trouble() -> Behave:
    """Of the first attempts every tenth is refused, and others end in each way a network has."""
    place = count()
    troubles: dict[int, Response | Fault] = {
        1: Response({"error": {"type": "rate_limit_error", "message": "slow"}}, 429, {"retry-after": "0"}),
        4: Response({"error": {"type": "api_error", "message": "oops"}}, 500),
        6: Fault.RESET,
        8: Fault.CUT,
        9: Response("<html>a proxy</html>"),
    }

    def behave(call: Call) -> Response | Fault | None:
        return troubles.get(next(place) % 20) if call.attempt == 1 else None

    return behave


def test_real_prompts_reach_all_lanes_through_trouble_and_each_is_answered_once(
    serve: Callable[..., Servers],
) -> None:
    shared = Path(__file__).parents[2] / "shared" / "data" / "hallu-sec-benchmark.json"
    prompts = shared if shared.exists() else DEMO_PROMPTS
    texts = {entry["id"]: entry["prompt"] for entry in json.loads(prompts.read_text())["prompts"]}
    servers = serve(claude=in_trouble(), gemini=in_trouble(), openai=in_trouble())
    run = hallubench("generate", "--config", servers.config(prompts))
    assert run.returncode == 0, run.stdout + run.stderr
    rows = scan(servers.output).collect()
    assert rows["error"].null_count() == rows.height == 4 * len(texts)
    assert (
        rows.group_by("model").agg(pl.col("prompt_id").n_unique())["prompt_id"].to_list() == [len(texts)] * 4
    )
    asked = rows.filter(pl.col("model") != "echo")
    assert all(
        answer == answer_to(texts[prompt_id])
        for prompt_id, answer in asked.select("prompt_id", "full_response").iter_rows()
    )
    tries = Counter(line["request_id"] for line in attempts(servers.output))
    assert tries.total() == servers.calls() > asked.height
    assert [tries[id_] for id_ in asked["request_id"]] != [1] * asked.height
    temperatures = dict(asked.select("model", "temperature").unique().iter_rows())
    assert temperatures == {"claude-3-5-sonnet-20241022": 0.7, "gemini-1.5-pro": 0.0, "tiny": None}
    for type_, where in (("claude", "temperature"), ("gemini", "generationConfig")):
        assert where in servers.servers[type_].calls[0].body
    again = hallubench("generate", "--config", servers.config(prompts))
    assert "Nothing left to ask" in again.stdout
    assert tries.total() == servers.calls(), "what is paid for is not bought again"


@pytest.mark.engine
def test_api_lanes_and_a_local_engine_answer_at_the_same_time(
    serve: Callable[..., Servers], tiny_model: Path
) -> None:
    def slow(call: Call) -> Response:
        return Response(ANTHROPIC.answer(answer_to(call.prompt), call.body), delay=1.0)

    local = {"name": "tiny-llama", "type": "local", "model_path": str(tiny_model), "max_tokens": 16}
    number = len(json.loads(DEMO_PROMPTS.read_text())["prompts"])
    servers = serve(claude=slow, gemini=in_trouble(), openai=in_trouble())
    config = servers.config(DEMO_PROMPTS, max_concurrency=1)
    entries = json.loads(config.read_text())
    config.write_text(json.dumps(entries | {"models": [*entries["models"], local]}))
    run = hallubench("generate", "--config", config)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = scan(servers.output).collect()
    assert rows["error"].null_count() == rows.height == 5 * number
    spans = {
        model: (first, last)
        for model, first, last in rows.group_by("model")
        .agg(first=pl.col("timestamp").min(), last=pl.col("timestamp").max())
        .iter_rows()
    }
    claude, engine = spans["claude-3-5-sonnet-20241022"], spans["tiny-llama"]
    assert claude[0] < engine[0] < claude[1], "the engine answers while Claude does"


def test_a_lane_that_cannot_go_on_leaves_the_others_alone_and_its_requests_pending(
    serve: Callable[..., Servers], tmp_path: Path
) -> None:
    refusing = Event()
    refusing.set()

    def refuse(call: Call) -> Response | None:
        wrong = {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}
        return Response(wrong, 401) if refusing.is_set() else None

    servers = serve(claude=refuse)
    config = servers.config(some_prompts(tmp_path, 50))
    run = hallubench("generate", "--config", config)
    assert run.returncode == 1
    assert "claude stopped: HTTP 401 authentication_error: invalid x-api-key: check `api_key`" in run.stderr
    rows = scan(servers.output).collect()
    assert dict(rows.group_by("model").len().iter_rows()) == {"gemini-1.5-pro": 50, "tiny": 50, "echo": 50}
    refusing.clear()
    assert hallubench("generate", "--config", config).returncode == 0
    rows = scan(servers.output).collect()
    assert (rows.height, rows["error"].null_count()) == (200, 200)
    assert len(servers.servers["gemini"].calls) == 50, "the lanes that were finished are not asked again"


def test_ctrl_c_keeps_what_the_servers_answered_and_buys_nothing_twice(
    serve: Callable[..., Servers], tmp_path: Path
) -> None:
    def slow(call: Call) -> Response:
        return Response(ANTHROPIC.answer(answer_to(call.prompt), call.body), delay=0.3)

    servers = serve(claude=slow)
    config = servers.config(some_prompts(tmp_path, 120), max_concurrency=8)
    arguments = ("generate", "--config", config, "--models", "claude*")
    run = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    while len(servers.servers["claude"].calls) < 12:
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "generate --config" in said, "the command that goes on"
    rows = scan(servers.output).collect()
    assert rows["error"].null_count() == rows.height == len(servers.servers["claude"].calls) < 120
    (record,) = (json.loads(path.read_text()) for path in servers.output.glob("_runs/*.json"))
    assert (record["status"], record["problems"]) == ("interrupted", [])
    assert hallubench(*arguments).returncode == 0
    asked = Counter(call.prompt for call in servers.servers["claude"].calls)
    assert set(asked.values()) == {1}
    assert asked.total() == 120


def test_no_key_is_in_any_byte_written_or_shown(serve: Callable[..., Servers], tmp_path: Path) -> None:
    def repeating(type_: str) -> Behave:
        """Tells the key in every kind of error, as servers and proxies do."""
        said = {
            "error": {"type": "invalid_request_error", "message": f"not {KEYS[type_]} again", "code": "x"}
        }
        numbers = count()

        def behave(call: Call) -> Response | Fault | None:
            match next(numbers):
                case 0:
                    return Response(said, 400)
                case 1:
                    return Response(f"<html>{KEYS[type_]}</html>", 500)
                case 2 | 3:
                    return Response(f"<html>{KEYS[type_]}</html>")
                case place if place > 20:
                    return Response(said, 401)
            return None

        return behave

    servers = serve(**{type_: repeating(type_) for type_ in KEYS})
    config = servers.config(some_prompts(tmp_path, 40))
    shown = [
        hallubench(*arguments)
        for arguments in (
            ("generate", "--config", config, "--dry-run"),
            ("generate", "--config", config),
            ("--debug", "generate", "--config", config),
            ("status", servers.output),
            ("export-json", servers.output),
            ("export-json", servers.output, "--layout", "flat"),
        )
    ]
    written = {path: path.read_bytes() for path in servers.output.rglob("*") if path.is_file()}
    written[Path("rows")] = repr(scan(servers.output).collect().to_dicts()).encode()  # Parquet is compressed
    assert [run.returncode for run in shown] == [0, 1, 1, 0, 0, 0]
    assert b"not *** again" in written[Path("rows")], "the servers' words are kept without the key"
    for type_, key in KEYS.items():
        assert not [run.args for run in shown if key in run.stdout + run.stderr], type_
        assert not [path for path, data in written.items() if key.encode() in data], type_
