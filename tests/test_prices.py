from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from hallubench.config import Config, Price
from hallubench.errors import ConfigError, LaneError
from hallubench.generate import Result, run
from hallubench.prices import Purse, Spending, check_prices, cost, highest_cost, price_of
from hallubench.store import scan
from hallubench.types import Completion, Prompt, Request, SamplingParams, Usage

PRICE = Price(input=3.0, output=15.0, cached=0.3)
EXAMPLE = Path(__file__).parents[1] / "configs" / "prices.example.yaml"


def config(*models: dict[str, Any], **keys: Any) -> Config:
    return Config.model_validate({"models": models or ({"name": "m", "type": "echo"},)} | keys)


def question(number: int, *, max_tokens: int = 100, text: str = "") -> Request:
    return Request(
        request_id=f"id-{number}",
        prompt=Prompt(id=f"p{number}", index=number, text=text),
        sample_index=0,
        provider="echo",
        model="m",
        system_prompt=None,
        params=SamplingParams(max_tokens=max_tokens),
    )


def completion(request: Request, *, output: int | None = None, error: str | None = None) -> Completion:
    return Completion(
        request_id=request.request_id,
        timestamp=datetime(2026, 1, 1, tzinfo=UTC),
        elapsed_seconds=1.0,
        text=None if error else "Yes.",
        usage=Usage(input_tokens=None if output is None else 0, output_tokens=output),
        error=error,
    )


def spending(max_usd: float) -> tuple[Spending, Purse]:
    """Requests of 100 tokens cost up to 1 USD each."""
    purse = Purse(max_usd)
    return Spending(config(prices={"m": {"input": 0, "output": 10_000}}), [purse]), purse


def test_cached_tokens_cost_their_own_price() -> None:
    usage = Usage(input_tokens=1_000_000, output_tokens=100_000, cached_tokens=400_000)
    assert cost(PRICE, usage) == pytest.approx(0.6 * 3 + 0.4 * 0.3 + 0.1 * 15)
    assert cost(Price(input=3.0, output=15.0), usage) == pytest.approx(3 + 1.5)


def test_reasoning_is_part_of_the_output_and_is_not_paid_twice() -> None:
    thought = Usage(input_tokens=0, output_tokens=1_000_000, reasoning_tokens=900_000)
    assert cost(PRICE, thought) == 15


@pytest.mark.parametrize("usage", [Usage(), Usage(input_tokens=1), Usage(output_tokens=1)])
def test_a_cost_that_cannot_be_known_is_none(usage: Usage) -> None:
    assert cost(PRICE, usage) is None
    assert cost(None, Usage(input_tokens=1, output_tokens=1)) is None


def test_a_name_goes_before_a_pattern_and_an_earlier_pattern_before_a_later_one() -> None:
    prices = {name: {"input": n, "output": n} for n, name in enumerate(["large-*", "*", "large-2"])}
    priced = config(prices=prices)
    found = [price_of(priced, name) for name in ("large-1", "small", "large-2")]
    assert [price.input for price in found if price] == [0, 1, 2]
    assert price_of(config(), "large-1") is None


def test_the_highest_cost_is_that_of_the_longest_answer() -> None:
    asked = question(0, max_tokens=1_000_000, text="x" * 3_000)
    assert highest_cost(PRICE, asked) == pytest.approx(15 + 0.003)
    assert highest_cost(None, asked) == 0


def test_a_bound_without_a_price_is_refused() -> None:
    paid, free = {"name": "g", "type": "gemini"}, {"name": "e", "type": "echo"}
    for bounded in (config(paid, max_cost_usd=5), config(paid | {"max_cost_usd": 5})):
        with pytest.raises(
            ConfigError, match=r"^models\[0\]: max_cost_usd needs the price of g; add it to `prices`$"
        ):
            check_prices(bounded, bounded.models[0], "models[0]")
    for allowed in (
        config(paid),
        config(free, max_cost_usd=5),
        config(paid, max_cost_usd=5, prices={"g*": {"input": 1, "output": 1}}),
    ):
        check_prices(allowed, allowed.models[0], "models[0]")


def test_what_is_in_flight_counts_with_all_that_it_may_cost() -> None:
    account, purse = spending(2.5)
    requests = iter([question(n) for n in range(5)])
    first = list(account.affordable(requests))
    assert [request.request_id for request in first] == ["id-0", "id-1"]
    assert not account.can_go_on
    for request in first:
        assert account.settle(request, completion(request, output=10)) == pytest.approx(0.1)
    assert purse.spent == pytest.approx(0.2)
    assert account.can_go_on
    # The one that was held back comes first.
    assert [request.request_id for request in account.affordable(requests)] == ["id-2", "id-3"]


def test_no_sequence_of_answers_passes_the_bound_and_none_stops_early() -> None:
    account, purse = spending(3.0)
    requests: Iterator[Request] = (question(n) for n in range(1000))
    answered = 0
    while batch := list(account.affordable(requests)):
        assert purse.spent + purse.reserved <= purse.max_usd
        for request in batch:
            account.settle(request, completion(request, output=answered % 30))
            answered += 1
    assert 2.0 < purse.spent <= 3.0
    with pytest.raises(LaneError, match=r"^2\.\d\d USD spent, .* max_cost_usd \(3\); raise it, or lower"):
        account.check_finished()


