"""What is not meant to be there, in configs, prompts, names and answers: it is refused, or only text."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from fault_server import ANTHROPIC, Call, Response, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hallubench.cli import main
from hallubench.config import Config, load_config
from hallubench.errors import InputError
from hallubench.generate import prepare, run
from hallubench.legacy import export_json
from hallubench.prompts import PromptFile
from hallubench.providers import echo
from hallubench.store import scan

ESCAPES = "\x1b[2J\x1b]8;;https://evil.example\x07click\x1b]8;;\x07\x1b]52;c;ZXZpbA==\x07\x9b31m\r\b\a\x7f"
MARKUP = "[bold red]100%[/] {0} %s %(name)s {name!r} \u202egnp.exe\u2066"
NAMES = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "model=evil/..",
    "CON",
    "%2e%2e%2f",
    "x" * 300,
    "y" * 5000,
    "a\nb\0c",
    "Case",
    "case",
    "\U0001f41b\u202e",
    ESCAPES,
    MARKUP,
]

EVERY_KEY = {
    "description": "d",
    "prompts_file": "prompts.jsonl",
    "output_dir": "out",
    "num_prompts": 2,
    "seed": 42,
    "max_retries": 3,
    "requests_per_minute": 60,
    "burst": 10,
    "async_settings": {"max_concurrency": 4, "batch_size": 2},
    "prices": {"m": {"input": 1.0, "output": 2.5}},
    "models": [
        {"name": "m", "type": "echo", "temperature": 0.5, "n": 2, "stop": ["x"], "engine": {"delay": 0.0}},
        {
            "name": "c",
            "type": "claude",
            "max_tokens": 5,
            "api_key": "sk-0123456789",
            "options": {"thinking": {}},
        },
        {"name": "l", "type": "local", "top_p": 0.5, "top_k": 4, "logprobs": 5, "dtype": "float32"},
    ],
}


# Configs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "prompts.jsonl").write_text('{"id": "a", "prompt": "One?"}\n{"id": "b", "prompt": "Two?"}\n')
    return folder


def is_a_plan_or_an_error(path: Path) -> None:
    problem: Exception | None = None
    try:
        config = load_config(path, missing_env="keep")
        prepare(config)[1].survey()
    except InputError as error:
        problem = error
    assert problem is None or str(problem).isprintable()


odd_numbers = st.sampled_from(
    [10**400, -(2**63), 2**63, 2**31, 1e308, -0.0, float("nan"), float("inf"), True]
)
odd_texts = st.text(max_size=20) | st.sampled_from(
    ["\0", "\ud800", "\ufeff", "a\r\nb", "${HOME}", "${", *NAMES]
)
odd_values = st.recursive(
    st.none() | odd_numbers | odd_texts | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A config with every kind of key, one or two of whose values, at any depth, are something else."""
    config = json.loads(json.dumps(EVERY_KEY))
    for _ in range(draw(st.integers(1, 2))):
        place: Any = config
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            match draw(st.sampled_from(["change", "remove", "add"])):
                case "change":
                    place[key] = draw(odd_values)
                case "remove":
                    del place[key]
                case "add" if isinstance(place, dict):
                    place[draw(odd_texts)] = draw(odd_values)
                case _:
                    place.append(draw(odd_values))
            break
    return config


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_any_config_is_a_plan_or_a_one_line_error(folder: Path, config: Any) -> None:
    path = folder / "config.json"
    config = {"prompts_file": str(folder / "prompts.jsonl")} | config
    path.write_text(json.dumps(config))
    is_a_plan_or_an_error(path)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8", errors="replace")
    is_a_plan_or_an_error(path)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["json", "yaml", "toml"]), st.binary(max_size=40), st.integers(0, 400))
def test_a_config_with_any_bytes_in_it_is_a_plan_or_a_one_line_error(
    folder: Path, extension: str, noise: bytes, place: int
) -> None:
    whole = (
        b'seed = 1\n[[models]]\nname = "m"\ntype = "echo"\n'
        if extension == "toml"
        else json.dumps(EVERY_KEY).encode()
    )
    path = folder / f"noise.{extension}"
    path.write_bytes(whole[:place] + noise + whole[place:])
    is_a_plan_or_an_error(path)


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bomb.yaml", f"{bomb(30)}\nmodels: *a29", "its aliases stand for too much"),
        ("cycle.yaml", "models: [{name: m, type: echo, engine: &e {again: *e}}]", "or for themselves"),
        (
            "tag.yaml",
            'models: !!python/object/apply:os.system ["touch pwned"]',
            "line 1: could not determine",
        ),
        ("deep.json", '{"models": ' + "[" * 100_000, "nested too deeply"),
        ("deep.yaml", "models: " + "[" * 5_000, "nested too deeply"),
        ("deep.toml", "models = " + "[" * 100_000, "nested too deeply"),
        ("digits.json", '{"seed": ' + "9" * 5_000 + "}", "a number has too many digits"),
        ("digits.yaml", "seed: " + "9" * 5_000, "a number has too many digits"),
        ("huge.json", '{"seed": 1e400}', "seed: inf is not a usable number"),
        ("endless.yaml", "models: [{name: m, type: echo, n: 2000000000}]", "models[0].n: "),
        ("half.json", '{"models": [{"name": "\\ud800", "type": "echo"}]}', "models[0].name: "),
        ("utf16.json", "\ufffe{}".encode("utf-16").decode("latin-1"), "config"),
    ],
)
def test_a_config_that_would_harm_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    result = CliRunner().invoke(main, ["generate", "--dry-run", "--config", str(path)])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [found.name for found in tmp_path.iterdir()] == [name]


