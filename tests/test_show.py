from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from stored import CLAUDE, QWEN, answer, logprobs_of, store

from hallubench import load_config, run
from hallubench.cli import main
from hallubench.show import SCALE, pieces_of, style_of
from hallubench.types import Logprobs, Message

HOSTILE = "\x1b]0;owned\x07\x1b[31m[red]\u202e\x9b2J\r[/]\b:smile:"
TERMINAL = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color", "NO_COLOR": None}
PIPE = {"FORCE_COLOR": None, "NO_COLOR": None}
ESCAPE = re.compile(r"\x1b\[([\d;]*)m")
UNSURE = logprobs_of(
    ("Yes", 0.95),
    (", it", 0.6),
    (" ex", 0.3),
    ("ists", 0.1),
    (".", 0.02),
    others=[("No", 0.04), (" \n", 0.001)],
)


def show(*arguments: object, env: Mapping[str, str | None] = PIPE) -> Result:
    return CliRunner(env=env).invoke(main, ["show", *map(str, arguments)])


def shown(*arguments: object, env: Mapping[str, str | None] = PIPE) -> str:
    result = show(*arguments, env=env)
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"Error: {message}\n"


def test_a_prompt_is_shown_with_its_answer_and_its_least_probable_tokens(tmp_path: Path) -> None:
    row = answer(
        text="Yes, it exists.",
        logprobs=UNSURE,
        gold_label={"exists": True},
        is_synthetic_probe=False,
        temperature=0.7,
        sample=2,
        cost_usd=0.00012,
        system_prompt="Be brief.",
        reasoning="Let me see.",
    )
    assert (
        shown(store(tmp_path, row), "p1")
        == f"""\
prompt p1, cve_existence
gold label: {{"exists": true}}

Does CVE-2021-44228 exist?

Qwen/Qwen3-0.6B, temperature 0.7, sample 2, request {row.request.request_id}
finish_reason stop, 42 tokens in, 7 out, 2.35 s, 0.000120 USD

system prompt: Be brief.

reasoning: Let me see.

Yes, it exists.

least probable tokens:
    5.  '.' 0.020  likely: 'No' 0.040 '.' 0.020 ' \\n' 0.001
    4.  'ists' 0.100  likely: 'ists' 0.100 'No' 0.040 ' \\n' 0.001
    3.  ' ex' 0.300  likely: ' ex' 0.300 'No' 0.040 ' \\n' 0.001
    2.  ', it' 0.600  likely: ', it' 0.600 'No' 0.040 ' \\n' 0.001
    1.  'Yes' 0.950  likely: 'Yes' 0.950 'No' 0.040 ' \\n' 0.001

"""
    )


def test_of_many_tokens_the_five_least_probable_are_listed_with_five_alternatives(tmp_path: Path) -> None:
    tokens = [(f"t{n}", 0.5 + n / 100) for n in range(9)]
    others = [(f"o{n}", 0.2 - n / 50) for n in range(7)]
    store(
        tmp_path,
        answer(text="".join(token for token, _ in tokens), logprobs=logprobs_of(*tokens, others=others)),
    )
    listed = [line for line in shown(tmp_path, "p1").splitlines() if "likely" in line]
    assert [line.split("'")[1] for line in listed] == ["t0", "t1", "t2", "t3", "t4"]
    assert all(line.partition("likely:")[2].count("'") == 10 for line in listed)


def test_an_answer_without_log_probabilities_is_plain(tmp_path: Path) -> None:
    text = shown(store(tmp_path, answer(text="No.", finish_reason="length")), "p1", env=TERMINAL)
    assert "\n\nNo.\n" in text
    assert "finish_reason length" in text
    assert "probab" not in text


def test_an_error_and_an_empty_answer_say_so(tmp_path: Path) -> None:
    store(tmp_path, answer(error="took too long"), answer(text="", model=CLAUDE))
    text = shown(tmp_path, "p1")
    assert "failed with timeout: took too long\n" in text
    assert "(an empty answer)\n" in text


