"""How often the demo's model says yes to things that do not exist: what `make demo` prints at its end.

The demo's existence questions ask for yes or no first, so an answer is a yes if it begins with one.
Those about real things stand beside the made-up ones: a model that always says yes knows nothing.
"""

import polars as pl

import hallubench

answers = hallubench.scan("results/demo").filter(pl.col("error").is_null())

says_yes = pl.col("full_response").str.contains(r"(?i)^\W*yes\b")
exists = pl.col("gold_label").str.json_path_match("$.exists")
made_up = pl.col("is_synthetic_probe") & (exists == "false")
real = exists == "true"

table = (
    answers.group_by("temperature")
    .agg(
        pl.len().alias("answers"),
        says_yes.filter(made_up).mean().alias("yes to made-up (hallucinated)"),
        says_yes.filter(real).mean().alias("yes to real"),
        pl.col("output_logprobs").explode().exp().mean().alias("mean token probability"),
    )
    .sort("temperature")
    .collect()
)
with pl.Config(float_precision=2, tbl_hide_column_data_types=True, tbl_hide_dataframe_shape=True):
    print(table)
