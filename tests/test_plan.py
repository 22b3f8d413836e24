from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from hallubench.config import Config, load_config
from hallubench.errors import ConfigError
from hallubench.plan import Plan, make_plan
from hallubench.prompts import PromptFile
from hallubench.types import Request

SHARED = Path(__file__).parents[2] / "shared" / "data"
LOCAL = {"name": "tiny", "type": "local", "temperature": 0.7}


def plan_of(folder: Path, *models: dict[str, Any], prompts: list[dict[str, Any]] | None = None) -> Plan:
    path = folder / "prompts.jsonl"
    entries = prompts or [{"id": "p0", "prompt": "Zero?"}, {"id": "p1", "prompt": "One?"}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return make_plan(Config.model_validate({"models": list(models)}), PromptFile(path))


def requests_of(plan: Plan, answered: frozenset[str] = frozenset()) -> list[Request]:
    groups = chain.from_iterable(lane.groups for lane in plan.lanes)
    return [request for group in groups for request in plan.requests(group, answered)]


def ids_of(folder: Path, **changes: Any) -> set[str]:
    return {request.request_id for request in requests_of(plan_of(folder, LOCAL | changes))}


def test_the_legacy_pilot_is_ten_entries_of_393_requests_and_three_engines() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    config = load_config(SHARED / "config_full_pilot.json", missing_env="keep")
    plan = make_plan(config, PromptFile(SHARED / "hallu-sec-benchmark.json"))
    survey = plan.survey()
    assert survey.pending == (393,) * 10
    assert survey.requests == 3930
    assert {lane.name: len(lane.groups) for lane in plan.lanes} == {"claude": 1, "gemini": 1, "local": 3}


def test_ids_are_the_same_in_every_version(tmp_path: Path) -> None:
    # Changing these makes every user ask everything again.
    plan = plan_of(tmp_path, LOCAL, prompts=[{"id": "p0", "prompt": "Does it exist?"}])
    assert [request.request_id for request in requests_of(plan)] == [GOLDEN]


GOLDEN = "8eb8a6d4a9001eafa413"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"temperature": 0.8},
        {"top_p": 0.9},
        {"top_k": 3},
        {"max_tokens": 5},
        {"stop": ["."]},
        {"seed": 1},
        {"system_prompt": "Be brief."},
        {"dtype": "float32"},
        {"revision": "abc"},
        {"logprobs": 1},
        {"engine": {"quantization": "fp8"}},
    ],
)
def test_what_determines_an_answer_changes_its_id(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert not ids_of(tmp_path) & ids_of(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"notes": "x"}, {"engine": {"max_num_seqs": 4}}, {"model_path": "/elsewhere"}, {"device": "cpu"}],
)
def test_what_only_changes_speed_or_place_keeps_the_ids(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert ids_of(tmp_path) == ids_of(tmp_path, **changes)


def test_samples_differ_by_seed_and_index(tmp_path: Path) -> None:
    requests = requests_of(plan_of(tmp_path, LOCAL | {"n": 3, "seed": 10}))
    assert [(r.prompt.id, r.sample_index, r.params.seed) for r in requests] == [
        (prompt, sample, 10 + sample) for prompt in ("p0", "p1") for sample in range(3)
    ]
    assert len({r.request_id for r in requests}) == 6


def test_the_config_s_seed_is_null_where_it_cannot_be_sent(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LOCAL, {"name": "c", "type": "claude"})
    assert {r.provider: r.params.seed for r in requests_of(plan)} == {"vllm": 42, "anthropic": None}


def test_what_is_answered_is_not_planned_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LOCAL)
    first, second = requests_of(plan)
    answered = frozenset({first.request_id})
    assert [r.request_id for r in requests_of(plan, answered)] == [second.request_id]
    assert plan.survey(answered).pending == (1,)


def test_entries_that_share_weights_and_options_share_an_engine(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        LOCAL,
        LOCAL | {"temperature": 0.0},
        LOCAL | {"dtype": "float32"},
        LOCAL | {"name": "alias", "model_path": "tiny"},
    )
    (lane,) = plan.lanes
    assert [len(group.entries) for group in lane.groups] == [3, 1]


def test_one_account_is_asked_by_one_sdk(tmp_path: Path) -> None:
    gemini = {"name": "gemini-2.5-flash", "type": "gemini"}
    with pytest.raises(ConfigError, match=r"different sdk \(none and google-genai\); write the same on both"):
        plan_of(tmp_path, gemini, gemini | {"top_k": 2, "sdk": "google-genai"})


def test_two_accounts_of_one_provider_are_two_lanes(tmp_path: Path) -> None:
    models = [{"name": f"m{i}", "type": "echo", "api_key": key} for i, key in enumerate("aab")]
    plan = plan_of(tmp_path, *models)
    assert [(lane.name, len(lane.groups[0].entries)) for lane in plan.lanes] == [("echo", 2), ("echo-2", 1)]


def test_entries_that_ask_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\[0\] and models\[1\] ask exactly the same"):
        plan_of(tmp_path, LOCAL, LOCAL | {"notes": "again"})


def test_an_unknown_type_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\[0\]\.type: .*'lokal'.* local"):
        plan_of(tmp_path, LOCAL | {"type": "lokal"})


def test_two_system_messages_for_one_prompt_are_refused(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Zero?"}]
    plan = plan_of(
        tmp_path, LOCAL | {"system_prompt": "Be kind."}, prompts=[{"id": "p0", "messages": messages}]
    )
    with pytest.raises(ConfigError, match="system message"):
        plan.survey()


def claude(**keys: Any) -> dict[str, Any]:
    return {"name": "claude-3-5-haiku-20241022", "type": "claude", "api_key": "sk-one-account"} | keys


def test_models_of_one_account_are_one_lane_and_one_group(tmp_path: Path) -> None:
    other = claude(name="claude-3-opus-20240229", base_url=None)
    elsewhere = claude(base_url="http://host/", top_k=1), claude(base_url="http://host", top_k=2)
    plan = plan_of(tmp_path, claude(), other, *elsewhere)
    assert [len(lane.groups) for lane in plan.lanes] == [1, 1]
    assert [len(lane.groups[0].entries) for lane in plan.lanes] == [2, 2]


def test_a_key_of_the_environment_and_the_same_one_written_are_one_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-one-account")
    assert len(plan_of(tmp_path, claude(), claude(api_key=None, top_k=2)).lanes) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"requests_per_minute": 10}, "a different requests_per_minute (60 and 10)"),
        ({"requests_per_minute": None}, "a different requests_per_minute (60 and none)"),
        ({"max_concurrency": 3}, "a different max_concurrency (none and 3)"),
        ({"burst": 1}, "a different burst (10 and 1)"),
    ],
)
def test_an_account_has_one_budget(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"^models\[0\] and models\[2\] share one account") as refused:
        plan_of(tmp_path, claude(), claude(top_k=2), claude(top_k=3, **keys))
    assert said in str(refused.value)
    assert len(plan_of(tmp_path, claude(**keys), claude(top_k=2, **keys)).lanes) == 1
    assert len(plan_of(tmp_path, claude(), claude(api_key="sk-another", top_k=2, **keys)).lanes) == 2


def test_what_a_model_does_not_take_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^models\[1\]\.seed: "):
        plan_of(tmp_path, LOCAL, claude(seed=1))
