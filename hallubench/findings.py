"""What `verify` says of a store, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hallubench.text import printable


class Remedy(StrEnum):
    """What a repair does about a finding."""

    MOVE = "move it aside"
    SAVE_ROWS = "save its sound rows, keep the original aside"
    SAVE_LINES = "save its other lines, keep the original aside"
    NOTE_LOST_RECORD = "write a record that says no more than that"
    NOTE_MISSING_ANSWERS = "note it in the record"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is to be said of a file."""

    path: Path
    what: str
    remedy: Remedy | None = None
    is_fault: bool = True


@dataclass(slots=True)
class Report:
    """What a store holds, and what is to be said of it."""

    findings: list[Finding] = field(default_factory=list)
    parts: int = 0
    answers: int = 0
    """In sound parts, as all rows here."""
    errors: int = 0
    outdated: int = 0
    """Rows that no longer count, until compaction leaves them out."""
    missing_answers: dict[str, int] = field(default_factory=dict)
    """Of each run with fewer answers than its record counts, how many."""

    @property
    def faults(self) -> int:
        return sum(finding.is_fault for finding in self.findings)


def report_lines(
    folder: Path, findings: Iterable[Finding], report: Report, *, repaired: bool = False
) -> Iterator[str]:
    """A line for each finding, aligned, then one for what the store holds.

    Args:
        folder: of the store.
        findings: what was found.
        report: the store as it is now.
        repaired: whether remedies have been applied, and not only could be.
    """
    verb = "done" if repaired else "--repair"
    shown = [(printable(finding.path.relative_to(folder)), finding) for finding in findings]
    width = max((len(path) for path, _ in shown), default=0)
    for path, finding in shown:
        kind = "FAULT" if finding.is_fault else "note"
        remedy = f"; {verb}: {finding.remedy}" if finding.remedy else ""
        yield f"{kind:5}  {path:{width}}  {printable(finding.what)}{remedy}"
    counts = {
        "part": report.parts,
        "row": report.answers + report.errors + report.outdated,
        "answer": report.answers,
        "error": report.errors,
    }
    held = [_counted(count, noun) for noun, count in counts.items()]
    if report.outdated:
        held.append(f"{report.outdated:,} outdated")
    yield f"{', '.join(held)}: {_counted(report.faults, 'fault') if report.faults else 'whole'}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
