"""The command line: parse, call, echo. Imports nothing heavy before a command runs."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hallubench.errors import HallubenchError
from hallubench.text import printable

if TYPE_CHECKING:
    from hallubench.config import Config
    from hallubench.generate import Result

FOLDER = click.Path(path_type=Path)


class _Main(click.Group):
    """Turns the errors raised on purpose into one line and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HallubenchError as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"Error: {printable(error, longest=2000)}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="hallubench")
def main(debug: bool) -> None:
    """Batch inference for hallucination research: every answer with its log-probabilities, in Parquet."""
    # A long run has thousands of files, and what reads them meanwhile holds them open.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2**16)), hard))


def _config_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--models", metavar="GLOB", help="Only the models whose name matches, such as 'Qwen/*'."
        ),
        click.option(
            "--num-prompts", type=click.IntRange(min=1), metavar="N", help="Only the first N prompts."
        ),
        click.option("--output", "output_dir", metavar="DIR", help="Instead of the config's output_dir."),
        click.option(
            "--prompts", "prompts_file", metavar="FILE", help="Instead of the config's prompts_file."
        ),
        click.option(
            "--config", "path", type=FOLDER, required=True, metavar="FILE", help="JSON, YAML or TOML."
        ),
    ):
        command = option(command)
    return command


@main.command()
@_config_options
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most requests in flight on an API account.",
)
@click.option("--resume", is_flag=True, help="Go on where an earlier run ended. This is what happens anyway.")
@click.option("--fresh", is_flag=True, help="Set earlier answers aside and ask everything again.")
@click.option("--dry-run", is_flag=True, help="Print the plan and ask nothing.")
def generate(path: Path, resume: bool, fresh: bool, dry_run: bool, **overrides: Any) -> None:
    """Ask every prompt of every model, and store the answers.

    What the output folder holds already is not asked again; what failed is.
    """
    # Read when Arrow is imported: malloc gives back what merging parts took, Arrow's own pool keeps it.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if resume and fresh:
        raise click.UsageError("--resume and --fresh contradict each other; give one of them")
    terminated = _end_cleanly_on_sigterm()
    try:
        config = _load(path, missing_env="keep" if dry_run else "error", **overrides)
        if dry_run:
            from hallubench.dry_run import plan_lines

            for line in plan_lines(config, fresh=fresh):
                click.echo(line)
            return
        from hallubench.generate import run
        from hallubench.progress import display

        result = run(config, fresh=fresh, display=display())
        _echo_result(result)
    except KeyboardInterrupt:  # before anything was asked, or once more while the last rows were written
        _end_interrupted(terminated)
    if result.interrupted:
        _end_interrupted(terminated)
    if result.problems:
        click.echo(f"Not finished. Correct what is named above, then run again:\n  {_again()}", err=True)
        raise SystemExit(1)


@main.command("export-json")
@click.argument("folder", type=FOLDER)
@click.option(
    "--layout",
    type=click.Choice(["runs", "per-model", "flat"]),
    default="runs",
    show_default=True,
    help="One file for all models, one for each, or lists that the annotation tools read.",
)
@click.option(
    "--logprob-tokens",
    type=str,
    default="50",
    show_default=True,
    metavar="N|all",
    help="Output tokens whose log-probabilities are exported.",
)
@click.option("--output", type=FOLDER, metavar="DIR", help="Where to write; FOLDER/export by default.")
def export_json(folder: Path, layout: Any, logprob_tokens: str, output: Path | None) -> None:
    """Write the store in FOLDER as the legacy JSON files."""
    from datetime import UTC, datetime

    from hallubench.legacy import export_json as export

    if logprob_tokens != "all" and not logprob_tokens.isdecimal():
        raise click.BadParameter(
            f"{logprob_tokens!r} is neither a whole number nor 'all'", param_hint="--logprob-tokens"
        )
    tokens = None if logprob_tokens == "all" else int(logprob_tokens)
    for file in export(folder, output=output, layout=layout, logprob_tokens=tokens, now=datetime.now(UTC)):
        click.echo(printable(file, longest=5000))


@main.command("export-annotations")
@click.argument("folder", type=FOLDER)
@click.option("--annotators", type=click.IntRange(min=1), default=2, show_default=True, metavar="N")
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="Of the answers, how many every annotator gets.",
)
@click.option("--seed", type=int, default=42, show_default=True, help="Of the order and the models' codes.")
@click.option("--models", metavar="GLOB", help="Only the models whose name matches, such as 'Qwen/*'.")
@click.option("--output", type=FOLDER, metavar="DIR", help="Where to write; FOLDER/annotation by default.")
def export_annotations(folder: Path, **options: Any) -> None:
    """Write the answers in FOLDER as CSV for human annotators: blind, shuffled, a file for each."""
    from hallubench.annotation_batches import export_batches, export_lines

    for line in export_lines(export_batches(folder, **options)):
        click.echo(line)


