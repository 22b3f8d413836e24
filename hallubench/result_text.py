"""Rows of the store -> the JSON text of legacy results, laid out as `json.dump(..., indent=2)` does.

polars makes the text, column by column: three times as fast as a dict and `json.dumps` for each row,
and its float32 come in the fewest digits that read back the same (-0.123, not -0.12300000339746475).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import polars as pl

from hallubench.schema import valid_text

COLUMNS = (
    "request_id",
    "run_id",
    "prompt_id",
    "prompt_index",
    "sample_index",
    "provider",
    "model",
    "model_version",
    "prompt",
    "messages",
    "system_prompt",
    "full_response",
    "finish_reason",
    "error",
    "error_type",
    "retry_count",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "stop",
    "seed",
    "options",
    "input_tokens",
    "output_tokens",
    "timestamp",
    "elapsed_seconds",
    "prompt_category",
    "is_synthetic_probe",
    "logprobs_mode",
    "output_top_tokens",
    "output_top_logprobs",
)
"""The columns of the store that results are made of."""


def result_text(rows: pl.DataFrame, *, logprob_tokens: int | None, with_prompt: bool, indent: int) -> bytes:
    """JSON text of results in UTF-8, with commas between them.

    Args:
        rows: with `COLUMNS`; at least one.
        logprob_tokens: of how many tokens log-probabilities are written; None: of all.
        with_prompt: whether a result has the prompt's text; of a chat prompt, the last user turn and, beside
            it, all turns.
        indent: how many spaces stand before the second and each further result.
    """
    result = _object(_fields(with_prompt=with_prompt, indent=indent), indent)
    rows = _with_options(_with_token_logprobs(rows, logprob_tokens, indent + 2), indent + 2)
    text: bytes = rows.select(result.str.join(f",\n{' ' * indent}").cast(pl.Binary)).item()
    return text


def _fields(*, with_prompt: bool, indent: int) -> dict[str, pl.Expr]:
    """The fields of a result as JSON text; one that is null is left out."""
    column = pl.col
    usage = {
        "input": _text(column("input_tokens")),
        "output": _text(column("output_tokens")),
        "total": _text(column("input_tokens").cast(pl.Int64) + column("output_tokens")),
    }
    counted = pl.all_horizontal(
        column("error").is_null(), column("input_tokens").is_not_null(), column("output_tokens").is_not_null()
    )
    # No temperature where none was sent: the tools take 1.0 for a missing one, and cannot sort null.
    sampling_params = {
        "temperature": _optional(column("temperature")),
        "top_p": _optional(column("top_p")),
        "top_k": _optional(column("top_k")),
        "seed": _text(column("seed")),
        "max_tokens": _text(column("max_tokens")),
    }
    return {
        "prompt_id": _text(column("prompt_id")),
        "model": _text(column("model")),
        "model_version": _text(column("model_version").fill_null(column("model"))),
        **({"prompt": _text(_prompt())} if with_prompt else {}),
        "full_response": _text(column("full_response").fill_null("")),
        "tokens_used": pl.when(counted).then(_object(usage, indent + 2)).otherwise(pl.lit("{}")),
        "token_logprobs": column("token_logprobs").fill_null("null"),
        "sampling_params": _object(sampling_params, indent + 2),
        "timestamp": _text(column("timestamp").dt.strftime("%Y-%m-%dT%H:%M:%S%.6f")),
        "elapsed_seconds": _text(column("elapsed_seconds")),
        "run_id": _text(column("run_id")),
        "prompt_category": _text(column("prompt_category")),
        "is_synthetic_probe": _text(column("is_synthetic_probe")),
        "retry_count": _text(column("retry_count")),
        "error": _optional(column("error")),
        "error_type": _optional(column("error_type")),
        "finish_reason": _optional(column("finish_reason")),
        "logprobs_mode": _optional(column("logprobs_mode")),
        "provider": _text(column("provider")),
        "system_prompt": _optional(column("system_prompt")),
        "stop": _optional_array(column("stop"), _text(pl.element()), indent + 2),
        "options": column("options"),
        **(
            {"messages": _optional_array(column("messages"), _turn(indent + 4), indent + 2)}
            if with_prompt
            else {}
        ),
        "prompt_index": _text(column("prompt_index")),
        "sample_index": _text(column("sample_index")),
        "request_id": _text(column("request_id")),
    }


def _prompt() -> pl.Expr:
    turn = pl.element().struct
    asked = pl.col("messages").list.eval(turn.field("content").filter(turn.field("role") == "user"))
    return pl.col("prompt").fill_null(asked.list.last()).fill_null("")


def _turn(indent: int) -> pl.Expr:
    turn = pl.element().struct
    return _object({"role": _text(turn.field("role")), "content": _text(turn.field("content"))}, indent)


def _with_options(rows: pl.DataFrame, indent: int) -> pl.DataFrame:
    """Lay the column `options` out: it is JSON text already, and few rows differ in it."""
    margin = "\n" + " " * indent
    laid_out = {
        text: valid_text(json.dumps(json.loads(text), indent=2, ensure_ascii=False)).replace("\n", margin)
        for text in rows["options"].drop_nulls().unique()
    }
    return rows.with_columns(
        pl.col("options").replace_strict(list(laid_out), list(laid_out.values()), return_dtype=pl.String)
    )


def _with_token_logprobs(rows: pl.DataFrame, logprob_tokens: int | None, indent: int) -> pl.DataFrame:
    """Add the column `token_logprobs` as JSON text; null where a row has none."""
    rows = rows.with_row_index("row")
    tokens, logprobs = pl.col("output_top_tokens"), pl.col("output_top_logprobs")
    position = {
        "token_position": _text(pl.col("position")),
        "top_tokens": _array(tokens.list.eval(_text(pl.element())), indent + 4),
        "top_logprobs": _array(logprobs.list.eval(_number(pl.element())), indent + 4),
    }
    if logprob_tokens is not None:
        tokens, logprobs = tokens.list.head(logprob_tokens), logprobs.list.head(logprob_tokens)
    texts = (
        rows.select("row", tokens, logprobs)
        .filter(pl.col("output_top_tokens").list.len() > 0)
        .with_columns(position=pl.int_ranges(pl.col("output_top_tokens").list.len()))
        .explode("position", "output_top_tokens", "output_top_logprobs")
        .select("row", text=_object(position, indent + 2))
        .group_by("row", maintain_order=True)
        .agg("text")
        .select("row", token_logprobs=_array(pl.col("text"), indent))
    )
    return rows.join(texts, on="row", how="left", maintain_order="left")


def _object(fields: Mapping[str, pl.Expr], indent: int) -> pl.Expr:
    """JSON text of an object. Its fields are JSON text; one that is null is left out, the last never is."""
    margin = " " * (indent + 2)
    *others, last = (pl.lit(f'{margin}"{name}": ') + value for name, value in fields.items())
    separated = (other + pl.lit(",\n") for other in others)
    end = pl.lit(f"\n{' ' * indent}}}")
    return pl.concat_str(pl.lit("{\n"), *separated, last, end, ignore_nulls=True)


def _array(texts: pl.Expr, indent: int) -> pl.Expr:
    """JSON text of an array, of a list of JSON texts."""
    margin = "\n" + " " * indent
    inside = texts.list.join(f",{margin}  ")
    filled = pl.concat_str(pl.lit(f"[{margin}  "), inside, pl.lit(f"{margin}]"))
    return pl.when(texts.list.len() > 0).then(filled).otherwise(pl.lit("[]"))


def _text(value: pl.Expr) -> pl.Expr:
    """JSON text of a value; "null" for null, and for a number that JSON does not have."""
    # polars writes JSON of structs only: the value is wrapped in one, and what was added is taken off.
    return pl.struct(x=value).struct.json_encode().str.strip_prefix('{"x":').str.strip_suffix("}")


def _number(value: pl.Expr) -> pl.Expr:
    """The same as `_text` of a number, in half the time: most of the text is log-probabilities."""
    return pl.when(value.is_finite()).then(value.cast(pl.String)).otherwise(pl.lit("null"))


def _optional_array(values: pl.Expr, text: pl.Expr, indent: int) -> pl.Expr:
    """JSON text of an array of what `text` makes of each value; null where there is no list."""
    return pl.when(values.is_not_null()).then(_array(values.list.eval(text), indent))


def _optional(value: pl.Expr) -> pl.Expr:
    return pl.when(value.is_not_null()).then(_text(value))
