from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hallubench.config import Config, load_config, missing_variables
from hallubench.errors import ConfigError

LOCAL = {"name": "tiny", "type": "local"}
SHARED = Path(__file__).parents[2] / "shared" / "data"


def write(folder: Path, text: str | dict[str, Any], name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def problem(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, **options)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_json_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    expected = load_config(write(tmp_path, {"seed": 7, "models": [LOCAL | {"temperature": 1}]}))
    assert (
        load_config(
            write(tmp_path, "seed: 7\nmodels:\n- {name: tiny, type: local, temperature: 1}\n", "c.yaml")
        )
        == expected
    )
    toml = 'seed = 7\n[[models]]\nname = "tiny"\ntype = "local"\ntemperature = 1\n'
    assert load_config(write(tmp_path, toml, "c.toml")) == expected


def test_local_models_record_five_alternatives_unless_told_otherwise(tmp_path: Path) -> None:
    models = [LOCAL, LOCAL | {"logprobs": None, "prompt_logprobs": 2}, {"name": "e", "type": "echo"}]
    config = load_config(write(tmp_path, {"models": models}))
    assert [(m.logprobs, m.prompt_logprobs) for m in config.models] == [(5, 5), (None, 2), (None, None)]
    assert [m.temperature for m in config.models] == [1.0, 1.0, None]


@pytest.mark.parametrize("name", ["config_full_pilot.json", "config_small_test.json"])
def test_the_legacy_configs_load_unchanged(name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    config = load_config(SHARED / name, missing_env="keep")
    assert config.requests_per_minute == 50
    assert "ANTHROPIC_API_KEY" in missing_variables(config)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1, column 2"),
        ("[1]", "must be a mapping"),
        ('{"models": []}', "models: is empty"),
        ('{"modles": []}', "models"),
        ('{"seed": 1, "seed": 2}', "'seed' stands twice"),
        ('{"seed": NaN}', "NaN is not a JSON number"),
        ('{"seed": 1.5, "models": [{"name": "a", "type": "local"}]}', "seed:"),
        ('{"models": [{"name": "a"}]}', "models[0].type: this key is missing"),
        ('{"models": [{"name": "a", "type": "local", "temprature": 1}]}', "did you mean `temperature`?"),
        ('{"models": [{"name": "a", "type": "local", "temperature": true}]}', "models[0].temperature"),
        ('{"models": [{"name": "a", "type": "local", "temperature": -1}]}', "models[0].temperature"),
        (f'{{"models": [{{"name": "a", "type": "echo", "temperature": 1{"0" * 400}}}]}}', "valid number"),
        ('{"models": [{"name": "a", "type": "local", "n": 0}]}', "models[0].n"),
        ('{"models": [{"name": "a", "type": "local", "seed": 99999999999999999999}]}', "models[0].seed"),
        (
            '{"models": [{"name": "a", "type": "local", "engine": {"seed": 1}}]}',
            "'seed' on the model's entry",
        ),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, content: str, said: str) -> None:
    assert said in problem(write(tmp_path, content))


def test_a_key_that_stands_twice_in_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "line 2: the key 'seed' stands twice" in problem(write(tmp_path, "seed: 1\nseed: 2\n", "c.yaml"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "no such config file" in problem(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"notes": "\xe9"}')
    assert "not UTF-8" in problem(tmp_path / "latin.json")
    assert "a config is a .json, .yaml, .yml or .toml file" in problem(write(tmp_path, "", "c.ini"))
    assert problem(tmp_path)


def test_environment_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"models": [LOCAL | {"model_path": "${WEIGHTS}/tiny"}]})
    monkeypatch.setenv("WEIGHTS", "/weights")
    assert load_config(path).models[0].weights == "/weights/tiny"
    monkeypatch.delenv("WEIGHTS")
    assert "models[0].model_path: the variable WEIGHTS is not set" in problem(path)
    assert missing_variables(load_config(path, missing_env="keep")) == ["WEIGHTS"]


def test_prompts_are_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    config = {"prompts_file": "prompts.jsonl", "models": [LOCAL]}
    assert load_config(write(tmp_path, config)).prompts_file == str(tmp_path / "prompts.jsonl")
    other = load_config(write(tmp_path, config), prompts_file="given.jsonl")
    assert other.prompts_file == "given.jsonl"


def test_only_the_models_that_match_need_their_variables(tmp_path: Path) -> None:
    path = write(tmp_path, {"models": [LOCAL, {"name": "c", "type": "claude", "api_key": "${ABSENT_KEY}"}]})
    assert [model.name for model in load_config(path, models="t*").models] == ["tiny"]
    assert "no model matches 'x*'; there are: tiny, c" in problem(path, models="x*")


def test_a_key_is_in_no_rendering_of_the_config(tmp_path: Path) -> None:
    models = [{"name": "c", "type": "claude", "api_key": "sk-secret-1"}]
    config = load_config(write(tmp_path, {"models": models}))
    assert "sk-secret-1" not in json.dumps(config.to_json()) + repr(config) + str(config)
    models[0]["temperature"] = "sk-secret-1"
    assert "sk-secret-1" not in problem(write(tmp_path, {"models": models}))


@pytest.mark.parametrize(
    ("where", "elsewhere"),
    [
        ("models[0]: ", {"models": [{"name": "c", "type": "claude", "notes": "not sk-secret-1"}]}),
        (
            "models[0]: ",
            {"models": [{"name": "c", "type": "claude", "options": {"x": [{"of": "sk-secret-1"}]}}]},
        ),
        ("", {"description": "asked with sk-secret-1", "models": [{"name": "c", "type": "claude"}]}),
    ],
)
def test_a_key_outside_api_key_is_refused_because_it_would_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, elsewhere: dict[str, Any]
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret-1")
    message = problem(write(tmp_path, elsewhere))
    assert message.endswith(f"{where}the key stands outside `api_key`, where it is recorded; remove it")
    assert "sk-secret-1" not in message


@pytest.mark.parametrize(
    ("entry", "fix"),
    [
        (LOCAL | {"engine": {"hf_token": "hf_secret"}}, "export HF_TOKEN=..."),
        (
            {"name": "o", "type": "openai", "options": {"extra_body": {"Api-Key": "hf_secret"}}},
            "write a provider's key as `api_key`",
        ),
    ],
)
def test_what_is_called_a_secret_is_refused_where_it_would_be_recorded(
    tmp_path: Path, entry: dict[str, Any], fix: str
) -> None:
    message = problem(write(tmp_path, {"models": [entry]}))
    assert message.endswith(fix)
    assert "hf_secret" not in message


def test_a_placeholder_in_place_of_a_key_leaves_the_record_readable(tmp_path: Path) -> None:
    models = [{"name": "o", "type": "openai", "api_key": "test", "notes": "a test"}]
    assert load_config(write(tmp_path, {"models": models})).to_json()["models"][0]["notes"] == "a test"


@pytest.mark.parametrize(
    "url", ["https://me:sk-secret-1@host", "http://host/v1?key=sk-secret-1", "http://host/#sk-secret-1"]
)
def test_a_key_in_a_url_is_refused_without_repeating_it(tmp_path: Path, url: str) -> None:
    models = [{"name": "c", "type": "claude", "base_url": url}]
    message = problem(write(tmp_path, {"models": models}))
    assert message.endswith(
        "models[0].base_url: holds a user name, a query or a fragment; write the key as `api_key`"
    )


def test_the_own_limit_of_an_entry_goes_before_the_configs(tmp_path: Path) -> None:
    models = [{"name": "c", "type": "claude"}, {"name": "d", "type": "claude", "requests_per_minute": None}]
    raw = {"requests_per_minute": 50, "async_settings": {"max_concurrency": 3}, "models": models}
    config = load_config(write(tmp_path, raw))
    assert [config.limit(model, "requests_per_minute") for model in config.models] == [50, None]
    assert [config.limit(model, "max_concurrency") for model in config.models] == [3, 3]
    assert config.limit(config.models[0], "timeout") == 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
API_KEYS = ["prices", "accepts", "base_url", "burst", "timeout", "max_cost_usd", "api_key", "options"]
keys = st.sampled_from(
    ["models", "seed", "prompts_file", "async_settings", "name", "type", "engine", "n", *API_KEYS]
)


# The first text of all takes seconds where machines are slow.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(keys, json_values | st.lists(st.dictionaries(keys, json_values, max_size=4), max_size=2))
)
def test_any_mapping_is_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]
) -> None:
    path = write(tmp_path_factory.getbasetemp(), raw)
    with suppress(ConfigError):
        assert isinstance(load_config(path), Config)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"prices": {"m": {"input": 1}}}, "prices.m.output: this key is missing; add it"),
        ({"prices": {"m": {"input": 1, "output": -1}}}, "prices.m.output: input should be greater than"),
        (
            {"prices": {"m": {"input": 1, "outptu": 2}}},
            "prices.m.outptu: unknown key; did you mean `output`?",
        ),
        ({"prices": 3}, "prices: input should be a valid dictionary"),
        ({"max_cost_usd": 0}, "max_cost_usd: input should be greater than 0"),
        ({"burst": None}, "burst: cannot be null; write a number, or leave the key out"),
        ({"timeout": None}, "timeout: cannot be null"),
        ({"requests_per_minute": True}, "requests_per_minute: input should be a valid number"),
        ({"models": [LOCAL | {"accepts": {"sede": True}}]}, "models[0].accepts.sede"),
        (
            {"models": [LOCAL | {"accepts": {"seed": "no"}}]},
            "models[0].accepts.seed: input should be a valid bool",
        ),
        ({"models": [LOCAL | {"base_url": "localhost:8000"}]}, "models[0].base_url: string should match"),
        ({"models": [LOCAL | {"timeout": -1}]}, "models[0].timeout: input should be greater than 0"),
    ],
)
def test_what_is_wrong_with_limits_and_prices_is_named(
    tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    assert said in problem(write(tmp_path, {"models": [LOCAL]} | keys))


def test_no_limit_is_written_as_null_and_differs_from_none_written(tmp_path: Path) -> None:
    unset = load_config(write(tmp_path, {"models": [{"name": "c", "type": "claude"}]}))
    null = load_config(
        write(tmp_path, {"requests_per_minute": None, "models": [{"name": "c", "type": "claude"}]})
    )
    assert unset.limit(unset.models[0], "requests_per_minute") == 60
    assert null.limit(null.models[0], "requests_per_minute") is None


def test_the_concurrency_of_the_config_goes_before_the_legacy_one(tmp_path: Path) -> None:
    raw = {"max_concurrency": 7, "async_settings": {"max_concurrency": 3}, "models": [LOCAL]}
    config = load_config(write(tmp_path, raw))
    assert config.limit(config.models[0], "max_concurrency") == 7
