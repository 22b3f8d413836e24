"""A prompt and its answers in the terminal, each token coloured by its probability.

What prompts and answers hold is shown and never obeyed: neither markup nor control characters. The colours
say nothing that the list of the least probable tokens does not say as well: without a terminal, or with
NO_COLOR set, there are none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import polars as pl
from rich.console import Console
from rich.text import Text

from hallubench.errors import InputError
from hallubench.store import scan
from hallubench.text import printable

SCALE = (
    (0.9, ""),
    (0.5, "black on #ffffb2"),
    (0.2, "black on #fecc5c"),
    (0.05, "black on #fd8d3c"),
    (0.0, "white on #bd0026"),
)
"""The least probability of each step, and its style: yellow to red, and dark enough to tell without hue."""
LISTED_TOKENS = 5
LISTED_ALTERNATIVES = 5
COMPARED_IDS = 10_000
"""Ids that an unknown one is compared with: its neighbours in alphabetical order."""

QUESTION = ("prompt", "messages", "prompt_category", "is_synthetic_probe", "gold_label")
ORDER = ("model", "temperature", "sample_index", "request_id")
COLUMNS = (
    *ORDER,
    *QUESTION,
    "system_prompt",
    "reasoning",
    "full_response",
    "finish_reason",
    "error",
    "error_type",
    "input_tokens",
    "output_tokens",
    "elapsed_seconds",
    "cost_usd",
    "output_token_texts",
    "output_logprobs",
    "output_top_tokens",
    "output_top_logprobs",
)

Row: TypeAlias = Mapping[str, Any]
"""A row of the store, with `COLUMNS`."""


def show(folder: Path, prompt_id: str, *, model: str = "*", sample: int | None = None) -> None:
    """Print a prompt and its answers, by model, temperature and sample, on standard output.

    Args:
        folder: of the store.
        prompt_id: which prompt.
        model: a glob; only models whose name matches.
        sample: only this sample, from 0.

    Raises:
        StoreError: there is no store in the folder.
        InputError: it has no such prompt, or no such answer to it.
    """
    # Without a colour system rich writes no escape codes at all.
    colors: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    console = Console(color_system=colors, soft_wrap=True)
    rows = _read(folder, prompt_id, model, sample)
    asked: list[Any] = []
    for row in rows:
        question = [row[name] for name in QUESTION]
        if question != asked:  # one id can stand for several prompts: files are edited between runs
            asked = question
            console.print(_question(prompt_id, row))
        console.print(_answer(row))
    if console.color_system is not None and any(row["output_logprobs"] for row in rows):
        console.print(_legend())


def pieces_of(response: str, tokens: Sequence[str]) -> list[str] | None:
    """What each token is of a response, "" if it is not in it; None if the tokens do not make the response.

    Around it there may be more: white space that the tokenizer put before it, an end token or stop text
    after it. A token that is part of a character has no text of its own, and then they do not make it.
    """
    written = "".join(tokens)
    start = written.find(response)
    if start < 0 or written[:start].strip():
        return None
    ends = [min(max(end - start, 0), len(response)) for end in accumulate(map(len, tokens), initial=0)]
    return [response[begin:end] for begin, end in pairwise(ends)]


def style_of(logprob: float | None) -> str:
    """The style of a token with this log-probability."""
    probability = 1.0 if logprob is None else math.exp(logprob)
    return next(style for least, style in SCALE if probability >= least)


def _read(folder: Path, prompt_id: str, model: str, sample: int | None) -> Sequence[Row]:
    answers = scan(folder)
    found = answers.filter(prompt_id=prompt_id).select(COLUMNS).sort(ORDER).collect(engine="streaming")
    if found.is_empty():
        ids = answers.select(pl.col("prompt_id").unique().sort()).collect(engine="streaming")["prompt_id"]
        raise InputError(f"{printable(folder)}: no prompt {printable(prompt_id)}; {_near(prompt_id, ids)}")
    rows = [
        row
        for row in found.iter_rows(named=True)
        if fnmatchcase(row["model"], model) and sample in (None, row["sample_index"])
    ]
    if not rows:
        counts = found.group_by("model", maintain_order=True).agg(pl.col("sample_index").max()).iter_rows()
        there = ", ".join(f"{printable(name)} up to sample {last}" for name, last in counts)
        raise InputError(
            f"{printable(folder)}: no such answer to {printable(prompt_id)}; choose among {there}"
        )
    return rows


def _near(prompt_id: str, ids: pl.Series) -> str:
    """Which ids an unknown one may have been meant for."""
    place = int(ids.search_sorted(prompt_id))
    neighbours = ids.slice(max(0, place - COMPARED_IDS // 2), COMPARED_IDS).to_list()
    near = get_close_matches(prompt_id, neighbours, cutoff=0.0)
    return f"did you mean {' or '.join(map(printable, near))}?" if near else "the store has no prompts yet"


# What is shown of a row.


def _question(prompt_id: str, row: Row) -> Text:
    text = Text()
    text.append(f"prompt {printable(prompt_id)}", "bold")
    facts = [row["prompt_category"], "synthetic probe" if row["is_synthetic_probe"] else None]
    text.append("".join(f", {printable(fact)}" for fact in facts if fact) + "\n")
    if row["gold_label"] is not None:
        text.append(f"gold label: {printable(row['gold_label'], longest=2000)}\n")
    text.append("\n")
    for turn in row["messages"] or ():
        text.append(f"{printable(turn['role'])}: ", "bold")
        text.append(f"{_shown(turn['content'])}\n")
    if row["messages"] is None:
        text.append(f"{_shown(row['prompt'] or '(the store does not have its text)')}\n")
    return text


def _answer(row: Row) -> Text:
    text = Text()
    text.append(f"{printable(row['model'])}", "bold")
    text.append(f"{', '.join(_settings(row))}\n{', '.join(_facts(row))}\n\n")
    for name in ("system_prompt", "reasoning"):
        if row[name]:
            text.append(f"{name.replace('_', ' ')}: ", "bold")
            text.append(f"{_shown(row[name])}\n\n")
    if row["error"] is not None:
        text.append(f"failed with {printable(row['error_type'])}: {_shown(row['error'])}\n")
    elif row["output_logprobs"]:
        _append_tokens(text, row)
    else:
        text.append(f"{_shown(row['full_response']) or '(an empty answer)'}\n")
    return text


def _settings(row: Row) -> Iterator[str]:
    yield ""
    if row["temperature"] is not None:
        yield f"temperature {row['temperature']:g}"
    yield f"sample {row['sample_index']}"
    yield f"request {row['request_id']}"


def _facts(row: Row) -> Iterator[str]:
    yield f"finish_reason {row['finish_reason']}"
    if row["input_tokens"] is not None:
        yield f"{row['input_tokens']} tokens in"
    if row["output_tokens"] is not None:
        yield f"{row['output_tokens']} out"
    if row["elapsed_seconds"] is not None:
        yield f"{row['elapsed_seconds']:.2f} s"
    if row["cost_usd"] is not None:
        yield f"{row['cost_usd']:.6f} USD"


def _append_tokens(text: Text, row: Row) -> None:
    """The answer in colours, and its least probable tokens with their alternatives."""
    response, tokens, logprobs = row["full_response"], row["output_token_texts"], row["output_logprobs"]
    pieces = pieces_of(response, tokens)
    if pieces is None:
        text.append(f"{_shown(response)}\n\n")
        text.append("its tokens, which put together are another text:\n", "bold")
        pieces = tokens
    elif not response:
        text.append("(an empty answer)")
    for piece, logprob in zip(pieces, logprobs, strict=True):
        text.append(_shown(piece), style_of(logprob))
    text.append("\n\n")
    text.append("least probable tokens:\n", "bold")
    known = [place for place, logprob in enumerate(logprobs) if logprob is not None]
    for place in sorted(known, key=lambda place: float(logprobs[place]))[:LISTED_TOKENS]:
        text.append(f"{place + 1:>5}.  ")
        text.append(_token(tokens[place], logprobs[place]), style_of(logprobs[place]))
        tops = zip(row["output_top_tokens"][place], row["output_top_logprobs"][place], strict=True)
        likely = [_token(token, logprob) for token, logprob in tops][:LISTED_ALTERNATIVES]
        text.append(f"  likely: {' '.join(likely)}\n" if likely else "\n")


def _token(token: str, logprob: float | None) -> str:
    return f"'{printable(token)}' {'-' if logprob is None else f'{math.exp(logprob):.3f}'}"


def _legend() -> Text:
    text = Text("token probability: ")
    for least, style in SCALE:
        text.append(f" from {least:g} ", style)
        text.append(" ")
    return text


def _shown(text: str) -> str:
    """As `printable`, at any length and on as many lines as it has."""
    return "\n".join(printable(line, longest=len(line)) for line in text.split("\n"))