def test_answers_are_in_order_under_one_prompt_and_can_be_chosen(tmp_path: Path) -> None:
    rows = [answer(model=CLAUDE, temperature=None)]
    rows += [answer(temperature=0.7, sample=sample) for sample in (1, 0)]
    rows += [answer("p2"), answer()]
    store(tmp_path, *rows)
    headers = [line.split(", request")[0] for line in shown(tmp_path, "p1").splitlines() if "request" in line]
    assert headers == [
        f"{QWEN}, temperature 0, sample 0",
        f"{QWEN}, temperature 0.7, sample 0",
        f"{QWEN}, temperature 0.7, sample 1",
        f"{CLAUDE}, sample 0",
    ]
    assert shown(tmp_path, "p1").count("prompt p1") == 1
    assert CLAUDE not in shown(tmp_path, "p1", "--model", "Qwen/*")
    assert shown(tmp_path, "p1", "--model", "Qwen/*", "--sample", "1").count("request") == 1


def test_a_prompt_that_was_edited_is_shown_in_each_of_its_forms(tmp_path: Path) -> None:
    text = shown(store(tmp_path, answer(prompt="Is it?"), answer(prompt="Is it so?", temperature=1.0)), "p1")
    assert text.count("prompt p1") == 2
    assert text.index("Is it?") < text.index("temperature 0,") < text.index("Is it so?")


def test_a_chat_is_shown_turn_by_turn(tmp_path: Path) -> None:
    turns = (Message("system", "Be brief."), Message("user", "Is it real?\nSay so."))
    assert "\nsystem: Be brief.\nuser: Is it real?\nSay so.\n" in shown(
        store(tmp_path, answer(prompt=turns)), "p1"
    )


def test_colours_follow_the_scale_and_leave_the_text_as_it_is(tmp_path: Path) -> None:
    store(tmp_path, answer(text="Yes, it exists.", logprobs=UNSURE))
    colored = shown(tmp_path, "p1", env=TERMINAL)
    backgrounds = {
        token: rgb for rgb, token in re.findall(r"\x1b\[\d+;48;2;([\d;]+)m([^\x1b]*)\x1b\[0m", colored)
    }
    assert backgrounds[", it"] == "255;255;178"
    assert backgrounds[" ex"] == "254;204;92"
    assert backgrounds["ists"] == "253;141;60"
    assert backgrounds["."] == "189;0;38"
    assert "\n\nYes\x1b[" in colored
    plain, _, legend = ESCAPE.sub("", colored).partition("token probability: ")
    assert plain == shown(tmp_path, "p1")
    assert " ".join(legend.split()) == "from 0.9 from 0.5 from 0.2 from 0.05 from 0"


@pytest.mark.parametrize("env", [PIPE, TERMINAL | {"NO_COLOR": "1"}])
def test_a_pipe_and_no_color_get_no_escape_codes(tmp_path: Path, env: Mapping[str, str | None]) -> None:
    store(tmp_path, answer(text="Yes, it exists.", logprobs=UNSURE))
    assert "\x1b" not in shown(tmp_path, "p1", env=env)


def test_long_lines_are_left_to_the_terminal(tmp_path: Path) -> None:
    line = "word " * 100
    assert line in shown(store(tmp_path, answer(text=line)), "p1")


@pytest.mark.parametrize("env", [PIPE, TERMINAL])
def test_nothing_from_a_store_is_obeyed(tmp_path: Path, env: Mapping[str, str | None]) -> None:
    texts = [("a" + HOSTILE, 0.2), ("\n" + HOSTILE, 0.01)]
    store(
        tmp_path,
        answer(
            HOSTILE,
            "".join(text for text, _ in texts),
            model=HOSTILE,
            prompt=(Message("user", HOSTILE),),
            system_prompt=HOSTILE,
            reasoning=HOSTILE,
            gold_label={HOSTILE: HOSTILE},
            logprobs=logprobs_of(*texts, others=[(HOSTILE, 0.1)]),
        ),
        answer(HOSTILE, error=HOSTILE),
        answer("other"),
    )
    for result in (
        show(tmp_path, HOSTILE, env=env),
        show(tmp_path, HOSTILE + "x", env=env),
        show(tmp_path, "other", "--model", HOSTILE, env=env),
    ):
        text = ESCAPE.sub("", result.output)
        assert all(character.isprintable() or character == "\n" for character in text)
        assert result.exit_code in (0, 2)
    everything = ESCAPE.sub("", shown(tmp_path, HOSTILE, env=env))
    assert everything.count("\\x1b[31m[red]\\u202e") >= 11
    assert everything.count("[/]\\x08:smile:") >= 11
    assert set(ESCAPE.findall(shown(tmp_path, HOSTILE, env=env))) <= {
        "0",
        "1",
        "30;48;2;254;204;92",
        "30;48;2;253;141;60",
        "37;48;2;189;0;38",
        "30;48;2;255;255;178",
    }


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (["Yes", ", it", " is"], ["Yes", ", it", " is"]),
        ([" Yes", ", it", " is"], ["Yes", ", it", " is"]),
        (["\n", "Yes", ", it", " is"], ["", "Yes", ", it", " is"]),
        (["Yes", ", it", " is", "<|im_end|>"], ["Yes", ", it", " is", ""]),
        (["Yes", ", it", " is\n", "STOP", "x"], ["Yes", ", it", " is", "", ""]),
        (["Yes", "", ", it is"], ["Yes", "", ", it is"]),
        (["Yes", ", it", "\ufffd"], None),
        (["Oh. ", "Yes, it is"], None),
        (["Yes"], None),
    ],
)
def test_tokens_are_laid_on_the_response_where_they_make_it(
    tokens: list[str], pieces: list[str] | None
) -> None:
    assert pieces_of("Yes, it is", tokens) == pieces


