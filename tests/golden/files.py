"""Comparing text with a file beside this one. ``PLANNER_WRITE_GOLDEN=1 pytest`` writes the files anew; look at the diff."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent


def assert_golden(name: str, text: str) -> None:
    path = FOLDER / name
    if os.environ.get("PLANNER_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; write it with PLANNER_WRITE_GOLDEN=1"
    assert text == path.read_text(encoding="utf-8"), f"differs from {path.name}; if that is meant, run with PLANNER_WRITE_GOLDEN=1"
