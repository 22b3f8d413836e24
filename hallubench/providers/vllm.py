"""Local models through vLLM's offline engine, fed continuously.

The engine steps in a thread of its own, so that the event loop of the API lanes never waits for it.
Requests are drawn as the engine finishes others, and each answer leaves as soon as it is whole:
there are no slices, which would drain the batch to their slowest request.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from math import nan
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hallubench.config import ModelConfig
from hallubench.errors import EngineDied, LaneError
from hallubench.providers import Context, vllm_plugin
from hallubench.types import Completion, FinishReason, Logprobs, Request, Usage

CPU_MAX_MODEL_LEN = 8192
"""Longest context on a CPU unless `engine.max_model_len` says otherwise: there, a prompt is prefilled in
one piece, so that memory grows with the longest one."""

STEP_SECONDS = 2.0
"""How long an interrupted run waits for the engine's current step before it ends the engine."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json", "tokenizer*", "chat_template*")


@asynccontextmanager
async def open_vllm(context: Context) -> AsyncIterator[VllmProvider]:
    """Load one engine for entries that share weights and engine options; free its memory at the end.

    Raises:
        LaneError: the model cannot be loaded; the message names vLLM's log.
    """
    entry = context.entries[0]
    log = context.runs_dir / f"{context.run_id}.vllm.log"
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="vllm") as thread:
        loading = loop.run_in_executor(thread, _Engine, entry, context, log)
        try:
            engine = await asyncio.shield(loading)
        except asyncio.CancelledError:
            await _give_up(loading, thread)
            raise
        try:
            yield VllmProvider(engine, thread)
        finally:
            await loop.run_in_executor(thread, engine.close)


async def _give_up(loading: asyncio.Future[_Engine], thread: ThreadPoolExecutor) -> None:
    """End an engine that is still loading: its thread cannot be interrupted, its processes can."""
    while not loading.done():
        _kill_engines()
        await asyncio.wait([loading], timeout=0.2)
    if loading.exception() is None:
        await asyncio.get_running_loop().run_in_executor(thread, loading.result().close)


def _kill_engines() -> None:
    for process in _engine_processes():
        process.kill()


def _engine_processes() -> list[BaseProcess]:
    return [process for process in multiprocessing.active_children() if process.name.startswith("EngineCore")]


def _wake_on_death(processes: Sequence[BaseProcess], client: Any) -> None:
    """Fail the step that waits for a process which has died: vLLM would leave it waiting for ever."""
    if not processes:
        return  # with VLLM_ENABLE_V1_MULTIPROCESSING=0 the engine is in this one
    from vllm.v1.engine.exceptions import EngineDeadError

    outputs = client.outputs_queue

    def watch() -> None:
        wait([process.sentinel for process in processes])
        outputs.put(EngineDeadError())

    threading.Thread(target=watch, daemon=True, name="engine watch").start()


