from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hallubench.config import Config
from hallubench.dry_run import plan_lines
from hallubench.generate import run

ECHO = {"name": "e", "type": "echo", "max_tokens": 50}
CLAUDE = {"name": "claude-3-opus-20240229", "type": "claude", "max_tokens": 50, "api_key": "sk-secret-1"}
PRICES = {"claude-*": {"input": 1000, "output": 2000}}


def lines(folder: Path, *models: dict[str, Any], prompts: int = 100, **keys: Any) -> list[str]:
    return list(plan_lines(make_config(folder, *models, prompts=prompts, **keys)))


def make_config(folder: Path, *models: dict[str, Any], prompts: int = 100, **keys: Any) -> Config:
    file = folder / "prompts.json"
    file.write_text(json.dumps([{"id": f"p{i}", "prompt": "x" * 30} for i in range(prompts)]))
    settings = {"prompts_file": str(file), "output_dir": str(folder / "out"), "models": models}
    return Config.model_validate(settings | keys)


def test_every_entry_stands_under_its_lane_with_its_requests(tmp_path: Path) -> None:
    said = lines(tmp_path, ECHO, ECHO | {"n": 2, "temperature": 0.7}, CLAUDE)
    assert "lane echo" in said
    assert "    e at temperature default: 100 requests, 0 answered, 100 to ask" in said
    assert "    e at temperature 0.7, 2 samples: 200 requests, 0 answered, 200 to ask" in said
    assert "lane claude" in said
    assert "In all 400 requests: 0 answered, 400 to ask." in said


def test_tokens_cost_and_time_are_estimated(tmp_path: Path) -> None:
    said = lines(tmp_path, CLAUDE, prices=PRICES, requests_per_minute=30)
    assert said[-3:] == [
        "In all 100 requests: 0 answered, 100 to ask.",
        "It costs at most 11.00 USD.",  # 1,000 tokens in, 5,000 out
        "It takes at least 3 minutes: lanes run at the same time.",
    ]
    assert "  about 1,000 tokens in, at most 5,000 tokens out, at most 11.00 USD, at least 3 minutes" in said


@pytest.mark.parametrize(
    ("keys", "time"),
    [
        ({"requests_per_minute": 60, "burst": 40}, "61 s"),
        ({"requests_per_minute": None, "input_tokens_per_minute": 100}, "10 minutes"),
        ({"requests_per_minute": 0.5}, "3.0 hours"),
        ({"requests_per_minute": 60, "input_tokens_per_minute": 100}, "10 minutes"),
    ],
)
def test_the_tightest_budget_sets_the_least_time(tmp_path: Path, keys: dict[str, Any], time: str) -> None:
    assert lines(tmp_path, CLAUDE, **keys)[-1] == f"It takes at least {time}: lanes run at the same time."


@pytest.mark.parametrize(
    "keys", [{"requests_per_minute": None}, {"burst": 100}, {"output_tokens_per_minute": 100, "burst": 100}]
)
def test_what_may_go_out_at_once_takes_no_least_time(tmp_path: Path, keys: dict[str, Any]) -> None:
    assert not any("at least" in line for line in lines(tmp_path, CLAUDE, **keys))


def test_only_what_is_not_answered_is_estimated(tmp_path: Path) -> None:
    run(make_config(tmp_path, ECHO, prompts=40))
    said = lines(tmp_path, ECHO, prices={"e": {"input": 0, "output": 1000}})
    assert "    e at temperature default: 100 requests, 40 answered, 60 to ask" in said
    assert "  about 600 tokens in, at most 3,000 tokens out, at most 3.00 USD" in said
    config = make_config(tmp_path, ECHO, prompts=40)
    done = list(plan_lines(config))
    assert done[-1] == "In all 40 requests: 40 answered, 0 to ask."
    assert not any("tokens" in line for line in done)
    assert "In all 40 requests: 0 answered, 40 to ask." in plan_lines(config, fresh=True)


def test_a_model_without_a_price_is_named_where_there_are_prices(tmp_path: Path) -> None:
    gemini = {"name": "gemini-x", "type": "gemini"}
    said = lines(tmp_path, CLAUDE, gemini, ECHO, prices=PRICES)
    (line,) = (line for line in said if "no price for" in line)
    assert "no price for gemini-x" in line
    assert "It costs at most 11.00 USD, beside what has no price." in said
    assert not any("no price" in line for line in lines(tmp_path, CLAUDE, gemini))


def test_a_bound_that_may_stop_the_run_is_told(tmp_path: Path) -> None:
    told = "It stops before it has cost 5 USD, as max_cost_usd asks."
    assert told in lines(tmp_path, CLAUDE, prices=PRICES, max_cost_usd=5)
    assert not any("stops" in line for line in lines(tmp_path, CLAUDE, prices=PRICES, max_cost_usd=50))


def test_no_key_is_printed_and_nothing_is_written(tmp_path: Path) -> None:
    said = lines(tmp_path, CLAUDE, CLAUDE | {"api_key": "sk-secret-2", "top_k": 3}, api_delay=1)
    assert "secret" not in "".join(said)
    assert "Warning: api_delay has no effect: requests_per_minute sets the pace." in said
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]
