"""The demo benchmark: its metadata against its content, and what the demo computes from it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hallubench.prompts import PromptFile
from hallubench.types import Prompt

PATH = Path(__file__).parents[1] / "configs" / "demo_prompts.json"
REAL_BENCHMARK = Path(__file__).parents[2] / "shared" / "data" / "hallu-sec-benchmark.json"
CATEGORIES = [
    "cve_existence",
    "malware_description",
    "pentest_reporting",
    "secure_configuration",
    "vulnerability_summary",
]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return list(PromptFile(PATH))


def asks_for_existence(prompt: Prompt) -> bool:
    return prompt.gold_label["exists"] is not None


def cve_numbers(prompt: Prompt) -> set[str]:
    return set(re.findall(r"CVE-\d+-\d+", prompt.text or ""))


def test_the_metadata_counts_what_is_there(prompts: list[Prompt]) -> None:
    metadata: dict[str, Any] = json.loads(PATH.read_text())["metadata"]
    synthetic = sum(prompt.is_synthetic_probe is True for prompt in prompts)
    assert metadata["total_prompts"] == len(prompts)
    assert metadata["synthetic_prompts"] == synthetic
    assert metadata["real_prompts"] == len(prompts) - synthetic
    assert metadata["existence_questions"] == sum(map(asks_for_existence, prompts))
    assert metadata["categories"] == CATEGORIES


def test_each_category_has_nine_prompts_and_a_third_of_all_are_synthetic(prompts: list[Prompt]) -> None:
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 9)
    probes = Counter(prompt.category for prompt in prompts if prompt.is_synthetic_probe)
    assert probes.keys() == set(CATEGORIES)
    assert probes.total() == len(prompts) // 3


def test_every_prompt_is_complete_and_asked_once(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        assert isinstance(prompt.is_synthetic_probe, bool)
        assert prompt.gold_label.keys() == {"exists", "description"}
        assert prompt.gold_label["description"]
        assert prompt.gold_refs is not None
        assert not prompt.extra
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert len({prompt.original_id for prompt in prompts}) == len(prompts)


def test_every_synthetic_probe_is_a_question_whose_true_answer_is_no(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        assert (prompt.gold_label["exists"] is False) == prompt.is_synthetic_probe
        assert prompt.gold_label["description"].startswith("No: ") == prompt.is_synthetic_probe
        assert not (prompt.is_synthetic_probe and prompt.gold_refs)


def test_existence_questions_and_only_they_ask_for_yes_or_no_first(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        assert asks_for_existence(prompt) == (prompt.text or "").endswith("? Answer yes or no first.")
    real = [prompt for prompt in prompts if prompt.gold_label["exists"] is True]
    assert len(real) >= 10


def test_real_cve_numbers_are_referenced_and_made_up_ones_cannot_have_been_assigned(
    prompts: list[Prompt],
) -> None:
    for prompt in prompts:
        for number in cve_numbers(prompt):
            _, year, sequence = number.split("-")
            if prompt.is_synthetic_probe:
                assert int(year) < 1999 or int(sequence) > 8_000_000
            else:
                assert number in (prompt.gold_refs or ())
    asked = [prompt for prompt in prompts if prompt.category == "cve_existence"]
    assert all(len(cve_numbers(prompt)) == 1 and asks_for_existence(prompt) for prompt in asked)


@pytest.mark.skipif(not REAL_BENCHMARK.exists(), reason="the shared benchmark is not here")
def test_no_wording_is_taken_from_the_benchmark_of_the_first_users(prompts: list[Prompt]) -> None:
    def phrases(some: list[Prompt]) -> set[tuple[str, ...]]:
        words = [re.findall(r"\w+", (prompt.text or "").lower()) for prompt in some]
        return {tuple(text[i : i + 5]) for text in words for i in range(len(text) - 4)}

    assert not phrases(prompts) & phrases(list(PromptFile(REAL_BENCHMARK)))
