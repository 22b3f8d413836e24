"""The names of vLLM's engine arguments, without importing vLLM, which would take many seconds."""

from __future__ import annotations

import ast
import difflib
from importlib.util import find_spec
from pathlib import Path

from hallubench.config import ModelConfig
from hallubench.errors import ConfigError
from hallubench.text import printable


def check_engine_arguments(entry: ModelConfig, where: str) -> None:
    """Refuse what vLLM has no argument for. Where vLLM is not installed, nothing is known and all may pass.

    Raises:
        ConfigError: a key of the entry's `engine` block is none of vLLM's.
    """
    if entry.type != "local" or not entry.engine or not (names := engine_arguments()):
        return
    for key in entry.engine:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{where}.engine.{printable(key)}: no vLLM engine argument; did you mean `{near}`?"
            )


def engine_arguments() -> frozenset[str]:
    """The fields of vLLM's `EngineArgs`, read out of its source; empty where vLLM is not installed."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py")
    if not source.is_file():
        return frozenset()
    classes = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef))
    fields = next((node.body for node in classes if node.name == "EngineArgs"), [])
    return frozenset(
        field.target.id
        for field in fields
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
