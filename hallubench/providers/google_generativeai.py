"""Sends to Gemini by google-generativeai, whose support ended on 2025-11-30.

It can send neither a seed nor thinking settings. Over REST it is synchronous, so every call has a
thread. What of it is private stays as it is: no version follows 0.8.6.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager

import requests
from google.protobuf.json_format import ParseError
from requests.adapters import HTTPAdapter

from hallubench.errors import ConfigError
from hallubench.providers import Context
from hallubench.providers.api import MalformedError, Settings
from hallubench.providers.gemini import Send, StatusError, conversation, generation_config
from hallubench.types import Request

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # that support has ended, and when Python 3.11's will
    import google.generativeai as genai
    from google.generativeai.client import get_default_generative_client


@asynccontextmanager
async def open_sdk(context: Context, settings: Settings) -> AsyncIterator[Send]:
    """Open a client.

    Raises:
        ConfigError: an entry's options cannot be sent.
    """
    for entry in context.entries:
        try:
            genai.GenerativeModel(entry.name, safety_settings=entry.options.get("safety_settings"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{entry.name}: google-generativeai does not know options.safety_settings ({error!r}): "
                "write it as Google's documentation does, or `sdk: google-genai` for newer settings"
            ) from None
    client = _Client(settings)
    try:
        yield client.send
    finally:
        client.close()


class _Client:
    """The SDK over REST, with one connection pool for all threads."""

    def __init__(self, settings: Settings) -> None:
        endpoint = {"api_endpoint": settings.base_url}
        genai.configure(api_key=settings.api_key, transport="rest", client_options=endpoint)
        self._client = get_default_generative_client()
        self._session: requests.Session = self._client.transport._session
        self._session.hooks["response"].append(self._receive)
        for scheme in ("https://", "http://"):  # twice as many: a call that was given up still has its own
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=2 * settings.connections))
        self._request_options = {"retry": None, "timeout": settings.timeout}
        self._received = threading.local()

    async def send(self, request: Request) -> bytes:
        return await _in_thread(lambda: self._send(request))

    def close(self) -> None:
        self._session.close()

    def _send(self, request: Request) -> bytes:
        system, contents = conversation(request)
        model = genai.GenerativeModel(
            request.model,
            system_instruction=system,
            generation_config=generation_config(request.params),
            safety_settings=request.options.get("safety_settings"),
        )
        # The one that `configure` made; the next account's `configure` replaces what a model finds by itself.
        model._client = self._client
        try:
            model.generate_content(contents, request_options=self._request_options)
        except requests.Timeout as error:
            raise TimeoutError(repr(error)) from None
        except requests.RequestException as error:
            raise ConnectionError(repr(error)) from None
        except (ParseError, UnicodeDecodeError) as error:
            raise MalformedError(str(error)) from None
        body: bytes = self._received.body
        return body

    def _receive(self, response: requests.Response, **_: object) -> None:
        """Keep the body that comes for this thread, or raise the error status before the SDK sees it.

        The SDK would send a 401 twice more, and not every body of an error survives its reading.
        """
        if response.status_code >= 400:
            raise StatusError(response.status_code, response.content, response.headers)
        self._received.body = response.content


async def _in_thread(call: Callable[[], bytes]) -> bytes:
    """Like `asyncio.to_thread`, which has a handful of threads, while here the account sets how many run.

    The threads are daemons: a call that was given up ends by its timeout and holds up no exit.
    """
    future: Future[bytes] = Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
