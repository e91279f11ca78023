"""Aligned plain text: tables and hanging paragraphs that keep to a width. Knows nothing of plans."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

DEFAULT_WIDTH = 100
LEAST_WIDTH = 60
GAP = 2
LEAST_COLUMN = 10
"""Letters that a cut column keeps."""


def shortened(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, cut with an ellipsis."""
    return text if len(text) <= width else text[: max(width - 1, 0)].rstrip() + "…"


def paragraph(label: str, text: str, width: int, indent: int) -> list[str]:
    """``label`` at the margin and ``text`` beside it, wrapped at ``indent``. A label too long stands on its own line."""
    room = max(width - indent, 20)
    lines = textwrap.wrap(text, room, break_long_words=True, break_on_hyphens=False) or [""]
    first = [label] if len(label) >= indent else []
    start = "" if first else label
    body = [f"{start if place == 0 else '':<{indent}}{line}".rstrip() for place, line in enumerate(lines)]
    return first + body


def table(rows: Sequence[Sequence[str]], width: int, left: Iterable[int] = (0,), indent: int = 0) -> list[str]:
    """Rows in columns: those in ``left`` flush left, the others right.

    Where the table is wider than ``width`` its widest flush-left columns are cut, the first column last of all.
    """
    if not rows:
        return []
    flush = set(left)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    spare = width - indent - sum(widths) - GAP * (len(widths) - 1)
    for column in _cutting_order(widths, flush, spare):
        widths[column] -= 1
    lines = []
    for row in rows:
        cells = [
            shortened(cell, size).ljust(size) if column in flush else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + (" " * GAP).join(cells)).rstrip())
    return lines


def _cutting_order(widths: Sequence[int], flush: set[int], spare: int) -> list[int]:
    """Which column loses a character, one after the other, until ``spare`` is no longer negative."""
    left = dict(enumerate(widths))
    order: list[int] = []
    while spare + len(order) < 0:
        candidates = [column for column in flush if left[column] > LEAST_COLUMN]
        if not candidates:
            break
        widest = max(candidates, key=lambda column: (column > 0, left[column], column))
        left[widest] -= 1
        order.append(widest)
    return order