# Prompts


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
).filter(lambda text: not text.isspace()) | st.sampled_from([ESCAPES, MARKUP])
own_fields = st.fixed_dictionaries(
    {},
    optional={
        "category": texts,
        "is_synthetic_probe": st.booleans(),
        "gold_label": json_values,
        "gold_refs": st.lists(texts, max_size=3),
        "original_id": texts,
        "further": json_values,
    },
)
prompts = st.lists(st.tuples(texts, texts, own_fields), min_size=1, max_size=5, unique_by=lambda one: one[0])


@settings(max_examples=25, deadline=None)
@given(prompts)
def test_every_accepted_prompt_is_in_the_store_as_it_was_and_exported_as_strict_json(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str, dict[str, Any]]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("survives")
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": id_, "prompt": text} | fields for id_, text, fields in entries]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"prompts_file": str(path), "output_dir": str(tmp_path / "out")}
    output = run(Config.model_validate(config | {"models": [{"name": MARKUP, "type": "echo"}]})).output
    rows = {row["prompt_id"]: row for row in scan(output).collect().iter_rows(named=True)}
    assert rows.keys() == {prompt.id for prompt in PromptFile(path)}
    for prompt in PromptFile(path):
        row = rows[prompt.id]
        assert (row["prompt"], row["prompt_category"]) == (prompt.text, prompt.category)
        assert (row["is_synthetic_probe"], row["original_id"]) == (
            prompt.is_synthetic_probe,
            prompt.original_id,
        )
        assert (row["gold_refs"] and tuple(row["gold_refs"])) == (prompt.gold_refs or row["gold_refs"])
        assert (row["gold_label"] and json.loads(row["gold_label"])) == prompt.gold_label
        assert json.loads(row["prompt_extra"] or "{}") == prompt.extra
    from datetime import UTC, datetime

    for file in export_json(output, layout="flat", now=datetime.now(UTC)):
        json.loads(file.read_text(), parse_constant=pytest.fail)


# Names and answers


@pytest.fixture
def hostile_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo, "WORDS", [f"{ESCAPES}{MARKUP}{number}" for number in range(256)])


