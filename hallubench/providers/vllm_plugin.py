"""Runs inside vLLM's own processes, which must not outlive the process that asks them.

When its parent is killed, vLLM's engine answers all that it was asked for nobody, and then waits for
more. vLLM calls `end_with_parent` at the start of each of its processes, as a plugin (the entry point in
pyproject.toml); it does something only in those that a hallubench provider has started.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

MARK = "HALLUBENCH_ENGINE"
"""Environment variable that the provider sets for the processes it starts."""

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that this process gets when the thread that started it is gone."""


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent is gone; Linux only."""
    parent = multiprocessing.parent_process()
    if MARK not in os.environ or parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # gone before the kernel was asked
        os._exit(1)
