"""The campaign: the next cell while there is time, its record on disk before the one after. The clock is an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.gpu.ledger import Ledger, latest
from benchmarks.gpu.records import Cell, Record
from benchmarks.gpu.schedule import Pace, next_cell

LIMIT_FACTOR, LIMIT_LEAST_SECONDS = 4.0, 90.0
"""A cell that takes four times what was expected (at least 90 s) is stopped: one hanging compile must not eat the budget."""
MAX_SUBJECT_FAILURES = 2
"""Times a subject may fail to start or crash before its remaining cells are given up."""


class Executor(Protocol):
    """Runs cells, one at a time, in the process that holds the device."""

    current: str | None
    """Subject that is built now."""
    switch_seconds: dict[str, float]

    def run(self, cell: Cell, limit_seconds: float) -> Record: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Outcome:
    """How the campaign ended."""

    finished: list[Record] = field(default_factory=list)
    skipped: int = 0
    left: list[Cell] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    seconds: float = 0.0
    reason: str = "every cell was measured"


@dataclass(slots=True)
class Campaign:
    """Measures cells until the budget is spent. ``started`` is when the budget began to run, by the same clock as ``now``."""

    ledger: Ledger
    executor: Executor
    now: Callable[[], float]
    started: float
    budget_seconds: float
    say: Callable[[str], None] = lambda line: None
    told: Callable[[Record], None] = lambda record: None
    """Gets every record once it is on disk."""
    pace: Pace = field(default_factory=Pace)

    def left_seconds(self) -> float:
        return self.budget_seconds - (self.now() - self.started)

    def run(self, cells: Iterable[Cell]) -> Outcome:
        """Measure what fits into the budget, best value per second first. Never starts what would not end in time."""
        outcome = Outcome()
        remaining = self._undone(cells, outcome)
        failures: dict[str, int] = {}
        try:
            while remaining:
                known, costs = self.executor.current, self.executor.switch_seconds
                cell = next_cell(list(remaining.values()), known, costs, self.left_seconds(), self.pace)
                if cell is None:
                    outcome.reason = "the budget holds no further cell"
                    break
                del remaining[cell.identity]
                self._one(cell, remaining, failures, outcome)
        except KeyboardInterrupt:
            outcome.reason = "interrupted"
        finally:
            self.executor.close()
        outcome.left += remaining.values()
        outcome.seconds = self.now() - self.started
        return outcome

    def _undone(self, cells: Iterable[Cell], outcome: Outcome) -> dict[str, Cell]:
        done = {record.cell.identity for record in latest(self.ledger.records()) if record.done}
        wanted = {cell.identity: cell for cell in cells}
        outcome.skipped = len(done & wanted.keys())
        return {identity: cell for identity, cell in wanted.items() if identity not in done}

    def _one(self, cell: Cell, remaining: dict[str, Cell], failures: dict[str, int], outcome: Outcome) -> None:
        expected = self.pace.expected(cell)
        self.say(f"{self.left_seconds():6.0f} s left; {cell.subject}: {cell.note} (about {expected:.0f} s)")
        own, left = self._limit(cell, expected), self.left_seconds()
        record = self.executor.run(cell, min(own, left))
        if record.failure is not None and record.failure.kind == "overran" and left <= own:
            # It was the budget that ended, not the cell's own time: measure it again when there is more.
            record = record.model_copy(update={"failure": record.failure.model_copy(update={"kind": "cut"})})
        self.ledger.append(record)
        outcome.finished.append(record)
        self.told(record)
        if record.failure is None:
            self.pace.learn(cell, record.seconds)
        elif record.failure.kind == "crashed" or record.failure.stage == "build":
            failures[cell.subject] = failures.get(cell.subject, 0) + 1
            if failures[cell.subject] >= MAX_SUBJECT_FAILURES:
                self._give_up(cell.subject, remaining, outcome)

    def _limit(self, cell: Cell, expected: float) -> float:
        switch = 0.0 if cell.subject == self.executor.current else self.executor.switch_seconds.get(cell.subject, 0.0)
        return LIMIT_FACTOR * (expected + switch) + LIMIT_LEAST_SECONDS

    def _give_up(self, subject: str, remaining: dict[str, Cell], outcome: Outcome) -> None:
        outcome.given_up.append(subject)
        outcome.reason = "every other cell was measured"
        self.say(f"{subject} failed {MAX_SUBJECT_FAILURES} times; its other cells are left")
        for identity in [identity for identity, cell in remaining.items() if cell.subject == subject]:
            outcome.left.append(remaining.pop(identity))


def shares(records: Iterable[Record]) -> Mapping[str, int]:
    """How many records of each kind of outcome there are: ``measured``, ``probed`` or the failure's kind."""
    found: dict[str, int] = {}
    for record in records:
        name = record.failure.kind if record.failure else "probed" if record.probes else "measured"
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


__all__ = ["Campaign", "Executor", "LIMIT_FACTOR", "LIMIT_LEAST_SECONDS", "Outcome", "shares"]
