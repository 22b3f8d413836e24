"""A server on loopback that gives the clients of three APIs one canned answer, a set time after each call.

It is a process of its own and reads of a request no more than its path and its length, so that what
is measured is the client.

    with LoopbackServer(latency=0.2) as server:
        ...  # ask at server.url
        calls = server.calls()
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from http.client import HTTPConnection
from types import TracebackType
from typing import Any, Self

TEXT = (
    "I could not find an entry for this identifier in the National Vulnerability Database. It may be "
    "reserved, rejected or made up; please check the source that named it before you rely on what it says."
)
"""About 40 tokens."""
ANTHROPIC = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-loopback",
    "content": [{"type": "text", "text": TEXT}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 12, "output_tokens": 40},
}
GEMINI = {
    "candidates": [{"content": {"role": "model", "parts": [{"text": TEXT}]}, "finishReason": "STOP"}],
    "usageMetadata": {"promptTokenCount": 12, "candidatesTokenCount": 40, "totalTokenCount": 52},
    "modelVersion": "gemini-loopback",
    "responseId": "1",
}
OPENAI = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1767225600,
    "model": "gpt-loopback",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"},
    ],
    "usage": {"prompt_tokens": 12, "completion_tokens": 40, "total_tokens": 52},
}
CALLS = b"/calls"
"""Where the server tells what it has counted."""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(slots=True)
class Calls:
    """What a server has counted; times are seconds on the system's monotonic clock."""

    began: list[float]
    """When each call was read, in order."""
    ended: float
    """When the last answer was sent."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began[0]

    @property
    def per_second(self) -> float:
        return len(self.began) / self.seconds

    def most_within(self, seconds: float) -> int:
        """The most calls in any half-open interval of so many seconds."""
        first = most = 0
        for number, time in enumerate(self.began, start=1):
            while time - self.began[first] >= seconds:
                first += 1
            most = max(most, number - first)
        return most


class LoopbackServer:
    """Starts the server and, at the end of the `with`, ends it."""

    def __init__(self, latency: float) -> None:
        self._latency = latency

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._latency)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._address = f"127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.terminate()

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    def calls(self) -> Calls:
        connection = HTTPConnection(self._address)
        connection.request("GET", CALLS.decode())
        with connection.getresponse() as response:
            return Calls(**json.load(response))


class _Connection(asyncio.Protocol):
    """One client's connection, which waits for each answer before it asks again."""

    def __init__(self, calls: Calls, latency: float) -> None:
        self._calls = calls
        self._latency = latency
        self._received = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, whole, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not whole or (length and len(body) < int(length[1])):
            return
        self._received = b""
        path = head.split(b" ", 2)[1]
        if path == CALLS:
            self._transport.write(_response({"began": self._calls.began, "ended": self._calls.ended}))
            return
        self._calls.began.append(self._loop.time())
        response = next(answer for end, answer in ANSWERS.items() if path.endswith(end))
        self._loop.call_later(self._latency, self._answer, response)

    def _answer(self, response: bytes) -> None:
        self._transport.write(response)
        self._calls.ended = self._loop.time()


def _response(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(data),
        data,
    )


ANSWERS = {
    b"/messages": _response(ANTHROPIC),
    b":generateContent": _response(GEMINI),
    b"/chat/completions": _response(OPENAI),
}
"""What is sent, by the end of the path that was asked."""


async def serve(latency: float) -> None:
    calls = Calls(began=[], ended=0.0)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(calls, latency), "127.0.0.1", backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
