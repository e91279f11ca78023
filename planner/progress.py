"""Telling a person what takes time. A progress is a function of one line; what it does with it is its own affair."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


def to_stderr(line: str) -> None:
    """One line on stderr, when that is a terminal."""
    if sys.stderr.isatty():
        print(f"planner: {line} …", file=sys.stderr, flush=True)
