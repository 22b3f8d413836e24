"""Make a damaged store whole again. Nothing is destroyed: what is changed or removed is kept beside the store.

    OUTPUT.damaged-<time>/model=.../part-...parquet              as it was
    OUTPUT.damaged-<time>/model=.../contradicting-part-...       its rows that contradict themselves

Rows that are lost, or that contradict themselves, are no longer answered: `generate` asks them again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import polars as pl
import pyarrow as pa

from hallubench.errors import StoreError
from hallubench.findings import Finding, Remedy, Report
from hallubench.lock import lock_folder
from hallubench.parts import ORDER, model_folders, part_number, part_paths, write_part
from hallubench.provenance import write_record
from hallubench.records import (
    LOST,
    MISSING_ANSWERS,
    asked_runs,
    is_attempt,
    read_records,
)
from hallubench.soundness import goes_on, judge, model_folders_of, open_part, read_row_groups
from hallubench.store import LOCK
from hallubench.text import printable
from hallubench.verify import check_is_store, verify


def repair(folder: Path, now: datetime) -> tuple[list[Finding], Report, Path | None]:
    """Verify a store, and do what each finding says that a repair would do, until it is whole.

    Args:
        folder: of the store.
        now: names the folder where originals are kept.

    Returns:
        All that was found, the store as it is now, and where the originals are; None if nothing was changed.

    Raises:
        StoreError: there is no store in the folder, a run is writing it, or originals cannot be kept.
        DiskError: rows cannot be written; the originals are where they were.
    """
    check_is_store(folder)
    with lock_folder(folder, LOCK):
        mender = _Mender(folder, now)
        report = verify(folder, alone=True)
        found = report.findings
        done: set[Finding] = set()
        # One mended thing brings others to light: parts that a damaged one replaced, answers that are missing.
        while todo := {finding for finding in report.findings if finding.remedy} - done:
            mender.mend(todo, report)
            done |= todo
            report = verify(folder, alone=True)
            found += report.findings
        return list(dict.fromkeys(found)), report, mender.aside


class _Mender: ...
