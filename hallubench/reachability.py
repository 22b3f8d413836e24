"""Is an API there, does it take the key, does it know the model? Asked by a GET that costs nothing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote

import httpx2

from hallubench.config import BASE_URLS, KEY_VARIABLES, ModelConfig
from hallubench.redact import redact
from hallubench.text import printable

TIMEOUT = 10.0
"""Seconds without a sign of the server."""

Finding: TypeAlias = tuple[str, str | None]
"""What was found, and what to do about it; None where all is well."""


def find_model(entry: ModelConfig) -> Finding:
    """Look for the model of a Claude, Gemini or OpenAI entry by one HTTP call. No redirect is followed.

    Args:
        entry: one whose key, if it needs any, is there and can stand in a header.
    """
    return _Inquiry(entry).ask()


@dataclass(frozen=True, slots=True)
class _Inquiry:
    entry: ModelConfig

    @property
    def base(self) -> str:
        return self.entry.base_url or BASE_URLS[self.entry.type]

    @property
    def host(self) -> str:
        return printable(self.base.partition("://")[2].partition("/")[0])

    def ask(self) -> Finding:
        try:
            response = httpx2.get(self._url(), headers=self._headers(), timeout=TIMEOUT)
        except httpx2.TimeoutException:
            return self._no_way(f"no answer within {TIMEOUT:g} s")
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            return self._no_way(self._shown(error) or type(error).__name__)
        return self._judge(response.status_code, _json(response.content), response.headers)

    def _url(self) -> str:
        name = self.entry.name
        match self.entry.type:
            case "claude":
                return f"{self.base}/v1/models/{quote(name, safe='')}"
            case "gemini":  # tunedModels/... is a name, too
                return f"{self.base}/v1beta/{quote(name if '/' in name else f'models/{name}')}"
            case _:  # servers other than OpenAI's often know the list only
                return f"{self.base}/models"

    def _headers(self) -> dict[str, str]:
        key = self.entry.key or ""
        match self.entry.type:
            case "claude":
                return {"x-api-key": key, "anthropic-version": "2023-06-01"}
            case "gemini":
                return {"x-goog-api-key": key}
            case _:
                return {"Authorization": f"Bearer {key}"} if key else {}

    def _judge(self, status: int, body: Any, headers: Mapping[str, str]) -> Finding:
        words = _words(body)
        said = f"HTTP {status}" + (f": {self._shown(words)}" if words else "")
        match status:
            case 200:
                return self._read(body)
            case 401 | 403:
                return self._refused(said)
            case 400 if "API key" in words:  # Gemini's way to say 401
                return self._refused(said)
            case 404 | 405 | 501 if self.entry.base_url and self.entry.name not in words:
                return f"reachable at {self.host}; it does not list its models", None
            case 404:
                return f"{self.host} knows no such model ({said})", "correct `name`; models are retired, too"
            case 429:
                return f"reachable at {self.host}, which asks to wait ({said})", None
            case _ if 300 <= status < 400:
                target = self._shown(headers.get("location", "nowhere"))
                return f"{self.host} redirects to {target}", "write the address that answers as `base_url`"
            case _ if status >= 500:
                return f"{self.host} has a problem ({said})", "try again when the server is well"
        return f"{self.host} refuses to tell ({said})", "correct `name` or `base_url`"

    def _read(self, body: Any) -> Finding:
        """What follows from a good answer."""
        match body:
            case {"data": [_, *_] as models} if self.entry.type == "openai":
                listed = [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]
                if listed and self.entry.name not in listed:
                    near = ", ".join(difflib.get_close_matches(self.entry.name, listed, cutoff=0.0))
                    return f"{self.host} lists no such model", f"correct `name`; it lists {self._shown(near)}"
            case dict() | list() if self.entry.type == "openai":
                return f"reachable at {self.host}; it does not list its models", None
            case dict():
                pass
            case _:
                return f"{self.host} does not answer like an API", "correct `base_url`, or check the proxy"
        return f"reachable at {self.host}", None

    def _refused(self, said: str) -> Finding:
        variable = KEY_VARIABLES[self.entry.type]
        if not self.entry.key:
            return f"{self.host} wants a key ({said})", f"run: export {variable}=..., or write `api_key`"
        name = variable if self.entry.api_key is None else "`api_key`"
        return f"{self.host} refuses the key ({said})", f"correct {name}, or what the key is allowed to do"

    def _no_way(self, reason: str) -> Finding:
        if self.entry.base_url:
            return f"no way to {self.host} ({reason})", "start that server, or correct `base_url`"
        return f"no way to {self.host} ({reason})", "connect this machine, or set HTTPS_PROXY to its proxy"

    def _shown(self, text: object) -> str:
        """What others wrote, fit to be shown."""
        return printable(redact(str(text), self.entry.secrets), longest=200)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _words(body: Any) -> str:
    """The message of an API's error; empty where the body has none."""
    match body:
        case {"error": {"message": str(message)}} | [{"error": {"message": str(message)}}, *_]:
            return message
    return ""
