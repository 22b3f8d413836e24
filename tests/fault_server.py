"""An HTTP server on loopback that speaks an API and misbehaves on demand.

It runs in the test's own event loop, keeps every call it has read, and answers each prompt with
`answer_to(prompt)`, so that an answer tells which prompt it belongs to.

    async with FaultServer(ANTHROPIC, lambda call: Fault.HANG if call.attempt == 1 else None) as server:
        ...  # ask at server.url
    assert [call.attempt for call in server.calls] == [1, 2]
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What a server must know of an API."""

    prompt: Callable[[Mapping[str, Any]], str]
    """The prompt in a request's JSON body."""
    answer: Callable[[str, Mapping[str, Any]], object]
    """The JSON body that says a text, given the request's body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request, as it was read."""

    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: Mapping[str, Any]
    prompt: str
    attempt: int
    """How often this prompt has been asked, this time included."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response; a `body` that is not text or bytes is sent as JSON."""

    body: object = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before it is sent, on the loop's clock."""


class Fault(Enum):
    HANG = auto()
    """Never an answer."""
    RESET = auto()
    """The connection is reset instead of an answer."""
    CUT = auto()
    """The connection is closed in the middle of the answer."""


Behaviour: TypeAlias = Callable[[Call], Response | Fault | None]
"""What to do with a call; None answers it."""


class FaultServer:
    """Serves from `async with` to its end; see the module."""

    def __init__(self, wire: Wire, behave: Behaviour = lambda call: None) -> None:
        self.calls: list[Call] = []
        self.most_at_once = 0
        """The most calls that were waiting for their answers at one time."""
        self._waiting = 0
        self._wire = wire
        self._behave = behave
        self._attempts: Counter[str] = Counter()
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", backlog=1024)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                call = await self._read(reader)
                self.calls.append(call)
                self._waiting += 1
                self.most_at_once = max(self.most_at_once, self._waiting)
                match self._behave(call):
                    case Fault.HANG:
                        await asyncio.Event().wait()
                    case Fault.RESET:
                        linger = struct.pack("ii", 1, 0)
                        writer.get_extra_info("socket").setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, linger
                        )
                        return
                    case Fault.CUT:
                        whole = _bytes(self._answer(call))
                        writer.write(whole[: len(whole) - 20])
                        return
                    case Response() as response:
                        await asyncio.sleep(response.delay)
                        writer.write(_bytes(response))
                    case None:
                        writer.write(_bytes(self._answer(call)))
                self._waiting -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has hung up
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Call:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request_line, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        prompt = self._wire.prompt(body)
        self._attempts[prompt] += 1
        path = request_line.split()[1]
        return Call(path=path, headers=headers, body=body, prompt=prompt, attempt=self._attempts[prompt])

    def _answer(self, call: Call) -> Response:
        return Response(self._wire.answer(answer_to(call.prompt), call.body))


def answer_to(prompt: str) -> str:
    return f"the answer to {prompt}"


def _bytes(response: Response) -> bytes:
    match response.body:
        case bytes(body):
            kind = "application/json"
        case str(text):
            body, kind = text.encode(), "text/html"
        case value:
            body, kind = json.dumps(value).encode(), "application/json"
    headers = {"content-type": kind, "content-length": str(len(body))} | dict(response.headers)
    lines = [f"HTTP/1.1 {response.status} -", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def serving(wire: Wire, behave: Behaviour = lambda call: None) -> Iterator[FaultServer]:
    """A server in a thread of its own, for a client that has this one, or another process, for itself."""
    server = FaultServer(wire, behave)
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result()
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def run_fast(main: Coroutine[Any, Any, T], speed: float = 100) -> T:
    """`asyncio.run` on a loop whose clock runs `speed` times as fast: a backoff of 1 s takes 10 ms."""
    with asyncio.Runner(loop_factory=lambda: _FastLoop(speed)) as runner:
        return runner.run(main)


class _FastLoop(asyncio.SelectorEventLoop):
    def __init__(self, speed: float) -> None:
        super().__init__(_FastSelector(speed))
        self._speed = speed

    def time(self) -> float:
        return super().time() * self._speed


class _FastSelector(selectors.DefaultSelector):
    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speed = speed

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout and timeout / self._speed)


def _anthropic_answer(text: str, body: Mapping[str, Any]) -> object:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": f"{body['model']}-20260101",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 5},
    }


def _openai_answer(text: str, body: Mapping[str, Any]) -> object:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": f"{body['model']}-2026-01-01",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }


def _gemini_answer(text: str, body: Mapping[str, Any]) -> object:
    return {
        "candidates": [
            {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP", "index": 0}
        ],
        "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 5, "totalTokenCount": 12},
        "modelVersion": "gemini-1.5-pro-002",
        "responseId": "resp_1",
    }


def _last_content(body: Mapping[str, Any]) -> str:
    return str(body["contents"][-1]["parts"][0]["text"])


def _last_turn(body: Mapping[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


ANTHROPIC = Wire(prompt=_last_turn, answer=_anthropic_answer)
GEMINI = Wire(prompt=_last_content, answer=_gemini_answer)
OPENAI = Wire(prompt=_last_turn, answer=_openai_answer)