def hostile_config(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    lines = [
        {"id": f"{ESCAPES}{n}", "prompt": f"{MARKUP}{ESCAPES}{n}", "category": ESCAPES, "original_id": "=1+1"}
        for n in range(3)
    ]
    (inner / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = [{"name": name, "type": "echo", "logprobs": 2} for name in NAMES]
    models[0]["engine"] = {"error_rate": 1.0}
    config = {
        "prompts_file": str(inner / "prompts.jsonl"),
        "output_dir": str(inner / "out"),
        "models": models,
    }
    (inner / "config.json").write_text(json.dumps(config))
    return inner / "config.json"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("hostile_words")
def test_no_name_leads_out_of_the_folder_and_no_text_reaches_the_screen_as_it_is(tmp_path: Path) -> None:
    config = hostile_config(tmp_path)
    output = tmp_path / "inner" / "out"
    for arguments in (
        ["generate", "--dry-run", "--config", config],
        ["validate", "--config", config],
        ["generate", "--config", config],
        ["generate", "--config", config],
        ["status", output],
        ["verify", output],
        ["export-json", output],
        ["export-json", output, "--layout", "per-model"],
        ["export-json", output, "--layout", "flat"],
        ["reproduce", output],
        ["reproduce", output, "--models", ESCAPES],
        [
            "import-json",
            *sorted(output.glob("export/pilot_*.json")),
            "--output",
            tmp_path / "inner" / "again",
        ],
        ["status", tmp_path / "inner" / ESCAPES],
    ):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        assert not isinstance(result.exception, Exception), result.exception
        shown = result.output.replace("\n", "")
        assert all(c.isprintable() for c in shown), (arguments, shown)
    assert {path.name for path in tmp_path.iterdir()} == {"inner"}
    assert all(
        path.startswith(("out/", "again/"))
        for path in files(tmp_path / "inner") - {"config.json", "prompts.jsonl"}
    )
    assert set(scan(output).collect()["model"]) == set(NAMES)
    for path in output.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_progress_of_a_terminal_shows_nothing_but_its_own_sequences(tmp_path: Path) -> None:
    config = hostile_config(tmp_path)
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    command = [sys.executable, "-m", "hallubench", "generate", "--config", str(config)]
    with subprocess.Popen(
        command,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=os.environ | {"TERM": "xterm-256color"},
    ) as process:
        os.close(secondary)
        screen = b""
        try:
            while chunk := os.read(primary, 2**16):
                screen += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(primary)
    assert process.returncode == 0
    text = screen.decode()
    assert "Run " in text
    colours_and_cursor = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\??[0-9;]*[AKhlG]")
    left = colours_and_cursor.sub("", text)
    assert all(c.isprintable() or c in "\r\n" for c in left), ascii(left)


def hostile_server(call: Call) -> Response:
    """An answer, an error of one prompt, and one that ends the lane, each as hostile as HTTP can carry."""
    headers = {"request-id": "=cmd|' /C calc'!A0 <script>", "retry-after": "-1e999"}
    if call.prompt.endswith("0"):
        answer = ANTHROPIC.answer(f"{ESCAPES}{MARKUP}", call.body)
        assert isinstance(answer, dict)
        return Response(answer | {"model": ESCAPES, "stop_reason": MARKUP}, headers=headers)
    status, kind = (400, "invalid_request_error") if call.prompt.endswith("1") else (401, ESCAPES)
    problem = {"type": kind, "message": f"{ESCAPES}\n{MARKUP}\nTraceback"}
    return Response({"type": "error", "error": problem}, status=status, headers=headers)


@pytest.mark.slow
def test_what_a_server_says_is_only_text(tmp_path: Path) -> None:
    prompts_file = tmp_path / "prompts.jsonl"
    prompts_file.write_text("".join(f'{{"id": "p{n}", "prompt": "Question {n}"}}\n' for n in range(3)))
    model = {"name": "claude-sonnet-4-5", "type": "claude", "api_key": "sk-0123456789", "max_concurrency": 1}
    config = {"prompts_file": str(prompts_file), "output_dir": str(tmp_path / "out")}
    with serving(ANTHROPIC, hostile_server) as server:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config | {"models": [model | {"base_url": server.url}]}))
        done = subprocess.run(
            [sys.executable, "-m", "hallubench", "generate", "--config", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    shown = (done.stdout + done.stderr).replace("\n", "")
    assert shown.isprintable(), ascii(shown)
    assert "Traceback (most recent" not in shown
    rows = scan(tmp_path / "out").sort("prompt_id").collect()
    assert rows["prompt_id"].to_list() == ["p0", "p1"]
    assert rows["full_response"].to_list() == [f"{ESCAPES}{MARKUP}", None]
    assert rows["provider_finish_reason"][0] == MARKUP
    (log,) = (tmp_path / "out" / "_runs").glob("*.attempts.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 400, 401]
    for arguments in (["status"], ["verify"], ["export-json"]):
        result = CliRunner().invoke(main, [*arguments, str(tmp_path / "out")])
        assert result.exit_code == 0, result.output
        assert result.output.replace("\n", "").isprintable()


def a_file(path: Path) -> None:
    path.write_text("x")


def a_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [a_file, a_loop])
def test_an_output_that_can_be_no_folder_is_refused(
    folder: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    output = tmp_path / "odd \n name"
    make(output)
    refused(folder, tmp_path, output)


@pytest.mark.parametrize("output", ["/dev/null", "/dev/full", "x/" * 2500, "n" * 5000, "nul\0"])
def test_an_output_with_an_impossible_name_is_refused(folder: Path, tmp_path: Path, output: str) -> None:
    refused(folder, tmp_path, Path(output))


def refused(folder: Path, tmp_path: Path, output: Path) -> None:
    models = [{"name": "m", "type": "echo"}]
    config = {"prompts_file": str(folder / "prompts.jsonl"), "output_dir": str(output), "models": models}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(main, ["generate", "--config", str(tmp_path / "config.json")])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.rstrip().isprintable()


@pytest.mark.parametrize("name", ["with space", "-leading-dash", "ünïcödé \U0001f41b", "new\nline"])
def test_an_odd_name_is_a_name(folder: Path, tmp_path: Path, name: str) -> None:
    prompts_file = tmp_path / f"{name}.jsonl"
    prompts_file.write_bytes((folder / "prompts.jsonl").read_bytes())
    models = [{"name": name, "type": "echo"}]
    config = {"prompts_file": str(prompts_file), "output_dir": str(tmp_path / name), "models": models}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "hallubench", "generate", "--config", str(tmp_path / "config.json")],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert scan(tmp_path / name).collect()["model"].to_list() == [name, name]
