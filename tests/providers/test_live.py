"""Against the real APIs, for a few cents: `pytest -m live`. Each is skipped where its key is not set."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import hallubench
from hallubench.config import KEY_VARIABLES, Config

pytestmark = pytest.mark.live

ENTRIES: dict[str, dict[str, Any]] = {
    "claude": {"type": "claude", "name": os.environ.get("LIVE_CLAUDE", "claude-haiku-4-5")},
    "google-generativeai": {"type": "gemini", "name": os.environ.get("LIVE_GEMINI", "gemini-2.5-flash")},
    "google-genai": {
        "type": "gemini",
        "name": os.environ.get("LIVE_GEMINI", "gemini-2.5-flash"),
        "sdk": "google-genai",
        "seed": 1,
    },
    "openai": {
        "type": "openai",
        "name": os.environ.get("LIVE_OPENAI", "gpt-4.1-mini"),
        "seed": 1,
        "logprobs": 5,
    },
}


@pytest.mark.parametrize("lane", ENTRIES)
def test_a_real_api_answers_with_all_that_a_row_tells(lane: str, tmp_path: Path) -> None:
    entry = ENTRIES[lane] | {"temperature": 0.0, "max_tokens": 1024}
    variable = KEY_VARIABLES[entry["type"]]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": "a", "prompt": "Say yes."}, {"id": "b", "prompt": "Say no."}]))
    config = {"prompts_file": str(prompts), "output_dir": str(tmp_path / "out"), "models": [entry]}
    result = hallubench.run(Config.model_validate(config))
    assert (result.answered, result.failed, result.problems) == (2, 0, [])
    for row in hallubench.scan(result.output).collect().iter_rows(named=True):
        assert {"a": "yes", "b": "no"}[row["prompt_id"]] in row["full_response"].lower()
        assert row["finish_reason"] == "stop"
        assert row["model_version"]
        assert row["input_tokens"] > 0
        assert row["output_tokens"] > 0
        assert (row["output_logprobs"] is not None) == (entry.get("logprobs") is not None)
