from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from hallubench.cli import main
from hallubench.store import Store, scan

CLI = [sys.executable, "-m", "hallubench"]
HOSTILE = "\x1b]0;owned\x07\x1b[31m[red]\u202e\u2066\x9b2J"
"""Sets a window title, a colour and a direction; what it says is also rich's markup."""


@pytest.fixture(autouse=True)
def _keep_the_handler_of_sigterm() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def entry(name: str = "echo-a", **keys: Any) -> dict[str, Any]:
    return {"name": name, "type": "echo", "temperature": 0} | keys


def write_config(folder: Path, *entries: dict[str, Any], prompts: int = 4, **keys: Any) -> Path:
    """A config and its prompts; returns its path."""
    file = folder / "prompts.json"
    file.write_text(json.dumps([{"id": f"p{i}", "prompt": f"Is claim {i} true?"} for i in range(prompts)]))
    settings = {"prompts_file": str(file), "output_dir": str(folder / "out"), "models": entries or (entry(),)}
    path = folder / "config.json"
    path.write_text(json.dumps(settings | keys))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answers(folder: Path) -> dict[str, str]:
    rows = scan(folder).filter(pl.col("error").is_null()).select("request_id", "full_response").collect()
    return dict(rows.iter_rows())


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [*CLI, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def wait_for_a_part(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob("model=*/*.parquet")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_refused(result: Result, message: str) -> None:
    """Exit code 2, one line, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, hallubench.cli as c; c.main(['generate', '--help'], standalone_mode=False);"
        "print(*({'polars', 'pyarrow', 'pydantic', 'rich', 'torch', 'vllm', 'yaml'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("Usage:")
    assert output.endswith("\n\n")


def test_a_finished_run_says_so_and_imports_no_engine(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert invoke("generate", "--config", config).exit_code == 0
    code = (
        f"import sys, hallubench.cli as c; c.main(['generate', '--config', {str(config)!r}],"
        "standalone_mode=False); print(*({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == f"Nothing left to ask: all 4 requests are answered in {tmp_path / 'out'}.\n\n"


def test_a_killed_run_that_goes_on_gives_the_answers_of_one_left_alone(tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    write_config(tmp_path, entry(), entry(temperature=1, n=2), prompts=60)
    assert invoke("generate", "--config", tmp_path / "config.json", "--output", alone).exit_code == 0
    slow: dict[str, Any] = {"engine": {"delay": 0.02}}
    config = write_config(tmp_path, entry(**slow), entry(temperature=1, n=2, **slow), prompts=60)
    process = start("generate", "--config", config, "--output", killed)
    wait_for_a_part(killed, process)
    process.kill()
    process.communicate()
    flushed = answers(killed)
    assert 0 < len(flushed) < 180
    write_config(tmp_path, entry(), entry(temperature=1, n=2), prompts=60)
    result = invoke("generate", "--config", config, "--output", killed)
    assert result.exit_code == 0
    assert f": {180 - len(flushed)} answered, 0 failed, 0 pending, {len(flushed)} answered" in result.stdout
    assert answers(killed) == answers(alone)
    assert flushed.items() <= answers(killed).items()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_cleanly_and_prints_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config = write_config(tmp_path, entry(engine={"delay": 0.05}), prompts=2000)
    process = start("generate", "--config", config, "--fresh")
    wait_for_a_part(tmp_path / "out", process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert stderr.endswith(f"\n  hallubench generate --config {config}\n")
    told = re.search(r"(\d+) answered, 0 failed, (\d+) pending", stdout)
    assert told is not None
    assert int(told[1]) == len(answers(tmp_path / "out")) > 0
    assert int(told[1]) + int(told[2]) == 2000


def test_an_interrupt_before_the_first_request_ends_like_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hallubench.generate.answered_ids", interrupted)
    result = invoke("generate", "--config", write_config(tmp_path))
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted. To go on")


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, entry(logprobs=20), prompts=1500)

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start("generate", "--config", config, preexec_fn=small_files)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert "model=echo-a: cannot be written: File too large; make room, then run again" in stderr
    assert not list((tmp_path / "out").rglob("*.writing"))
    assert invoke("generate", "--config", config).exit_code == 0
    assert len(answers(tmp_path / "out")) == 1500


def test_a_lane_that_dies_ends_with_code_1_and_the_command_that_goes_on(tmp_path: Path) -> None:
    dying = entry("dying", api_key="1", engine={"die_after": 1})
    result = invoke("generate", "--config", write_config(tmp_path, dying, entry("living", api_key="2")))
    assert result.exit_code == 1
    assert "5 answered, 0 failed, 3 pending, 0 answered before" in result.stdout
    assert "Error: echo: echo died after 1 answers" in result.stderr
    assert "then run again:" in result.stderr


def test_models_are_chosen_by_a_glob(tmp_path: Path) -> None:
    config = write_config(tmp_path, entry("Qwen/a"), entry("Qwen/b"), entry("Other"))
    assert invoke("generate", "--config", config, "--models", "Qwen/*", "--num-prompts", 1).exit_code == 0
    assert sorted(scan(tmp_path / "out").collect()["model"]) == ["Qwen/a", "Qwen/b"]
    assert_refused(invoke("generate", "--config", config, "--models", "none*"), "there are: Qwen/a, Qwen/b")


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    result = invoke("generate", "--config", config, "--dry-run")
    assert result.exit_code == 0
    assert "4 requests, 0 answered, 4 to ask" in result.stdout
    assert not (tmp_path / "out").exists()


def test_resume_and_fresh_contradict_each_other(tmp_path: Path) -> None:
    result = invoke("generate", "--config", write_config(tmp_path), "--resume", "--fresh")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such config file"),
        ("{", "config.json, line 1, column 2"),
        ("[]", "must be a mapping"),
        ('{"models": []}', "models: is empty"),
        ('{"models": [{"name": "a", "type": "echo", "temprature": 0}]}', "did you mean `temperature`?"),
        ('{"models": [{"name": "a", "type": "ecko"}], "prompts_file": "p", "output_dir": "o"}', "'ecko'"),
        ('{"models": [{"name": "a", "type": "echo"}]}', "set `prompts_file`"),
    ],
)
def test_a_wrong_config_is_one_line_and_code_2(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert_refused(invoke("generate", "--config", path), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ('{"id": "a", "prompt": "x"}\nnot json\n', "line 2"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "line 2"),
        ('{"id": "a", "prompt": ""}\n', "line 1"),
        ('{"id": "a", "prompt": 3}\n', "line 1"),
        ("", "holds no prompts"),
    ],
)
def test_wrong_prompts_are_one_line_and_nothing_is_written(
    tmp_path: Path, content: str | None, message: str
) -> None:
    prompts = tmp_path / "mine.jsonl"
    if content is not None:
        prompts.write_text(content)
    result = invoke("generate", "--config", write_config(tmp_path), "--prompts", prompts)
    assert_refused(result, message)
    assert "mine.jsonl" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("config.json", "config.json: is a file"),
        ("config.json/sub", "cannot be written: Not a directory; choose another output folder"),
        ("/proc/nothing", "cannot be written: No such file or directory; choose another output folder"),
        ("x" * 300, "File name too long; choose another output folder"),
        ("a\0b", "cannot be written: embedded null byte; choose another output folder"),
    ],
)
def test_an_output_folder_that_cannot_be_is_one_line_and_code_2(
    tmp_path: Path, output: str, message: str
) -> None:
    config = write_config(tmp_path, output_dir=str(tmp_path / output))
    before = config.read_bytes()
    assert_refused(invoke("generate", "--config", config), message)
    assert config.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "prompts.json"}


def test_a_folder_that_another_run_writes_is_refused_with_its_process(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with Store(tmp_path / "out", "other"):
        assert_refused(invoke("generate", "--config", config), f"(process {os.getpid()}) is writing it")


def test_a_model_that_is_not_there_is_refused_with_the_hub_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hallubench.checks.find_spec", lambda _: object())
    for name in ("./no-such-folder", "hallubench-tests/no-such-model", "x" * 300):
        config = write_config(tmp_path, {"name": name, "type": "local"})
        assert_refused(invoke("generate", "--config", config), f"no folder {name[:200].removeprefix('./')}")
    assert not (tmp_path / "out").exists()


def test_cuda_without_a_gpu_is_refused_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hallubench.checks.gpus", list)
    monkeypatch.setattr("hallubench.checks.find_spec", lambda _: object())
    config = write_config(tmp_path, {"name": "m", "type": "local", "device": "cuda"})
    assert_refused(invoke("generate", "--config", config), "write `device: cpu`")
    assert not (tmp_path / "out").exists()


def test_hostile_text_reaches_the_output_only_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hallubench.providers.echo.WORDS", [HOSTILE] * 256)
    hostile = entry(HOSTILE, engine={"error_rate": 0.5})
    config = write_config(tmp_path, hostile, prompts=8, output_dir=str(tmp_path / HOSTILE))
    prompts = [{"id": f"{HOSTILE}{i}", "prompt": HOSTILE, "category": HOSTILE} for i in range(8)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    output = tmp_path / HOSTILE
    commands: list[tuple[object, ...]] = [
        ("generate", "--config", config, "--dry-run"),
        ("generate", "--config", config),
        ("status", output),
        ("validate", "--config", config),
        ("generate", "--config", config, "--num-prompts", 1),
        ("generate", "--config", config, "--prompts", HOSTILE),
        ("generate", "--config", config, "--models", "other"),
        ("generate", "--config", tmp_path / f"{HOSTILE}.json"),
        ("status", tmp_path / f"{HOSTILE}-none"),
        ("export-json", output),
    ]
    for command in commands:
        result = invoke(*command)
        shown = result.output
        assert "owned" in shown, command
        assert not {c for c in shown if not c.isprintable()} - {"\n"}, (command, shown)


def test_validate_says_a_line_for_each_check_and_fails_with_code_1(tmp_path: Path) -> None:
    good = invoke("validate", "--config", write_config(tmp_path))
    assert good.exit_code == 0
    assert [line[:4] for line in good.stdout.splitlines()] == ["ok  ", "ok  "]
    (tmp_path / "prompts.json").unlink()
    bad = invoke("validate", "--config", tmp_path / "config.json")
    assert bad.exit_code == 1
    assert bad.stdout.startswith("FAIL  prompts: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["status", "export-json"])
def test_a_folder_without_answers_is_refused(tmp_path: Path, command: str) -> None:
    assert_refused(invoke(command, tmp_path), "holds no answers of hallubench")
    assert_refused(invoke(command, tmp_path / "none"), "no such folder")