@given(
    st.text(),
    st.lists(st.integers(0, 20)),
    st.sampled_from(["", "<eos>", " more"]),
    st.sampled_from(["", " \n"]),
)
def test_pieces_always_make_up_the_response(text: str, cuts: list[int], end: str, begin: str) -> None:
    written = begin + text + end
    places = sorted({0, len(written), *(min(cut, len(written)) for cut in cuts)})
    tokens = [written[a:b] for a, b in pairwise(places)]
    pieces = pieces_of(text, tokens)
    assert pieces is not None
    assert "".join(pieces) == text
    assert len(pieces) == len(tokens)
    assert all(piece in token for piece, token in zip(pieces, tokens, strict=True))


def test_tokens_that_are_parts_of_a_character_stand_beside_the_response(tmp_path: Path) -> None:
    logprobs = logprobs_of(("caf", 0.9), ("\ufffd", 0.3), ("\ufffd", 0.9))
    text = shown(store(tmp_path, answer(text="café", logprobs=logprobs)), "p1")
    assert "\n\ncafé\n\nits tokens, which put together are another text:\ncaf\ufffd\ufffd\n" in text


@pytest.mark.parametrize("logprobs", [logprobs_of(("<eos>", 0.4)), logprobs_of()])
def test_an_empty_answer_with_log_probabilities_says_so(tmp_path: Path, logprobs: Logprobs) -> None:
    assert "(an empty answer)\n" in shown(store(tmp_path, answer(text="", logprobs=logprobs)), "p1")


@pytest.mark.parametrize(
    ("logprob", "step"),
    [(0.0, 0), (-0.1, 0), (-0.5, 1), (-1.0, 2), (-2.0, 3), (-5.0, 4), (float("-inf"), 4), (None, 0)],
)
def test_each_probability_has_its_step(logprob: float | None, step: int) -> None:
    assert style_of(logprob) == SCALE[step][1]


def test_an_unknown_prompt_is_refused_with_those_like_it(tmp_path: Path) -> None:
    store(tmp_path, *(answer(f"prompt_{n:04d}") for n in range(20)))
    assert_refused(
        show(tmp_path, "prompt_00012"),
        f"{tmp_path}: no prompt prompt_00012; did you mean prompt_0012 or prompt_0002 or prompt_0001?",
    )


def test_an_answer_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    store(tmp_path, answer(sample=1), answer(sample=4), answer(model=CLAUDE))
    there = f"choose among {QWEN} up to sample 4, {CLAUDE} up to sample 0"
    assert_refused(show(tmp_path, "p1", "--sample", 9), f"{tmp_path}: no such answer to p1; {there}")
    assert_refused(show(tmp_path, "p1", "--model", "gpt*"), f"{tmp_path}: no such answer to p1; {there}")


def test_a_store_without_rows_has_no_prompts(tmp_path: Path) -> None:
    assert_refused(show(store(tmp_path), "p1"), f"{tmp_path}: no prompt p1; the store has no prompts yet")


def test_answers_of_a_real_run_are_shown(tmp_path: Path) -> None:
    """The echo provider's tokens begin with a space that its answers do not have."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": "a", "prompt": "Is it?"}]))
    models = [{"name": "echo-a", "type": "echo", "temperature": 0, "logprobs": 5}]
    config = tmp_path / "config.json"
    out = tmp_path / "out"
    config.write_text(json.dumps({"prompts_file": str(prompts), "output_dir": str(out), "models": models}))
    run(load_config(config))
    text = shown(out, "a")
    assert "another text" not in text
    assert text.count("likely:") == 5
