"""Batch inference for hallucination research: every answer with its log-probabilities, in Parquet.

config = hallubench.load_config("config.yaml")
result = hallubench.run(config)
answers = hallubench.scan(result.output)  # a polars.LazyFrame
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hallubench.config import Config as Config
    from hallubench.config import ModelConfig as ModelConfig
    from hallubench.config import load_config as load_config
    from hallubench.errors import HallubenchError as HallubenchError
    from hallubench.generate import Result as Result
    from hallubench.generate import run as run
    from hallubench.store import scan as scan
    from hallubench.types import Completion as Completion
    from hallubench.types import Logprobs as Logprobs
    from hallubench.types import Prompt as Prompt
    from hallubench.types import Request as Request
    from hallubench.types import SamplingParams as SamplingParams
    from hallubench.types import Usage as Usage

_HOME = {
    "load_config": "config",
    "Config": "config",
    "ModelConfig": "config",
    "run": "generate",
    "Result": "generate",
    "scan": "store",
    "HallubenchError": "errors",
    **dict.fromkeys(
        ("Prompt", "SamplingParams", "Request", "Usage", "Logprobs", "Completion"),
        "types",
    ),
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Imported when first used: `hallubench --help` must not wait for polars.
    if name not in _HOME:
        raise AttributeError(f"module 'hallubench' has no attribute {name!r}")
    return getattr(import_module(f"hallubench.{_HOME[name]}"), name)
