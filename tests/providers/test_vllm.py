from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest

from hallubench.config import Config, load_config
from hallubench.generate import prepare
from hallubench.plan import Plan
from hallubench.providers import Context
from hallubench.providers.vllm import (
    VllmProvider,
    flatten,
    open_vllm,
    tokenize,
    weights_digest,
)
from hallubench.reproduce import reproduce
from hallubench.store import scan
from hallubench.types import Completion, Logprobs, Prompt, Request

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("default"),  # what vLLM and torch warn of is not ours to end
]

CONTEXT = 512
TEMPERATURES = (0.0, 0.7)


def write_prompts(path: Path, count: int) -> Path:
    lines = ({"id": f"p{i}", "prompt": f"Does CVE-2024-{i:05d} exist? Please confirm."} for i in range(count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(model: Path, prompts: Path, **entry: Any) -> dict[str, Any]:
    common = {
        "name": "tiny",
        "type": "local",
        "model_path": str(model),
        "dtype": "float32",
        "max_tokens": 24,
        "engine": {"kv_cache_memory_bytes": 2**27},
    }
    models = [common | {"temperature": temperature} | entry for temperature in TEMPERATURES]
    return {"prompts_file": str(prompts), "output_dir": "out", "models": models}


class Asker:
    """One loaded engine for all tests of this file."""

    def __init__(self, runner: asyncio.Runner, provider: VllmProvider, record: dict[str, Any]) -> None:
        self.runner = runner
        self.provider = provider
        self.record = record

    def ask(self, requests: Iterable[Request]) -> list[Completion]:
        async def collect() -> list[Completion]:
            return [completion async for completion in self.provider.generate(requests)]

        return self.runner.run(collect())


@pytest.fixture(scope="session")
def engine_config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("engine")
    return Config.model_validate(config_of(tiny_model, write_prompts(folder / "prompts.jsonl", 200)))


@pytest.fixture(scope="session")
def asker(engine_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    record: dict[str, Any] = {}
    context = Context(
        config=engine_config,
        entries=engine_config.models,
        run_id="session",
        runs_dir=tmp_path_factory.mktemp("runs"),
        record=record.__setitem__,
        notify=lambda line: None,
    )
    with asyncio.Runner() as runner:
        opened = open_vllm(context)
        provider = runner.run(opened.__aenter__())
        yield Asker(runner, provider, record)
        runner.run(opened.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def requests(engine_config: Config) -> list[Request]:
    """Both temperatures of 200 prompts, prompt by prompt."""
    _, plan = prepare(engine_config)
    return list(all_requests(plan))


def all_requests(plan: Plan) -> Iterator[Request]:
    for lane in plan.lanes:
        for group in lane.groups:
            yield from plan.requests(group)


@pytest.fixture(scope="session")
def answers(asker: Asker, requests: list[Request]) -> dict[str, Completion]:
    return {completion.request_id: completion for completion in asker.ask(requests)}


def logprobs_of(completion: Completion) -> Logprobs:
    assert completion.logprobs is not None
    return completion.logprobs


def token_ids(completion: Completion) -> list[int]:
    return logprobs_of(completion).token_ids.tolist()


def test_every_request_of_more_than_fit_one_prefill_is_answered_with_seeds(
    requests: list[Request], answers: dict[str, Completion], asker: Asker
) -> None:
    engine = asker.record["tiny"]["engine"]
    assert sum(c.usage.input_tokens or 0 for c in answers.values()) > engine["max_num_batched_tokens"]
    assert engine["enable_chunked_prefill"] is False
    assert answers.keys() == {request.request_id for request in requests}
    assert all(completion.error is None and completion.text for completion in answers.values())


def test_all_tokens_of_answer_and_prompt_carry_log_probabilities(answers: dict[str, Completion]) -> None:
    for completion in answers.values():
        output, prompt = logprobs_of(completion), completion.prompt_logprobs
        assert prompt is not None
        assert len(output.token_ids) == completion.usage.output_tokens
        assert len(prompt.token_ids) == completion.usage.input_tokens
        assert len(output.top_logprobs) == 5 * len(output.token_ids)
        assert len(prompt.top_logprobs) == 5 * (len(prompt.token_ids) - 1)
        assert math.isnan(prompt.logprobs[0])
        for flat in (output, prompt):
            assert len(flat.tokens) == len(flat.logprobs) == len(flat.ranks) == len(flat.token_ids)
            for position, rank in enumerate(flat.ranks):
                start, end = flat.top_offsets[position], flat.top_offsets[position + 1]
                best = flat.top_logprobs[start:end].tolist()
                assert best == sorted(best, reverse=True)
                if 0 < rank <= 5:
                    assert flat.top_token_ids[start + rank - 1] == flat.token_ids[position]
                    assert flat.top_logprobs[start + rank - 1] == flat.logprobs[position]


def test_log_probabilities_are_those_that_transformers_computes(
    tiny_model: Path, answers: dict[str, Completion]
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model)
    for completion in islice(answers.values(), 4):
        output, prompt = logprobs_of(completion), completion.prompt_logprobs
        assert prompt is not None
        tokens = torch.tensor([prompt.token_ids.tolist() + output.token_ids.tolist()])
        with torch.no_grad():
            expected = model(tokens).logits[0].log_softmax(-1)
        chosen = expected[:-1].gather(1, tokens[0, 1:, None])[:, 0].tolist()
        assert prompt.logprobs.tolist()[1:] + output.logprobs.tolist() == pytest.approx(chosen, abs=2e-3)


def test_greedy_answers_take_the_best_token_each_time(
    requests: list[Request], answers: dict[str, Completion]
) -> None:
    greedy = [answers[r.request_id] for r in requests if r.params.temperature == 0.0]
    assert all(rank == 1 for completion in greedy for rank in logprobs_of(completion).ranks)


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(
    asker: Asker, requests: list[Request], answers: dict[str, Completion]
) -> None:
    request = next(r for r in requests if r.params.temperature == 0.7)
    (again,) = asker.ask([request])
    (other,) = asker.ask([replace(request, params=replace(request.params, seed=7))])
    assert token_ids(again) == token_ids(answers[request.request_id])
    assert token_ids(other) != token_ids(again)


def test_in_float32_an_answer_does_not_depend_on_what_is_in_the_batch(
    asker: Asker, requests: list[Request], answers: dict[str, Completion]
) -> None:
    for request in requests[:6]:
        (alone,) = asker.ask([request])
        assert token_ids(alone) == token_ids(answers[request.request_id])


def test_a_prompt_longer_than_the_context_fails_alone_and_says_why(
    asker: Asker, requests: list[Request]
) -> None:
    endless = Prompt(id="endless", index=0, text="CVE " * CONTEXT)
    long = replace(requests[0], request_id="long", prompt=endless)
    completions = {c.request_id: c for c in asker.ask([requests[1], long, requests[2]])}
    assert completions["long"].text is None
    assert completions["long"].error_type == "context_length"
    assert f"the context only {CONTEXT}" in (completions["long"].error or "")
    assert [completions[r.request_id].error for r in requests[1:3]] == [None, None]


def test_the_finish_reason_says_whether_an_answer_was_cut(asker: Asker, requests: list[Request]) -> None:
    request = replace(requests[0], params=replace(requests[0].params, max_tokens=3))
    (cut,) = asker.ask([request])
    assert (cut.finish_reason, cut.usage.output_tokens) == ("length", 3)
    first = logprobs_of(cut).tokens[0]
    assert first is not None
    (stopped,) = asker.ask([replace(request, params=replace(request.params, stop=(first,)))])
    assert (stopped.finish_reason, stopped.text) == ("stop", "")
    assert stopped.provider_finish_reason == f"stop: {first}"


def test_requests_are_drawn_only_as_the_engine_takes_them(asker: Asker, requests: list[Request]) -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        while True:
            for request in requests:
                drawn += 1
                yield replace(request, request_id=f"{drawn}", params=replace(request.params, max_tokens=2))

    async def first_answers() -> int:
        async with aclosing(asker.provider.generate(endless())) as completions:
            seen = 0
            async for _ in completions:
                seen += 1
                if seen == 100:
                    break
        return drawn

    depth = 2 * asker.record["tiny"]["engine"]["max_num_seqs"]
    assert asker.runner.run(first_answers()) <= 100 + 2 * depth
    assert len(asker.ask(requests[:2])) == 2, "the engine answers on after a caller has left"


def test_the_record_names_weights_template_and_configuration(
    asker: Asker, tiny_model: Path, answers: dict[str, Completion]
) -> None:
    facts = asker.record["tiny"]
    assert facts["model_version"] == weights_digest(tiny_model)
    assert {completion.model_version for completion in answers.values()} == {facts["model_version"]}
    assert len(facts["chat_template_sha256"]) == 64
    assert facts["engine"]["dtype"] == "float32"
    assert facts["logprobs_mode"] == "raw_logprobs"
    json.dumps(facts)


def test_all_393_real_prompts_get_an_answer(
    asker: Asker, engine_config: Config, shared_prompts: Path
) -> None:
    _, plan = prepare(engine_config.model_copy(update={"prompts_file": str(shared_prompts)}))
    requests = [r for r in all_requests(plan) if r.params.temperature == 0.7]
    completions = asker.ask(requests)
    assert len(completions) == len({c.request_id for c in completions}) == 393
    too_long = [c for c in completions if c.error is not None]
    assert all(c.error_type == "context_length" for c in too_long)
    assert len(too_long) < 40, "the tiny model's context holds nearly all of them"


def test_a_killed_run_goes_on_to_what_an_undisturbed_one_would_have_answered(
    tiny_model: Path, tmp_path: Path, requests: list[Request], answers: dict[str, Completion]
) -> None:
    # Small batches, so that some answers are stored while others wait.
    slow = {"kv_cache_memory_bytes": 2**27, "max_num_seqs": 4}
    config = config_of(tiny_model, write_prompts(tmp_path / "prompts.jsonl", 200), engine=slow)
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "hallubench", "generate", "--config", "config.json"]
    subprocess.run([*command, "--output", "undisturbed"], cwd=tmp_path, capture_output=True, check=True)
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    children = wait_for_rows(run, tmp_path / "out")
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert all(gone(child) for child in children), "the engine's processes end with the run"
    before = scan(tmp_path / "out").select("request_id", "run_id").collect()
    assert 0 < before.height < len(requests)

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{before.height} answered before" in done.stdout
    after = scan(tmp_path / "out").collect()
    assert tokens_in(tmp_path / "out") == tokens_in(tmp_path / "undisturbed")
    assert set(after["request_id"]) == answers.keys()
    # Another batch size changes the last bits of logits: no greedy choice, now and then a drawn one.
    greedy = after.filter(pl.col("temperature") == 0)
    assert {row["request_id"]: row["output_token_ids"] for row in greedy.iter_rows(named=True)} == {
        request.request_id: token_ids(answers[request.request_id])
        for request in requests
        if request.params.temperature == 0
    }
    assert before.join(after, on=["request_id", "run_id"], how="anti").is_empty(), "nothing is asked twice"
    assert after.filter(pl.col("error").is_not_null()).is_empty()

    record = json.loads(max((tmp_path / "out" / "_runs").glob("*.json")).read_text())
    assert len(record["providers"]["tiny"]) == 1, "two temperatures share one engine"
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Nothing left to ask" in again.stdout


class Finished(NamedTuple):
    output: Path
    printed: str
    notes: str


@pytest.fixture(scope="session")
def run_with_a_killed_engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run whose engine was killed when it had stored something."""
    folder = tmp_path_factory.mktemp("killed-engine")
    slow = {"kv_cache_memory_bytes": 2**27, "max_num_seqs": 4}
    config = config_of(tiny_model, write_prompts(folder / "prompts.jsonl", 200), engine=slow)
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "hallubench", "generate", "--config", "config.json"]
    run = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for child in wait_for_rows(run, folder / "out"):
        os.kill(child, signal.SIGKILL)
    printed, notes = run.communicate()
    assert run.returncode == 0, notes
    return Finished(folder / "out", printed, notes)


def test_a_run_whose_engine_is_killed_loads_it_again_and_finishes(
    run_with_a_killed_engine: Finished, requests: list[Request], answers: dict[str, Completion]
) -> None:
    output, printed, notes = run_with_a_killed_engine
    assert "the vLLM engine died" in notes
    assert f"{len(requests)} answered, 0 failed, 0 pending" in printed
    after = scan(output).filter(pl.col("temperature") == 0).collect()
    assert dict(after.select("request_id", "output_token_ids").iter_rows()) == {
        request.request_id: token_ids(answers[request.request_id])
        for request in requests
        if request.params.temperature == 0
    }
    (record,) = (output / "_runs").glob("*.json")
    assert len(json.loads(record.read_text())["providers"]["tiny"]) == 2, "both engines are on record"


def test_stored_answers_are_reproduced_in_float32(run_with_a_killed_engine: Finished) -> None:
    result = reproduce(run_with_a_killed_engine.output, sample=24)
    greedy = [one for one in result.agreements if one.temperature == 0]
    assert [one.how for one in greedy] == ["alone", "in a batch"]
    for one in greedy:
        assert one.texts == one.tokens == one.answers > 0
    for one in result.agreements:
        assert one.logprob_difference is not None
        assert one.logprob_difference < 1e-3
        assert one.prompt_logprob_difference is not None
        assert one.prompt_logprob_difference < 1e-3
    assert result.changes == []


def tokens_in(store: Path) -> dict[str, list[int]]:
    rows = scan(store).select("request_id", "output_token_ids").collect()
    return {row["request_id"]: row["output_token_ids"] for row in rows.iter_rows(named=True)}


def wait_for_rows(run: subprocess.Popen[Any], output: Path) -> list[int]:
    """Wait until a run has stored something; the ids of its processes."""
    while not list(output.glob("model=*/*.parquet")):
        assert run.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task")
    pids = [pid for task in children.iterdir() for pid in (task / "children").read_text().split()]
    assert pids
    return [int(pid) for pid in pids]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_without_a_chat_template_turns_are_written_out(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Does it exist?"}]
    text = tokenizer.decode(tokenize(tokenizer, messages))
    assert text == "System: Be brief.\n\nUser: Does it exist?\n\nAssistant:"


def test_flat_log_probabilities_are_cut_into_chosen_and_alternatives() -> None:
    from vllm.logprobs import FlatLogprobs

    flat = FlatLogprobs(
        start_indices=[0, 0, 3],
        end_indices=[0, 3, 6],
        token_ids=[7, 1, 2, 1, 1, 3],
        logprobs=[-3.0, -0.5, -1.0, -0.25, -0.25, -2.0],
        ranks=[3, 1, 2, 1, 1, 2],
        decoded_tokens=["seven", "one", "two", "one", "one", "three"],
    )
    logprobs = flatten(flat, [5, 7, 1], lambda ids: f"<{ids[0]}>")
    assert logprobs is not None
    assert logprobs.tokens == ["<5>", "seven", "one"]
    assert math.isnan(logprobs.logprobs[0])
    assert logprobs.logprobs.tolist()[1:] == [-3.0, -0.25]
    assert logprobs.ranks.tolist() == [0, 3, 1]
    assert logprobs.top_offsets.tolist() == [0, 0, 2, 4]
    assert logprobs.top_token_ids.tolist() == [1, 2, 1, 3]
    assert logprobs.top_tokens == ["one", "two", "one", "three"]


def test_no_alternatives_leave_the_chosen_tokens() -> None:
    from vllm.logprobs import FlatLogprobs

    flat = FlatLogprobs([0, 1], [1, 2], [4, 5], [-1.0, -2.0], [1, 2], ["a", "b"])
    logprobs = flatten(flat, [4, 5], str)
    assert logprobs is not None
    assert logprobs.logprobs.tolist() == [-1.0, -2.0]
    assert logprobs.top_offsets.tolist() == [0, 0, 0]


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    assert weights_digest(tmp_path / "absent") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = weights_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_digest(tmp_path) != one


def test_a_folder_that_is_no_model_stops_the_lane_and_names_the_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    config = config_of(tmp_path, write_prompts(tmp_path / "prompts.jsonl", 1))
    (tmp_path / "run.json").write_text(json.dumps(config))
    load_config(tmp_path / "run.json")
    done = subprocess.run(
        [sys.executable, "-m", "hallubench", "generate", "--config", "run.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "vLLM cannot load" in done.stderr
    assert ".vllm.log" in done.stderr
    assert "Traceback" not in done.stderr
