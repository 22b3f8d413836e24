from __future__ import annotations

import sys
from typing import Any

import pytest

from hallubench.config import ModelConfig
from hallubench.engine_arguments import check_engine_arguments, engine_arguments
from hallubench.errors import ConfigError


def entry(type_: str = "local", **engine: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": "tiny", "type": type_, "engine": engine})


@pytest.fixture
def names() -> frozenset[str]:
    if not (names := engine_arguments()):
        pytest.skip("vLLM is not installed")
    return names


def test_the_names_are_those_of_the_installed_vllm(names: frozenset[str]) -> None:
    assert {"model", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size"} <= names
    assert "vllm" not in sys.modules or len(names) > 50


def test_an_argument_of_vllm_passes(names: frozenset[str]) -> None:
    check_engine_arguments(entry(max_model_len=512), "models[0]")


def test_an_unknown_argument_is_refused_with_the_nearest_one(names: frozenset[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"^models\[2\]\.engine\.gpu_memory_utilisation: .* `gpu_memory_utilization`\?$"
    ):
        check_engine_arguments(entry(gpu_memory_utilisation=0.8), "models[2]")


def test_the_block_of_another_type_is_its_own_affair() -> None:
    check_engine_arguments(entry("echo", delay=1), "models[0]")
