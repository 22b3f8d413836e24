"""Sends to Gemini by google-genai, the maintained SDK, over aiohttp.

The SDK takes httpx2 where there is no aiohttp; that costs more than twice the CPU a call and has
exceptions of its own, so aiohttp is required.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.request import getproxies

import aiohttp
from google import genai
from google.genai import errors
from google.genai.types import Content, GenerateContentConfig, HttpOptions, HttpRetryOptions
from pydantic import ValidationError

from hallubench.errors import ConfigError
from hallubench.providers import Context
from hallubench.providers.api import MalformedError, Settings
from hallubench.providers.gemini import Send, StatusError, conversation, generation_config
from hallubench.types import Request

ONE_CALL = {
    "automatic_continuation": False,
    "automatic_function_calling": {"disable": True},
    "should_return_http_response": True,
}
"""Exactly one HTTP call, and its body as it came."""


@asynccontextmanager
async def open_sdk(context: Context, settings: Settings) -> AsyncIterator[Send]:
    """Open a client.

    Raises:
        ConfigError: an entry's options cannot be sent.
    """
    for entry in context.entries:
        try:
            _config(entry.options)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise ConfigError(f"{entry.name}: options: {where}: {problem['msg']}") from None
    # To look for a proxy, aiohttp goes to a thread twice a call; only where there is one it needs to.
    proxied = bool(getproxies())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=proxied) as session:
        options = HttpOptions(
            base_url=settings.base_url,
            api_version="v1beta",  # as google-generativeai has it; the SDK's default is v1
            timeout=round(settings.timeout * 1000),
            retry_options=HttpRetryOptions(attempts=1),
            aiohttp_client=session,
        )
        with genai.Client(vertexai=False, api_key=settings.api_key, http_options=options) as client:

            async def send(request: Request) -> str:
                try:
                    return await _send(client, request)
                except errors.APIError as error:
                    raise StatusError(error.code, error.details, _headers(error)) from None
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise MalformedError(str(error)) from None
                except TimeoutError:
                    raise
                except (aiohttp.ClientError, OSError) as error:
                    raise ConnectionError(repr(error)) from None

            yield send


async def _send(client: genai.Client, request: Request) -> str:
    system, turns = conversation(request)
    contents = [Content.model_validate(turn) for turn in turns]
    response = await client.aio.models.generate_content(
        model=request.model,
        # A list costs the SDK a hundred failing look-ups to tell what it is a list of.
        contents=contents[0] if len(contents) == 1 else contents,
        config=_config(
            request.options, system_instruction=system, **generation_config(request.params), **ONE_CALL
        ),
    )
    assert response.sdk_http_response is not None
    return response.sdk_http_response.body or ""


def _config(options: Mapping[str, Any], **config: Any) -> GenerateContentConfig:
    return GenerateContentConfig(
        safety_settings=options.get("safety_settings"), thinking_config=options.get("thinking"), **config
    )


def _headers(error: errors.APIError) -> Mapping[str, str]:
    headers: Mapping[str, str] = getattr(error.response, "headers", {})
    return headers