def test_a_request_that_one_purse_has_too_little_for_takes_nothing_from_the_others() -> None:
    shared, own = Purse(10), Purse(0.5)
    account = Spending(config(prices={"m": {"input": 0, "output": 10_000}}), [shared, own])
    assert list(account.affordable([question(0)])) == []
    assert (shared.reserved, own.reserved) == (0, 0)
    with pytest.raises(LaneError, match=r"^0\.00 USD spent, .* max_cost_usd \(0\.5\)"):
        account.check_finished()


def test_two_threads_that_share_a_purse_do_not_pass_it() -> None:
    purse = Purse(1000)
    with ThreadPoolExecutor(4) as threads:
        granted = sum(threads.map(lambda _: sum(purse.reserve(1) for _ in range(500)), range(4)))
    assert granted == purse.reserved == 1000


def test_an_error_is_free_and_an_answer_of_unknown_length_costs_all_it_could() -> None:
    account, purse = spending(10)
    failed, unknown, billed = account.affordable(map(question, range(3)))
    assert account.settle(failed, completion(failed, error="HTTP 500")) is None
    assert purse.spent == 0
    assert account.settle(unknown, completion(unknown)) is None
    assert purse.spent == 1
    assert account.settle(billed, completion(billed, output=100, error="blocked")) == 1
    assert (purse.spent, purse.reserved) == (2, 0)
    account.check_finished()


def test_without_a_bound_everything_is_let_through_and_its_cost_still_known() -> None:
    account = Spending(config(prices={"*": {"input": 0, "output": 10_000}}), ())
    asked = list(account.affordable(map(question, range(500))))
    assert len(asked) == 500
    assert account.settle(asked[0], completion(asked[0], output=50)) == 0.5
    assert not account.can_go_on


def test_the_example_is_a_block_for_any_config_with_its_date() -> None:
    text = EXAMPLE.read_text()
    block = yaml.safe_load(text)
    example = config({"name": "made-up-model-large", "type": "claude"}, **block)
    assert price_of(example, "made-up-model-large") == Price(input=3.0, output=15.0, cached=0.3)
    assert price_of(example, "made-up-model-small") == Price(input=0.5, output=2.0)
    assert "2026-11-23" in text.splitlines()[0]
    assert "MADE-UP" in text.splitlines()[0]


def asked_of_echo(folder: Path, *models: dict[str, Any], prompts: int = 20, **keys: Any) -> Result:
    file = folder / "prompts.json"
    file.write_text(json.dumps([{"id": f"p{i}", "prompt": f"Is claim {i} true?"} for i in range(prompts)]))
    # An answer has 32 tokens and costs 32 USD, where it may cost 64.
    price = {"*": {"input": 0, "output": 1_000_000}}
    return run(config(*models, prompts_file=str(file), output_dir=str(folder / "out"), prices=price, **keys))


def spent(folder: Path) -> dict[str, float]:
    grouped = scan(folder / "out").group_by("model").agg(pl.col("cost_usd").sum()).collect()
    return dict(grouped.iter_rows())


def echo(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "type": "echo", "max_tokens": 64} | keys


def test_every_row_says_what_it_cost(tmp_path: Path) -> None:
    assert asked_of_echo(tmp_path, echo("a"), prompts=3).problems == []
    assert scan(tmp_path / "out").select("cost_usd").collect()["cost_usd"].to_list() == [32.0] * 3


def test_a_run_stops_before_its_bound_is_passed_and_the_next_one_goes_on(tmp_path: Path) -> None:
    result = asked_of_echo(tmp_path, echo("a"), max_cost_usd=200)
    assert spent(tmp_path) == {"a": 160.0}
    assert (result.answered, result.failed, result.pending) == (5, 0, 15)
    (problem,) = result.problems
    assert problem == (
        "echo: 160.00 USD spent, and the next answer may pass max_cost_usd (200); "
        "raise it, or lower max_tokens, and run again"
    )
    again = asked_of_echo(tmp_path, echo("a"), max_cost_usd=10_000)
    assert (again.already_answered, again.answered, again.problems) == (5, 15, [])


def test_the_bound_of_an_account_leaves_the_others_alone(tmp_path: Path) -> None:
    bounded = echo("a", api_key="first", max_cost_usd=100)
    result = asked_of_echo(tmp_path, bounded, echo("b", api_key="second"), prompts=6)
    assert spent(tmp_path) == {"a": 64.0, "b": 192.0}
    assert len(result.problems) == 1


def test_the_bound_of_the_config_is_shared_by_all_lanes(tmp_path: Path) -> None:
    accounts = [echo("a", api_key="first"), echo("b", api_key="second")]
    result = asked_of_echo(tmp_path, *accounts, max_cost_usd=300)
    assert 200 < sum(spent(tmp_path).values()) <= 300
    assert result.pending == 40 - result.answered
