"""What `generate --dry-run` prints: the plan, what of it is answered already, and what the rest may cost."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hallubench.config import KEY_VARIABLES, Config, ModelConfig, Price, missing_variables
from hallubench.generate import prepare
from hallubench.limits import MARGIN, estimate
from hallubench.plan import Group, Lane, Plan
from hallubench.prices import FREE, highest_cost, price_of
from hallubench.store import answered_ids
from hallubench.text import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the requests of a lane that have no answer yet will take."""

    requests: int
    input_tokens: int
    """About: from the length of the texts."""
    output_tokens: int
    """At most: every answer as long as `max_tokens`."""
    cost_usd: float
    """At most; 0 without prices."""
    seconds: float
    """At least: what the account's budgets make of it."""
    unpriced: tuple[str, ...]
    """Models that are paid for and have no price, where the config has prices at all."""


def plan_lines(config: Config, *, fresh: bool = False) -> Iterator[str]:
    """The plan of a config, line by line: lanes, engines to load, requests of each entry, and estimates.

    Raises:
        InputError: the config or its prompts cannot be asked.
    """
    output, plan = prepare(config)
    answered = frozenset() if fresh else answered_ids(output)
    survey = plan.survey(answered)
    estimates = [estimate_lane(plan, lane, answered) for lane in plan.lanes]
    pending = {id(entry): count for entry, count in zip(config.models, survey.pending, strict=True)}
    for name in missing_variables(config):
        yield f"Warning: the environment variable {name} is not set; a run will need it."
    for warning in without_effect(config):
        yield f"Warning: {warning}"
    yield f"{survey.prompts} prompts from {printable(config.prompts_file)}; answers go to {printable(output)}"
    for lane, expected in zip(plan.lanes, estimates, strict=True):
        local = lane.groups[0].entries[0].type == "local"
        yield f"lane {lane.name}" + (f": {_count(len(lane.groups), 'engine')} to load" if local else "")
        for group in lane.groups:
            if local:
                yield f"  engine {_engine(group)}"
            for entry in group.entries:
                requests, to_ask = survey.prompts * entry.n, pending[id(entry)]
                counts = f"{_count(requests, 'request')}, {requests - to_ask} answered, {to_ask} to ask"
                yield f"    {_entry(entry)}: {counts}"
        if expected.requests:
            yield f"  {_estimate(expected)}"
    total = sum(survey.pending)
    yield f"In all {_count(survey.requests, 'request')}: {survey.requests - total} answered, {total} to ask."
    if highest := sum(expected.cost_usd for expected in estimates):
        unpriced = any(expected.unpriced for expected in estimates)
        beside = ", beside what has no price" if unpriced else ""
        yield f"It costs at most {highest:.2f} USD{beside}."
    if config.max_cost_usd is not None and highest > config.max_cost_usd:
        yield f"It stops before it has cost {config.max_cost_usd:g} USD, as max_cost_usd asks."
    if seconds := max(expected.seconds for expected in estimates):
        yield f"It takes at least {_duration(seconds)}: lanes run at the same time."


def estimate_lane(plan: Plan, lane: Lane, answered: Container[str] = frozenset()) -> Estimate:
    """Go through a lane's requests that are not among `answered`, and add up what they will take."""
    config = plan.config
    entries = [entry for group in lane.groups for entry in group.entries]
    prices = {entry.name: price_of(config, entry.name) for entry in entries}
    requests = input_tokens = output_tokens = 0
    cost_usd = 0.0
    for group in lane.groups:
        for request in plan.requests(group, answered):
            tokens = estimate(request)
            requests += 1
            input_tokens += tokens.input_tokens
            output_tokens += tokens.output_tokens
            cost_usd += highest_cost(prices[request.model], request)
    return Estimate(
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_usd=cost_usd,
        seconds=_least_seconds(config, entries[0], requests, input_tokens),
        unpriced=tuple(_unpriced(entries, prices)) if config.prices else (),
    )


def _unpriced(entries: Sequence[ModelConfig], prices: Mapping[str, Price | None]) -> list[str]:
    names = (entry.name for entry in entries if prices[entry.name] is None and entry.type not in FREE)
    return list(dict.fromkeys(names))


def _least_seconds(config: Config, entry: ModelConfig, requests: int, input_tokens: int) -> float:
    """Answers may turn out short, so the budget of output tokens sets no least time."""
    if entry.type not in KEY_VARIABLES:
        return 0.0
    minutes = 0.0
    if (rate := config.limit(entry, "requests_per_minute")) is not None:
        minutes = max(minutes, (requests - config.limit(entry, "burst")) / rate)
    if (rate := config.limit(entry, "input_tokens_per_minute")) is not None:
        minutes = max(minutes, (input_tokens - rate / 6) / rate)
    return minutes * 60 / MARGIN


def _estimate(expected: Estimate) -> str:
    parts = [
        f"about {expected.input_tokens:,} tokens in",
        f"at most {expected.output_tokens:,} tokens out",
    ]
    if expected.cost_usd:
        parts.append(f"at most {expected.cost_usd:.2f} USD")
    if expected.unpriced:
        parts.append(f"no price for {printable(', '.join(expected.unpriced))}")
    if expected.seconds:
        parts.append(f"at least {_duration(expected.seconds)}")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{hours:.1f} hours"


def without_effect(config: Config) -> Iterator[str]:
    """Legacy keys that are accepted and change nothing."""
    if config.api_delay is not None:
        yield "api_delay has no effect: requests_per_minute sets the pace."
    if config.async_settings.batch_size is not None:
        yield "async_settings.batch_size has no effect: requests are sent as soon as the budget allows."


def _engine(group: Group) -> str:
    entry = group.entries[0]
    details = [entry.dtype if entry.dtype != "auto" else "", entry.device or "", entry.revision or ""]
    listed = ", ".join(detail for detail in details if detail)
    return printable(entry.weights) + (f" ({printable(listed)})" if listed else "")


def _entry(entry: ModelConfig) -> str:
    temperature = "default" if entry.temperature is None else f"{entry.temperature:g}"
    samples = f", {entry.n} samples" if entry.n > 1 else ""
    return f"{printable(entry.name)} at temperature {temperature}{samples}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
