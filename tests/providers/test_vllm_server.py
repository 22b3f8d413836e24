"""The API providers against vLLM's own server, which loads the weights that the local lane loads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.request import urlopen

import polars as pl
import pytest

import hallubench
from hallubench.providers.vllm_plugin import MARK

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("default"),  # what vLLM and torch warn of is not ours to end
]

CONTEXT = 512
KV_CACHE_BYTES = 2**27
READY_SECONDS = 120.0
GRACE_SECONDS = 10.0
K = 5
"""Alternatives at each token."""

PROMPTS: list[dict[str, Any]] = [
    *({"id": f"p{i}", "prompt": f"Does CVE-2024-{i:05d} exist? Please confirm."} for i in range(18)),
    {"id": "unicode", "prompt": "Gibt es eine Lücke in 日志库? 🔒"},
    {
        "id": "chat",
        "messages": [
            {"role": "user", "content": "Does it exist?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Really?"},
        ],
    },
]
TOO_LONG = {"id": "long", "prompt": "CVE " * CONTEXT}

ASKED: dict[str, Any] = {"name": "tiny", "system_prompt": "Be brief.", "max_tokens": 24, "stop": ["4", "J"]}
GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAWN: dict[str, Any] = {"temperature": 0.8, "n": 2}
LOGPROBS: dict[str, Any] = {"logprobs": K, "prompt_logprobs": K}

Answers: TypeAlias = dict[tuple[str, float, int], dict[str, Any]]
"""Rows of the store by prompt, temperature and sample."""


@dataclass(frozen=True, slots=True)
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.1)
        tail = self.log.read_text(errors="replace").splitlines()[-30:]
        pytest.fail("vLLM's server is not ready:\n" + "\n".join(tail))


@pytest.fixture(scope="module")
def loading_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of the tiny model, with what `engine_arguments` gives a local one on a CPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", f"{port}"),
        *("--model", f"{tiny_model}", "--served-model-name", "tiny", "--dtype", "float32"),
        *("--seed", "42", "--max-logprobs", f"{K}", "--enforce-eager", "--no-enable-chunked-prefill"),
        *("--max-model-len", f"{CONTEXT}", "--max-num-batched-tokens", "8192"),
        *("--kv-cache-memory-bytes", f"{KV_CACHE_BYTES}"),
    ]
    environment = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", MARK: "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield Server(process, f"http://127.0.0.1:{port}", log)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            with suppress(ProcessLookupError):  # it has taken its processes along
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def local_answers(
    tiny_model: Path, loading_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """What the local lane answers; the server loads meanwhile."""
    local = {"type": "local", "model_path": str(tiny_model), "dtype": "float32"}
    engine = {"engine": {"kv_cache_memory_bytes": KV_CACHE_BYTES}}
    entries = [ASKED | LOGPROBS | local | engine | drawing for drawing in (GREEDY, DRAWN)]
    result = run(tmp_path_factory.mktemp("local"), entries, PROMPTS)
    assert result.answered == 3 * len(PROMPTS), result.problems
    return answers(result, "vllm")


@pytest.fixture(scope="module")
def server(loading_server: Server, local_answers: Answers) -> Server:
    loading_server.wait_until_ready()
    return loading_server


@pytest.fixture(scope="module")
def result(server: Server, tmp_path_factory: pytest.TempPathFactory) -> hallubench.Result:
    """A run that asks the server in both languages, with one prompt that it cannot take."""
    entries = [
        ASKED | LOGPROBS | GREEDY | openai(server),
        ASKED | LOGPROBS | DRAWN | openai(server),
        ASKED | GREEDY | claude(server),
    ]
    return run(tmp_path_factory.mktemp("served"), entries, [*PROMPTS, TOO_LONG])


def openai(server: Server) -> dict[str, Any]:
    return {"type": "openai", "base_url": f"{server.url}/v1"}


def claude(server: Server) -> dict[str, Any]:
    return {"type": "claude", "base_url": server.url, "api_key": "none"}


def run(
    folder: Path, entries: Iterable[dict[str, Any]], prompts: Iterable[dict[str, Any]]
) -> hallubench.Result:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    config = {
        "prompts_file": str(file),
        "output_dir": str(folder / "out"),
        "requests_per_minute": None,
        "models": list(entries),
    }
    return hallubench.run(hallubench.Config.model_validate(config))


def rows(result: hallubench.Result, provider: str) -> pl.DataFrame:
    return hallubench.scan(result.output).filter(pl.col("provider") == provider).collect()


def answers(result: hallubench.Result, provider: str) -> Answers:
    answered = rows(result, provider).filter(pl.col("error").is_null())
    return {
        (row["prompt_id"], row["temperature"], row["sample_index"]): row
        for row in answered.iter_rows(named=True)
    }


def attempts(result: hallubench.Result) -> list[dict[str, Any]]:
    log = result.output / "_runs" / f"{result.run_id}.attempts.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def assert_alike(served: list[Any], local: list[Any]) -> None:
    """Equal lists of log-probabilities, or of lists of them, up to rounding."""
    assert len(served) == len(local)
    for one, other in zip(served, local, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_server_answers_what_the_local_lane_answers(
    result: hallubench.Result, local_answers: Answers
) -> None:
    served = answers(result, "openai")
    assert served.keys() == local_answers.keys()
    assert {row["finish_reason"] for row in served.values()} == {"stop", "length"}
    for key, local in local_answers.items():
        for column in (
            "full_response",
            "finish_reason",
            "seed",
            "input_tokens",
            "output_tokens",
            "output_token_ids",
            "output_token_texts",
        ):
            assert served[key][column] == local[column], (key, column)


def test_tokens_of_an_answer_have_the_log_probabilities_of_the_local_lane(
    result: hallubench.Result, local_answers: Answers
) -> None:
    untold = 0
    for key, served in answers(result, "openai").items():
        local = local_answers[key]
        assert_alike(served["output_logprobs"], local["output_logprobs"])
        # The server lists K tokens, the chosen one always among them: if it is the worst of these, its
        # rank may be any, and one alternative fewer is told.
        told = [rank < K for rank in local["output_ranks"]]
        untold += told.count(False)
        assert served["output_ranks"] == [
            rank if known else None for rank, known in zip(local["output_ranks"], told, strict=True)
        ]
        lengths = [K if known else K - 1 for known in told]
        assert served["output_top_tokens"] == cut(local["output_top_tokens"], lengths)
        assert_alike(served["output_top_logprobs"], cut(local["output_top_logprobs"], lengths))
    assert untold > 0


def cut(positions: list[list[Any]], lengths: list[int]) -> list[list[Any]]:
    return [position[:length] for position, length in zip(positions, lengths, strict=True)]


def test_tokens_of_a_prompt_have_the_log_probabilities_of_the_local_lane(
    result: hallubench.Result, local_answers: Answers
) -> None:
    for key, served in answers(result, "openai").items():
        local = local_answers[key]
        for column in ("token_ids", "ranks", "top_token_ids", "top_tokens"):
            assert served[f"prompt_{column}"] == local[f"prompt_{column}"], (key, column)
        assert served["prompt_token_texts"] == ["", *local["prompt_token_texts"][1:]]
        assert_alike(served["prompt_logprobs"], local["prompt_logprobs"])
        assert_alike(served["prompt_top_logprobs"], local["prompt_top_logprobs"])


def test_the_server_answers_the_same_in_the_language_of_claude(
    result: hallubench.Result, local_answers: Answers
) -> None:
    served = answers(result, "anthropic")
    assert served.keys() == {key for key, row in local_answers.items() if row["temperature"] == 0}
    for key, row in served.items():
        for column in ("full_response", "finish_reason", "input_tokens", "output_tokens"):
            assert row[column] == local_answers[key][column], (key, column)
    assert {row["provider_finish_reason"] for row in served.values()} >= {"max_tokens", "stop_sequence"}


@pytest.mark.parametrize(("provider", "requests"), [("openai", 3), ("anthropic", 1)])
def test_a_prompt_longer_than_the_context_fails_alone_in_the_words_of_the_server(
    result: hallubench.Result, provider: str, requests: int
) -> None:
    failed = rows(result, provider).filter(pl.col("error").is_not_null())
    assert failed["prompt_id"].to_list() == ["long"] * requests
    for error in failed["error"]:
        assert error.startswith(
            f"HTTP 400 BadRequestError: This model's maximum context length is {CONTEXT} tokens."
        )
    assert failed["retry_count"].to_list() == [0] * requests
    assert not result.problems


def test_each_answer_took_one_attempt(result: hallubench.Result) -> None:
    log = attempts(result)
    stored = hallubench.scan(result.output).select("request_id").collect()["request_id"]
    assert sorted(line["request_id"] for line in log) == sorted(stored)
    assert Counter(line["status"] for line in log) == {200: result.answered, 400: result.failed}


@pytest.mark.parametrize(
    ("speak", "entry", "words", "fix"),
    [
        (openai, {"name": "no-such"}, "The model `no-such` does not exist", "check the model's `name`"),
        (claude, {"name": "no-such"}, "The model `no-such` does not exist", "check the model's `name`"),
        (openai, {"logprobs": 20}, f"max allowed: {K}", "change or remove `logprobs` of the entry tiny"),
    ],
    ids=["model asked by OpenAI's SDK", "model asked by Anthropic's SDK", "log-probabilities"],
)
def test_what_no_request_can_pass_stops_the_lane_with_the_fix_and_leaves_the_rest_pending(
    server: Server,
    tmp_path: Path,
    speak: Callable[[Server], dict[str, Any]],
    entry: dict[str, Any],
    words: str,
    fix: str,
) -> None:
    stopped = run(tmp_path, [ASKED | speak(server) | entry], PROMPTS)
    (problem,) = stopped.problems
    assert words in problem
    assert fix in problem
    assert (stopped.answered, stopped.failed, stopped.pending) == (0, 0, len(PROMPTS))
    assert 0 < len(attempts(stopped)) < len(PROMPTS)
