"""An HTTP server on loopback, in a thread of its own, that gives every GET the same answer.

with serving(Answer({"id": "m"})) as server:
    ...  # ask at server.url
assert [path for path, _ in server.asked] == ["/v1/models/m"]
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    body: object = ""
    """Text, or what is sent as JSON."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    asked: list[tuple[str, Mapping[str, str]]]
    """The path and the headers of every request, their names in lower case."""

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    asked: list[tuple[str, Mapping[str, str]]] = []
    body = (answer.body if isinstance(answer.body, str) else json.dumps(answer.body)).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - http.server's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}", asked)
        finally:
            server.shutdown()
            thread.join()
