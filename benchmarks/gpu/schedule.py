"""Which cell is measured next: the most value per second that still ends in time. Pure: the clock is an argument."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.records import Cell

SAFETY = 1.25
"""A cell is started only if this many times its expected time is left. Assumed; the pace below corrects it as cells end."""
LEAST_SECONDS = 3.0
"""What any cell may take beyond its estimate: collecting garbage, hooks, the first touch of a kernel."""


@dataclass(slots=True)
class Pace:
    """How much longer cells take than they were expected to, by subject: the median of what was seen, never below 1."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def learn(self, cell: Cell, seconds: float) -> None:
        self.seen.setdefault(cell.subject, []).append(seconds / (cell.cost_seconds + LEAST_SECONDS))

    def factor(self, subject: str) -> float:
        known = self.seen.get(subject) or [value for values in self.seen.values() for value in values]
        return max(1.0, statistics.median(known)) if known else 1.0

    def expected(self, cell: Cell) -> float:
        """Seconds that this cell is expected to take."""
        return (cell.cost_seconds + LEAST_SECONDS) * self.factor(cell.subject)


def ordered(cells: Iterable[Cell], pace: Pace | None = None) -> list[Cell]:
    """By value per second, best first; equal ones by key, so that the order is the same every time."""
    pace = pace or Pace()
    return sorted(cells, key=lambda cell: (-cell.value / pace.expected(cell), cell.key))


def next_cell(cells: Sequence[Cell], current: str | None, switch_seconds: Mapping[str, float], left_seconds: float,
              pace: Pace | None = None) -> Cell | None:  # fmt: skip
    """The cell to measure now; None when none can end in the time that is left.

    Going to another subject costs ``switch_seconds`` (a new process, a model to build), spread over the cells that
    would follow there: of every subject the best rate of a run of its cells is what counts.
    """
    pace = pace or Pace()
    best: tuple[float, str, Cell] | None = None
    for subject in sorted({cell.subject for cell in cells}):
        switch = 0.0 if subject == current else switch_seconds.get(subject, 0.0)
        rate, first = _best_run([cell for cell in cells if cell.subject == subject], switch, left_seconds, pace)
        if first is not None and (best is None or rate > best[0]):
            best = (rate, subject, first)
    return best[2] if best else None


def _best_run(cells: Sequence[Cell], switch: float, left: float, pace: Pace) -> tuple[float, Cell | None]:
    """Highest value per second that some of these cells reach together, and the first of them."""
    value, spent, rate = 0.0, switch, 0.0
    first: Cell | None = None
    for cell in ordered(cells, pace):
        seconds = pace.expected(cell)
        if spent + SAFETY * seconds > left:
            continue
        first = first or cell
        value, spent = value + cell.value, spent + seconds
        rate = max(rate, value / spent)
    return rate, first


__all__ = ["LEAST_SECONDS", "Pace", "SAFETY", "next_cell", "ordered"]
