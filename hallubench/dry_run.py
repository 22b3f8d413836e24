"""What `generate --dry-run` prints: the plan, and what of it is answered already."""

from __future__ import annotations

from collections.abc import Iterator

from hallubench.config import Config, ModelConfig, missing_variables
from hallubench.generate import prepare
from hallubench.plan import Group
from hallubench.store import answered_ids
from hallubench.text import printable


def plan_lines(config: Config, *, fresh: bool = False) -> Iterator[str]:
    """The plan of a config, line by line: lanes, engines to load, requests of each entry.

    Raises:
        InputError: the config or its prompts cannot be asked.
    """
    output, plan = prepare(config)
    survey = plan.survey(frozenset() if fresh else answered_ids(output))
    pending = {id(entry): count for entry, count in zip(config.models, survey.pending, strict=True)}
    for name in missing_variables(config):
        yield f"Warning: the environment variable {name} is not set; a run will need it."
    for warning in without_effect(config):
        yield f"Warning: {warning}"
    yield f"{survey.prompts} prompts from {printable(config.prompts_file)}; answers go to {printable(output)}"
    for lane in plan.lanes:
        local = lane.groups[0].entries[0].type == "local"
        yield f"lane {lane.name}" + (f": {_count(len(lane.groups), 'engine')} to load" if local else "")
        for group in lane.groups:
            if local:
                yield f"  engine {_engine(group)}"
            for entry in group.entries:
                requests, to_ask = survey.prompts * entry.n, pending[id(entry)]
                counts = f"{_count(requests, 'request')}, {requests - to_ask} answered, {to_ask} to ask"
                yield f"    {_entry(entry)}: {counts}"
    total = sum(survey.pending)
    yield f"In all {_count(survey.requests, 'request')}: {survey.requests - total} answered, {total} to ask."


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
