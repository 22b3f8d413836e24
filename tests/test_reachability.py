from __future__ import annotations

import socket
from typing import Any

import pytest
from get_server import Answer, serving

from hallubench.config import KEY_VARIABLES, ModelConfig
from hallubench.reachability import find_model

KEY = "sk-secret-0123456789"
NAME = "some model/7b"


@pytest.fixture(autouse=True)
def _no_proxy_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = [f"{of}_proxy" for of in ("http", "https", "all", "no")]
    for name in (*KEY_VARIABLES.values(), *proxies, *map(str.upper, proxies)):
        monkeypatch.delenv(name, raising=False)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def entry(type_: str, **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": NAME, "type": type_, "api_key": KEY} | keys)


def found(type_: str, answer: Answer, **keys: Any) -> tuple[str, str | None]:
    """What is found at a server that always says `answer`."""
    with serving(answer) as server:
        text, fix = find_model(entry(type_, base_url=server.url, **keys))
        assert len(server.asked) == 1
        return text.replace(server.host, "HOST"), fix


@pytest.mark.parametrize(
    ("type_", "body", "path", "headers"),
    [
        (
            "claude",
            {"type": "model", "id": "what an alias stands for"},
            "/v1/models/some%20model%2F7b",
            {"x-api-key": KEY, "anthropic-version": "2023-06-01"},
        ),
        ("gemini", {"name": "models/x"}, "/v1beta/some%20model/7b", {"x-goog-api-key": KEY}),
        ("openai", {"data": [{"id": "x"}, {"id": NAME}]}, "/models", {"authorization": f"Bearer {KEY}"}),
    ],
)
def test_one_get_with_the_key_in_its_header_finds_a_model(
    type_: str, body: object, path: str, headers: dict[str, str]
) -> None:
    with serving(Answer(body)) as server:
        text, fix = find_model(entry(type_, base_url=server.url))
    assert (text, fix) == (f"reachable at {server.host}", None)
    ((asked_path, asked_headers),) = server.asked
    assert asked_path == path
    assert headers.items() <= asked_headers.items()


def test_a_gemini_model_without_a_kind_is_one_of_models() -> None:
    with serving(Answer({})) as server:
        find_model(entry("gemini", base_url=server.url, name="gemini-1.5-pro?alt=x"))
    assert server.asked[0][0] == "/v1beta/models/gemini-1.5-pro%3Falt%3Dx"


@pytest.mark.parametrize(
    ("type_", "answer"),
    [
        ("claude", Answer({"error": {"message": f"invalid x-api-key {KEY}"}}, 401)),
        ("claude", Answer("<html>no</html>", 403)),
        ("gemini", Answer({"error": {"message": "API key not valid. Please pass a valid API key."}}, 400)),
        ("gemini", Answer([{"error": {"message": f"{KEY} may not"}}], 403)),
        ("openai", Answer({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401)),
    ],
)
def test_a_refused_key_is_told_without_the_key(type_: str, answer: Answer) -> None:
    text, fix = found(type_, answer)
    assert text.startswith(f"HOST refuses the key (HTTP {answer.status}")
    assert KEY not in text
    assert fix is not None
    assert fix.startswith("correct `api_key`")


def test_a_key_of_the_environment_is_called_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    text, fix = found("claude", Answer({"error": {"message": KEY}}, 401), api_key=None)
    assert text == "HOST refuses the key (HTTP 401: ***)"
    assert fix is not None
    assert fix.startswith("correct ANTHROPIC_API_KEY")


def test_a_server_that_wants_a_key_where_there_is_none_is_told_one() -> None:
    with serving(Answer("", 401)) as server:
        text, fix = find_model(entry("openai", base_url=server.url, api_key=None))
    assert "wants a key" in text
    assert fix is not None
    assert "export OPENAI_API_KEY" in fix
    assert "authorization" not in server.asked[0][1]


@pytest.mark.parametrize(
    ("type_", "message"),
    [
        ("claude", f"model: {NAME}"),
        ("gemini", f"models/{NAME} is not found for API version v1beta"),
        ("openai", f"The model {NAME} does not exist"),
    ],
)
def test_a_model_that_the_server_does_not_know_is_told_with_its_words(type_: str, message: str) -> None:
    text, fix = found(type_, Answer({"error": {"message": message}}, 404))
    assert text == f"HOST knows no such model (HTTP 404: {message})"
    assert fix is not None


def test_a_model_that_an_openai_server_does_not_list_is_told_with_the_nearest_that_it_does() -> None:
    listed = {"data": [{"id": "Qwen/Qwen3-0.6B"}, {"id": KEY}, {}, "none"]}
    text, fix = found("openai", Answer(listed), name="qwen3-0.6b")
    assert text == "HOST lists no such model"
    assert fix == "correct `name`; it lists Qwen/Qwen3-0.6B, ***"


@pytest.mark.parametrize("type_", ["claude", "gemini", "openai"])
@pytest.mark.parametrize(
    "answer",
    [
        Answer({"detail": "Not Found"}, 404),
        Answer({"error": {"message": "File Not Found", "code": 404}}, 404),
        Answer(f"Cannot GET /v1/models/{NAME}", 404),
        Answer("", 405),
        Answer("Unsupported method", 501),
    ],
)
def test_a_server_of_ones_own_need_not_list_its_models(type_: str, answer: Answer) -> None:
    assert found(type_, answer) == ("reachable at HOST; it does not list its models", None)


@pytest.mark.parametrize("body", [{}, {"data": []}, {"data": "x"}, {"data": [{}]}, []])
def test_an_openai_server_whose_list_is_empty_or_none_counts_as_one_without(body: object) -> None:
    text, fix = found("openai", Answer(body))
    assert text.startswith("reachable at HOST")
    assert fix is None


@pytest.mark.parametrize("type_", ["claude", "gemini", "openai"])
def test_a_web_page_is_no_api(type_: str) -> None:
    text, fix = found(type_, Answer("<html>Welcome</html>"))
    assert text == "HOST does not answer like an API"
    assert fix is not None


@pytest.mark.parametrize(
    ("answer", "ok", "said"),
    [
        (Answer({"error": {"message": "slow down"}}, 429), True, "asks to wait (HTTP 429: slow down)"),
        (Answer("<html>", 503), False, "has a problem (HTTP 503)"),
        (Answer({"error": {"message": "overloaded"}}, 529), False, "has a problem (HTTP 529: overloaded)"),
        (Answer({"error": {"message": "region"}}, 400), False, "refuses to tell (HTTP 400: region)"),
        (Answer("[" * 100_000, 418), False, "refuses to tell (HTTP 418)"),
    ],
)
def test_any_other_status_is_told(answer: Answer, ok: bool, said: str) -> None:
    text, fix = found("gemini", answer)
    assert said in text
    assert (fix is None) == ok


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_told_and_the_key_does_not_follow_it(status: int) -> None:
    with serving(Answer({})) as elsewhere:
        target = f"{elsewhere.url}/{KEY}"
        text, fix = found("claude", Answer("", status, {"location": target}))
    assert elsewhere.asked == []
    assert text == f"HOST redirects to {elsewhere.url}/***"
    assert fix is not None


def test_what_a_server_says_reaches_the_screen_only_escaped_and_shortened() -> None:
    text, _ = found("claude", Answer({"error": {"message": "\x1b[31m" + "x" * 10_000}}, 500))
    assert text.startswith("HOST has a problem (HTTP 500: \\x1b[31mxxx")
    assert text.isprintable()
    assert len(text) < 300


def test_no_connection_is_told_with_the_host_and_the_fix() -> None:
    port = closed_port()
    text, fix = find_model(entry("claude", base_url=f"http://127.0.0.1:{port}/{KEY}"))
    assert text.startswith(f"no way to 127.0.0.1:{port} (")
    assert KEY not in text
    assert fix == "start that server, or correct `base_url`"


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hallubench.reachability.TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        text, fix = find_model(entry("openai", base_url=f"http://127.0.0.1:{port}"))
    assert text == f"no way to 127.0.0.1:{port} (no answer within 0.05 s)"
    assert fix is not None


@pytest.mark.parametrize(
    ("type_", "host"),
    [
        ("claude", "api.anthropic.com"),
        ("gemini", "generativelanguage.googleapis.com"),
        ("openai", "api.openai.com"),
    ],
)
def test_without_a_base_url_the_provider_itself_is_asked(
    type_: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port()}")
    text, fix = find_model(entry(type_))
    assert text.startswith(f"no way to {host} (")
    assert fix == "connect this machine, or set HTTPS_PROXY to its proxy"


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://" + "a" * 300, "http://a\u202eb.."])
def test_an_address_that_cannot_be_one_is_told(url: str) -> None:
    text, fix = find_model(entry("claude", base_url=url))
    assert text.startswith("no way to ")
    assert text.isprintable()
    assert fix is not None