@main.command("import-json")
@click.argument("files", type=FOLDER, nargs=-1, required=True, metavar="FILE...")
@click.option("--output", type=FOLDER, required=True, metavar="DIR", help="The store; made if there is none.")
@click.option("--prompts", type=FOLDER, metavar="FILE", help="The prompts that were asked.")
def import_json(files: tuple[Path, ...], output: Path, prompts: Path | None) -> None:
    """Put the results of legacy JSON FILEs into a store, each once.

    Reads what `run_pilot.py` and `export-json` write, in every layout.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # see `generate`
    from datetime import UTC, datetime

    from hallubench.import_legacy import import_json as import_
    from hallubench.import_legacy import import_lines

    for line in import_lines(import_(files, output, prompts=prompts, now=datetime.now(UTC)), output):
        click.echo(line)


@main.command()
@click.argument("folder", type=FOLDER)
@click.argument("prompt_id")
@click.option(
    "--model", default="*", metavar="GLOB", help="Only the models whose name matches, such as 'Qwen/*'."
)
@click.option("--sample", type=click.IntRange(min=0), metavar="N", help="Only this sample, from 0.")
def show(folder: Path, prompt_id: str, model: str, sample: int | None) -> None:
    """Print a prompt of FOLDER with its answers, each token coloured by its probability."""
    from hallubench.show import show as show_

    show_(folder, prompt_id, model=model, sample=sample)


@main.command()
@click.argument("folder", type=FOLDER)
def status(folder: Path) -> None:
    """Summarize the store in FOLDER: what was answered, what failed, and its runs."""
    from hallubench.status import status_lines

    for line in status_lines(folder):
        click.echo(line)


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--repair", is_flag=True, help="Mend what is wrong; originals are kept beside FOLDER.")
def verify(folder: Path, repair: bool) -> None:
    """Read all of the store in FOLDER, and say what is wrong and what a repair would do.

    The exit code is 1 if something is.
    """
    from datetime import UTC, datetime

    from hallubench.findings import report_lines

    if repair:
        from hallubench.repair import repair as mend

        found, report, aside = mend(folder, datetime.now(UTC))
    else:
        from hallubench.verify import verify as inspect

        report = inspect(folder)
        found, aside = report.findings, None
    for line in report_lines(folder, found, report, repaired=repair):
        click.echo(line)
    if aside is not None:
        click.echo(f"Originals: {printable(aside, longest=1000)}")
    if report.faults:
        raise SystemExit(1)


@main.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Answers to ask again.",
)
@click.option("--seed", type=int, default=42, show_default=True, help="Which answers.")
@click.option("--models", metavar="GLOB", help="Only the models whose name matches, such as 'Qwen/*'.")
def reproduce(folder: Path, sample: int, seed: int, models: str | None) -> None:
    """Ask some answers of local models in FOLDER again, alone and in a batch, and compare."""
    from hallubench.reproduce import report_lines
    from hallubench.reproduce import reproduce as ask_again

    def notify(line: str) -> None:
        click.echo(printable(line, longest=2000), err=True)

    for line in report_lines(ask_again(folder, sample=sample, seed=seed, models=models, notify=notify)):
        click.echo(line)


@main.command()
@_config_options
def validate(path: Path, **overrides: Any) -> None:
    """Check packages, prompts, models, keys, GPU, memory and disk. No model is asked anything."""
    from hallubench.checks import check_config

    failed = 0
    for check in check_config(_load(path, missing_env="keep", **overrides)):
        failed += not check.ok
        click.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.subject}: {check.found}")
        if check.fix is not None:
            click.echo(f"      {check.fix}")
    if failed:
        raise SystemExit(1)


def _load(path: Path, *, max_concurrency: int | None = None, **options: Any) -> Config:
    from hallubench.config import load_config

    return load_config(path, max_concurrency=max_concurrency, **options)


def _echo_result(result: Result) -> None:
    from hallubench.status import summarize, summary_lines

    output = printable(result.output, longest=1000)
    if result.run_id is None:
        click.echo(f"Nothing left to ask: all {result.already_answered} requests are answered in {output}.")
        return
    for line in summary_lines(summarize(result.output)):
        click.echo(line)
    click.echo(
        f"Run {result.run_id}: {result.answered} answered, {result.failed} failed, {result.pending} pending, "
        f"{result.already_answered} answered before. Store: {output}"
    )
    for problem in result.problems:
        click.echo(f"Error: {printable(problem, longest=2000)}", err=True)


def _again() -> str:
    import shlex

    command = shlex.join(["hallubench", *(argument for argument in sys.argv[1:] if argument != "--fresh")])
    return printable(command, longest=5000)


def _end_interrupted(terminated: list[int]) -> NoReturn:
    click.echo(f"Interrupted. To go on, run the same command again:\n  {_again()}", err=True)
    raise SystemExit(143 if terminated else 130)


def _end_cleanly_on_sigterm() -> list[int]:
    """SIGTERM ends a run like Ctrl-C; the list that is returned holds what was received."""
    received: list[int] = []

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    return received