class VllmProvider:
    """Answers requests with one loaded engine."""

    def __init__(self, engine: _Engine, thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._thread = thread

    async def generate(self, requests: Iterable[Request]) -> AsyncGenerator[Completion, None]:
        loop = asyncio.get_running_loop()
        finished: asyncio.Queue[list[Completion]] = asyncio.Queue()
        stop = threading.Event()

        def emit(completions: list[Completion]) -> None:
            loop.call_soon_threadsafe(finished.put_nowait, completions)

        def drive() -> None:
            try:
                self._engine.answer(iter(requests), emit, stop)
            finally:
                emit([])  # nothing more will come

        driving = loop.run_in_executor(self._thread, drive)
        try:
            while completions := await finished.get():
                for completion in completions:
                    yield completion
            await driving
        finally:
            stop.set()
            await asyncio.wait([driving], timeout=STEP_SECONDS)
            if not driving.done():
                _kill_engines()
                await asyncio.wait([driving])
            driving.exception()  # seen: it was raised above, or the caller has stopped listening


class _Engine:
    """A loaded model. Every method runs in the one thread that made it."""

    def __init__(self, entry: ModelConfig, context: Context, log: Path) -> None:
        # A terminal's Ctrl-C reaches the engine's processes too. They inherit this thread's signal
        # mask, so they never see it: the run ends by its own decision.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._log = log
        with ThreadPoolExecutor(1) as hasher, _output_to(log):
            digest = hasher.submit(weights_digest, Path(entry.weights))
            try:
                arguments = engine_arguments(entry, context.config.seed)
                self._llm = _load(arguments)
            except Exception as error:
                raise LaneError(
                    f"{entry.name}: vLLM cannot load {entry.weights!r}: {_first_line(error)} (log: {log})"
                ) from error
        _log_vllm_to(log)
        self._version = digest.result() or resolved_commit(entry)
        self._engine = self._llm.llm_engine
        self._processes = _engine_processes()
        _wake_on_death(self._processes, self._engine.engine_core)
        self._tokenizer = self._engine.get_tokenizer()
        config = self._engine.vllm_config
        self._max_model_len: int = config.model_config.max_model_len
        self._logprobs_mode = str(config.model_config.logprobs_mode)
        # One batch running and one waiting: the scheduler never lacks a request, and no more are drawn.
        self._depth = 2 * config.scheduler_config.max_num_seqs
        context.record(
            entry.name,
            {
                "model_version": self._version,
                "weights": entry.weights,
                "chat_template_sha256": _sha256(self._tokenizer.chat_template),
                "logprobs_mode": self._logprobs_mode,
                "engine_arguments": arguments,
                "engine": effective_configuration(config),
            },
        )
        if not self._tokenizer.chat_template:
            context.notify(f"{entry.name} has no chat template: asked as 'User: ...\\n\\nAssistant:'")

    def answer(
        self, requests: Iterator[Request], emit: Callable[[list[Completion]], None], stop: threading.Event
    ) -> None:
        """Feed the engine from `requests` and emit what each step finishes, until both are empty."""
        from vllm.v1.engine.exceptions import EngineDeadError

        running: dict[str, Request] = {}
        exhausted = False
        try:
            while not stop.is_set():
                while not exhausted and len(running) < self._depth:
                    if (request := next(requests, None)) is None:
                        exhausted = True
                    elif (refused := self._add(request)) is not None:
                        emit([refused])
                    else:
                        running[request.request_id] = request
                if not running:
                    return
                finished = [output for output in self._engine.step() if output.finished]
                if finished:
                    emit([self._completion(running.pop(output.request_id), output) for output in finished])
        except Exception as error:
            if not isinstance(error, EngineDeadError) and all(map(BaseProcess.is_alive, self._processes)):
                raise
            running.clear()  # nobody is left to abort them
            raise EngineDied(f"the vLLM engine died (log: {self._log})") from error
        finally:
            self._engine.abort_request(list(running))

    def close(self) -> None:
        """End the engine's processes and give their memory back."""
        self._engine.engine_core.shutdown()
        del self._llm, self._engine, self._tokenizer
        gc.collect()

    def _add(self, request: Request) -> Completion | None:
        """Queue a request; a Completion only if it cannot be asked."""
        from vllm.exceptions import VLLMClientError

        try:
            tokens = tokenize(self._tokenizer, request.messages)
        except Exception as error:  # a chat template is the model's own code, and may refuse a conversation
            return _failed(request, f"the chat template refuses it: {error}", "chat_template")
        if len(tokens) >= self._max_model_len:
            problem = f"the prompt has {len(tokens)} tokens and the context only {self._max_model_len}"
            return _failed(request, f"{problem}; shorten it, or raise engine.max_model_len", "context_length")
        try:
            self._engine.add_request(
                request.request_id, {"prompt_token_ids": tokens}, _sampling_params(request)
            )
        except (VLLMClientError, ValueError) as error:
            return _failed(request, str(error), "invalid_request")
        return None

    def _completion(self, request: Request, output: Any) -> Completion:
        (answer,) = output.outputs
        reason = str(answer.finish_reason)
        if reason in ("abort", "error"):
            return _failed(request, f"vLLM ended the request: {reason}", "engine_error")
        times = output.metrics
        return Completion(
            request_id=request.request_id,
            timestamp=datetime.now(UTC),
            elapsed_seconds=max(0.0, times.last_token_ts - times.scheduled_ts),
            text=answer.text,
            finish_reason=_finish_reason(reason),
            provider_finish_reason=reason
            if answer.stop_reason is None
            else f"{reason}: {answer.stop_reason}",
            usage=Usage(
                input_tokens=len(output.prompt_token_ids),
                output_tokens=len(answer.token_ids),
                cached_tokens=output.num_cached_tokens,
            ),
            model_version=self._version,
            logprobs=flatten(answer.logprobs, answer.token_ids, self._tokenizer.decode),
            prompt_logprobs=flatten(output.prompt_logprobs, output.prompt_token_ids, self._tokenizer.decode),
            logprobs_mode=self._logprobs_mode,
        )


def tokenize(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation: by the chat template, or else as "User: ", its text and "Assistant:"."""
    if tokenizer.chat_template:
        tokens: list[int] = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return tokens
    turns = [f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in messages]
    return list(tokenizer.encode("".join(turns) + "Assistant:"))


def flatten(flat: Any, token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> Logprobs | None:
    """VLLM's FlatLogprobs -> `Logprobs`, by slices.

    At each position vLLM puts the token itself first and then the k best, so a token that is among
    the best stands twice. Only the first positions can be without any: the first token of a prompt.
    """
    if flat is None:
        return None
    bare = sum(start == end for start, end in zip(flat.start_indices, flat.end_indices, strict=True))
    given = len(token_ids) - bare
    width = len(flat.token_ids) // given if given else 1
    if len(flat.start_indices) != len(token_ids) or len(flat.token_ids) != given * width:
        raise LaneError("this vLLM lays log-probabilities out in an unknown way; use the README's release")

    def alternatives(values: list[Any]) -> list[Any]:
        values = values.copy()
        del values[::width]
        return values

    return Logprobs(
        token_ids=array("i", token_ids),
        tokens=[decode([token]) for token in token_ids[:bare]] + flat.decoded_tokens[::width],
        logprobs=array("f", [nan] * bare + flat.logprobs[::width]),
        ranks=array("i", [0] * bare + flat.ranks[::width]),
        top_offsets=array("i", [0] * bare + [(width - 1) * position for position in range(given + 1)]),
        top_token_ids=array("i", alternatives(flat.token_ids)),
        top_tokens=alternatives(flat.decoded_tokens),
        top_logprobs=array("f", alternatives(flat.logprobs)),
    )


def engine_arguments(entry: ModelConfig, seed: int | None) -> dict[str, Any]:
    """The arguments for `vllm.LLM`: the entry's own over what suits this machine.

    On a GPU, vLLM's defaults stand. On a CPU: all cores (vLLM would keep one free), no compilation
    (it takes longer than it saves), a KV cache that leaves room for others, and no chunked prefill,
    because a seeded request whose prompt is prefilled in chunks kills vLLM's CPU engine.
    """
    os.environ[vllm_plugin.MARK] = "1"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would copy locks and threads
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": entry.weights,
        "revision": entry.revision,
        "dtype": entry.dtype,
        "trust_remote_code": entry.trust_remote_code,
        "max_logprobs": 20,
        "disable_log_stats": False,  # otherwise answers come without their times
    }
    if seed is not None:
        arguments["seed"] = seed % 2**32
    if entry.revision is not None:
        arguments["tokenizer_revision"] = entry.revision
    if not current_platform.is_cpu():
        return arguments | dict(entry.engine)
    import psutil

    arguments["enforce_eager"] = True
    if not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & entry.engine.keys() and (
        "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    ):
        arguments["kv_cache_memory_bytes"] = psutil.virtual_memory().available // 4
    arguments |= entry.engine
    if not arguments.setdefault("enable_chunked_prefill", False):
        if "max_model_len" not in arguments:
            own: int = EngineArgs(**arguments).create_model_config().max_model_len
            arguments["max_model_len"] = min(own, CPU_MAX_MODEL_LEN)
        arguments.setdefault("max_num_batched_tokens", max(arguments["max_model_len"], CPU_MAX_MODEL_LEN))
    return arguments


def effective_configuration(config: Any) -> dict[str, Any]:
    """What the engine really runs with, out of vLLM's VllmConfig, as JSON values."""
    model, cache, scheduler, parallel = (
        config.model_config,
        config.cache_config,
        config.scheduler_config,
        config.parallel_config,
    )
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "max_model_len": model.max_model_len,
        "enforce_eager": model.enforce_eager,
        "seed": model.seed,
        "logprobs_mode": str(model.logprobs_mode),
        "device": config.device_config.device_type,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "enable_chunked_prefill": scheduler.enable_chunked_prefill,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "kv_cache_dtype": cache.cache_dtype,
        "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
        "block_size": cache.block_size,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1",
    }


def weights_digest(folder: Path) -> str | None:
    """`sha256:<64 hex digits>` over the names and bytes of a local model's files; None if it is no folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def resolved_commit(entry: ModelConfig) -> str | None:
    """The commit of a Hugging Face repository that was loaded, as its cache names it."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(entry.weights, "config.json", revision=entry.revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _load(arguments: Mapping[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**arguments)


def _sampling_params(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked = request.params
    return SamplingParams(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=0 if asked.top_k is None else asked.top_k,
        max_tokens=asked.max_tokens,
        stop=list(asked.stop),
        seed=asked.seed,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _finish_reason(reason: str) -> FinishReason:
    match reason:
        case "stop" | "length":
            return reason
        case _:
            return "other"


def _failed(request: Request, message: str, error_type: str) -> Completion:
    return Completion(
        request_id=request.request_id,
        timestamp=datetime.now(UTC),
        elapsed_seconds=0.0,
        finish_reason="error",
        error=message,
        error_type=error_type,
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send standard output and error to a file, also those of processes started meanwhile."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("ab") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])


def _log_vllm_to(log: Path) -> None:
    """What vLLM logs in this process from now on goes to its file, not through the progress display."""
    logger = logging.getLogger("vllm")
    for handler in logger.handlers.copy():
        logger.removeHandler(handler)
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
    logger.addHandler(handler)
