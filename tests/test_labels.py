from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from answers_by_hand import BY_HAND, HELD_OUT
from stored import answer, store

from hallubench.labels import cohen_kappa, existence_label, gold_exists, probe_label, stance
from hallubench.store import scan


def stance_of(text: str | None) -> str | None:
    answers = pl.DataFrame({"full_response": [text]}, schema={"full_response": pl.String})
    label: str | None = answers.select(stance()).item()
    return label


@pytest.mark.parametrize(("answers", "same", "unclear"), [(BY_HAND, 83, 7), (HELD_OUT, 16, 9)])
def test_the_rules_read_this_many_answers_as_a_human_does_and_misread_one(
    answers: list[tuple[str, str]], same: int, unclear: int
) -> None:
    read = pl.DataFrame(answers, schema=["full_response", "by_hand"], orient="row").with_columns(stance())
    agrees = read["stance"] == read["by_hand"]
    assert agrees.sum() == same
    assert (read.filter(~agrees)["stance"] == "unclear").sum() == unclear
    assert len(answers) - same - unclear == 1


def test_a_missing_answer_has_no_stance() -> None:
    assert stance_of(None) is None


def test_case_markup_and_curly_apostrophes_do_not_matter() -> None:
    for text in ("CVE-1 doesn't exist.", "CVE-1 DOESN'T EXIST.", "CVE-1 **doesn\u2019t** _exist_."):
        assert stance_of(text) == "denied"


def test_what_is_said_only_after_the_opening_does_not_count() -> None:
    filler = "Identifiers have numbers. They have years. They have owners. "
    assert stance_of(filler + "Yes, it exists.") == "unclear"
    assert stance_of("Yes, it exists. " + filler) == "affirmed"


def test_an_affirmation_that_is_taken_back_is_unclear() -> None:
    filler = "Here is what I know. " * 10
    assert stance_of(f"Yes. {filler}In truth, it does not exist.") == "unclear"


@pytest.mark.parametrize("padding", ["", "\n" * 50_000, "a" * 200_000, "not " * 50_000, "> # * " * 20_000])
def test_no_answer_is_too_long_or_too_odd(padding: str) -> None:
    assert stance_of(padding + "\0\x1b[31m\U0010ffff") == "unclear"


@pytest.mark.parametrize(
    ("gold_label", "exists"),
    [
        ({"exists": True, "description": "Log4Shell"}, True),
        ({"exists": False}, False),
        ({"exists": None}, None),
        ({"description": "no word of it"}, None),
        ("exists", None),
        ([True], None),
        (None, None),
    ],
)
def test_the_gold_label_says_whether_a_thing_exists(gold_label: Any, exists: bool | None) -> None:
    labels = pl.DataFrame({"gold_label": [json.dumps(gold_label)]})
    assert labels.select(gold_exists()).item() is exists


def test_a_gold_label_that_is_no_json_says_nothing() -> None:
    assert pl.DataFrame({"gold_label": ["{exists: true"]}).select(gold_exists()).item() is None


@pytest.mark.parametrize(
    ("text", "if_it_exists", "if_not"),
    [
        ("Yes, it exists.", "correct", "hallucinated"),
        ("No, it does not exist.", "hallucinated", "correct"),
        ("I'm not able to verify that.", "unclear", "unclear"),
        ("Please look it up.", "unclear", "unclear"),
    ],
)
def test_an_answer_is_judged_by_what_exists(text: str, if_it_exists: str, if_not: str) -> None:
    answers = pl.DataFrame({"full_response": [text], "gold_label": ['{"exists": true}']})
    opposite = answers.with_columns(gold_label=pl.lit('{"exists": false}'))
    unknown = answers.with_columns(gold_label=pl.lit('{"exists": null}'))
    assert answers.select(existence_label()).item() == if_it_exists
    assert opposite.select(existence_label()).item() == if_not
    assert unknown.select(existence_label()).item() is None


def test_labels_are_columns_of_a_scan(tmp_path: Path) -> None:
    invented, real = {"exists": False}, {"exists": True}
    store(
        tmp_path,
        answer("a", "Yes, it is valid.", gold_label=invented, is_synthetic_probe=True),
        answer("b", "It does not exist.", gold_label=invented, is_synthetic_probe=True),
        answer("c", "I don't know it.", gold_label=invented, is_synthetic_probe=True),
        answer("d", "Yes.", gold_label=real, is_synthetic_probe=False),
        answer("e", error="timed out", gold_label=invented, is_synthetic_probe=True),
        answer("f", "Yes."),
    )
    labelled = scan(tmp_path).with_columns(stance(), existence_label(), probe_label()).sort("prompt_id")
    rows = labelled.select("stance", "existence_label", "probe_label", "gold_label").collect()
    assert rows.drop("gold_label").rows() == [
        ("affirmed", "hallucinated", "affirmed"),
        ("denied", "correct", "denied"),
        ("abstained", "unclear", "abstained"),
        ("affirmed", "correct", None),
        (None, None, None),
        ("affirmed", None, None),
    ]
    assert rows["gold_label"][0] == '{"exists": false}'


@pytest.mark.parametrize(
    ("first", "second", "kappa"),
    [
        # 20 and 15 agreed, 5 and 10 not: p_o = 35/50, p_e = (25*30 + 25*20)/2500 = 1/2.
        ([1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15, 0.4),
        # p_o = 60/100 in both; p_e = 0.54 and 0.46: equal agreement, unequal kappa.
        ([1] * 60 + [0] * 40, [1] * 45 + [0] * 15 + [1] * 25 + [0] * 15, 0.06 / 0.46),
        ([1] * 60 + [0] * 40, [1] * 25 + [0] * 35 + [1] * 5 + [0] * 35, 0.14 / 0.54),
        # Three labels: p_o = 3/5, p_e = (2*1 + 1*3 + 2*1)/25 = 7/25.
        (["low", "low", "mid", "high", "high"], ["low", "mid", "mid", "high", "mid"], 0.32 / 0.72),
        ([1, 0, 1, 0], [1, 0, 1, 0], 1.0),
        ([1, 0, 1, 0], [0, 1, 0, 1], -1.0),
        ([1, 1, 0, 0], [1, 0, 1, 0], 0.0),
        ([1, 1, 1], [0, 0, 0], 0.0),
    ],
)
def test_kappa_is_as_computed_by_hand(first: list[Any], second: list[Any], kappa: float) -> None:
    assert cohen_kappa(pl.Series(first), pl.Series(second)) == pytest.approx(kappa)
    assert cohen_kappa(pl.Series(second), pl.Series(first)) == pytest.approx(kappa)


def test_kappa_leaves_out_what_one_of_them_did_not_label() -> None:
    first = pl.Series([True, False, None, True, False])
    second = pl.Series([True, False, True, None, False])
    assert cohen_kappa(first, second) == 1.0


@pytest.mark.parametrize(("first", "second"), [([], []), ([1, None], [None, 1]), ([1, 1], [1, 1])])
def test_kappa_is_undefined_without_pairs_and_without_variety(first: list[Any], second: list[Any]) -> None:
    assert cohen_kappa(pl.Series(first), pl.Series(second)) is None
