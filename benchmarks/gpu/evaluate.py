"""Raw records against predictions: errors, regret, false and missed fits, ratios to today's practices. Pure arithmetic.

A prediction is a function from a record to an estimate (None: the cost model says nothing of it), so that tests can state
both sides by hand.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.records import Record
from planner.types import Estimate

Predict = Callable[[Record], Estimate | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured plan beside its prediction."""

    record: Record
    predicted: Estimate

    @property
    def ran(self) -> bool:
        return self.record.seen is not None

    @property
    def oom(self) -> bool:
        return self.record.failure is not None and self.record.failure.kind == "oom"

    @property
    def seconds(self) -> float | None:
        return latency(self.record)

    @property
    def memory_error(self) -> float | None:
        """Predicted peak of allocated bytes over the measured one, less one."""
        seen = self.record.seen
        peak = seen.steady.peak_allocated_bytes if seen else None
        return self.predicted.peak_allocated_bytes / peak - 1 if peak else None

    @property
    def reserved_error(self) -> float | None:
        seen = self.record.seen
        peak = seen.steady.peak_reserved_bytes if seen else None
        return self.predicted.peak_reserved_bytes / peak - 1 if peak else None

    @property
    def time_error(self) -> float | None:
        """Predicted latency over the median repetition, less one."""
        return self.predicted.latency_seconds / self.seconds - 1 if self.seconds else None

    @property
    def step_error(self) -> float | None:
        step = step_seconds(self.record)
        return self.predicted.step_seconds / step - 1 if step and self.predicted.step_seconds else None


def latency(record: Record) -> float | None:
    """Median of a record's repetitions; None when it did not run."""
    return statistics.median(record.seen.repetitions) if record.seen else None


def step_seconds(record: Record) -> float | None:
    """Median interval between denoising iterations over all repetitions."""
    intervals = [seconds for steps in (record.seen.steps if record.seen else ()) for seconds in steps]
    return statistics.median(intervals) if intervals else None


def at_steps(record: Record, steps: int) -> float | None:
    """Latency extrapolated from the measured number of steps to ``steps`` by the measured step."""
    seconds, step, had = latency(record), step_seconds(record), record.cell.workload.num_inference_steps
    if seconds is None or step is None or had is None:
        return seconds
    return seconds + (steps - had) * step * int(record.cell.settings.get("batch_split", 1))


def rows_of(records: Iterable[Record], predict: Predict) -> list[Row]:
    """Plans (not practices, not probes) that ran or ran out of memory, with what is predicted for them."""
    found = []
    for record in records:
        if record.cell.practice or record.cell.kind == "probe" or not (record.seen or (record.failure and record.failure.kind == "oom")):
            continue
        estimate = predict(record)
        if estimate is not None:
            found.append(Row(record, estimate))
    return found


# -- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Errors:
    """Distribution of relative errors: medians of the absolute value and of the signed one, and the 90th percentile."""

    count: int
    median: float
    signed: float
    ninetieth: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Errors | None:
        """None when there is no value. The percentile is the smallest error that nine in ten do not exceed."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        sizes = sorted(map(abs, known))
        place = max(math.ceil(0.9 * len(sizes)) - 1, 0)
        return cls(len(known), statistics.median(sizes), statistics.median(known), sizes[place])


def coverage(rows: Sequence[Row], name: str) -> tuple[int, int]:
    """How many measured values lie within the predicted interval, of how many: ``peak_allocated_bytes``, ``latency_seconds``,
    ``step_seconds`` or ``host_bytes``."""
    inside = known = 0
    for row in rows:
        measured = _measured(row.record, name)
        low, high = getattr(row.predicted, f"{name}_low"), getattr(row.predicted, f"{name}_high")
        if measured is not None and low is not None and high is not None:
            known += 1
            inside += low <= measured <= high
    return inside, known


def _measured(record: Record, name: str) -> float | None:
    if record.seen is None:
        return None
    if name == "latency_seconds":
        return latency(record)
    if name == "step_seconds":
        return step_seconds(record)
    value: float | None = getattr(record.seen.steady, name, None)
    return value


# -- small cards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Everything that was measured for one workload on one (small) card."""

    name: str
    subject: str
    cap_bytes: int | None
    rows: tuple[Row, ...]
    practices: tuple[Record, ...]

    @property
    def chosen(self) -> Row | None:
        """What the model takes now among the measured plans: the fastest of those that it says fit."""
        fitting = [row for row in self.rows if row.predicted.fits]
        return min(fitting, key=lambda row: row.predicted.latency_seconds, default=None)

    @property
    def planned(self) -> Row | None:
        """What the planner itself chose when the cells were planned."""
        return next((row for row in self.rows if row.record.cell.chosen), None)

    @property
    def fastest(self) -> Row | None:
        """The plan that truly was fastest."""
        ran = [row for row in self.rows if row.seconds is not None]
        return min(ran, key=lambda row: row.seconds or math.inf, default=None)

    def regret(self, row: Row | None) -> float | None:
        """How much slower a plan is than the fastest measured one; infinite when it did not run; None without either."""
        if row is None or self.fastest is None or self.fastest.seconds is None:
            return None
        return row.seconds / self.fastest.seconds - 1 if row.seconds is not None else math.inf

    @property
    def false_fits(self) -> tuple[Row, ...]:
        """Predicted to fit, ran out of memory."""
        return tuple(row for row in self.rows if row.predicted.fits and row.oom)

    @property
    def missed_fits(self) -> tuple[Row, ...]:
        """Predicted not to fit, ran."""
        return tuple(row for row in self.rows if not row.predicted.fits and row.ran)

    def ratio(self, practice: Record, row: Row | None, steps: int | None = None) -> float | None:
        """How many times faster a plan is than a practice, at the measured steps or extrapolated; None when either did not run."""
        if row is None:
            return None
        theirs, ours = (at_steps(record, steps) if steps else latency(record) for record in (practice, row.record))
        return theirs / ours if theirs and ours else None

    def best_practice(self) -> Record | None:
        """The fastest of today's practices that ran here."""
        ran = [record for record in self.practices if latency(record) is not None]
        return min(ran, key=lambda record: latency(record) or math.inf, default=None)


def groups_of(rows: Sequence[Row], records: Iterable[Record], capped: bool = True) -> list[Group]:
    """Groups of equal subject, workload and card, in a fixed order; ``capped``: small cards only."""
    found: dict[tuple[str, str, int], tuple[list[Row], list[Record]]] = {}
    for row in rows:
        if (row.record.cell.cap_bytes is not None) == capped:
            found.setdefault(_place(row.record), ([], []))[0].append(row)
    for record in records:
        if record.cell.practice and _place(record) in found and (record.failure is None or record.failure.kind != "absent"):
            found[_place(record)][1].append(record)
    return [_group(key, *found[key]) for key in sorted(found)]


def _group(key: tuple[str, str, int], rows: list[Row], practices: list[Record]) -> Group:
    workload = rows[0].record.cell.workload
    cap = f"{key[2] >> 30} GiB" if key[2] else "whole device"
    return Group(f"{key[0]}, batch {workload.batch_size}, {cap}", key[0], key[2] or None, tuple(rows), tuple(practices))


def _place(record: Record) -> tuple[str, str, int]:
    cell = record.cell
    return cell.subject, cell.workload.model_dump_json(), cell.cap_bytes or 0


# -- goals ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal: what was wanted, what was seen, whether it is met (None: nothing measured that tells)."""

    name: str
    seen: str
    met: bool | None


def goals(rows: Sequence[Row], groups: Sequence[Group]) -> list[Goal]:
    """The goals on a real card, judged by these rows and small cards."""
    memory, seconds = Errors.of(row.memory_error for row in rows), Errors.of(row.time_error for row in rows)
    regrets = [regret for group in groups if (regret := group.regret(group.chosen)) is not None]
    finite = [regret for regret in regrets if math.isfinite(regret)]
    lost = [group for group in groups if group.chosen is not None and group.chosen.oom]
    ratios = [ratio for group in groups for practice in group.practices if (ratio := group.ratio(practice, group.chosen)) is not None]
    best = [ratio for group in groups if (record := group.best_practice()) and (ratio := group.ratio(record, group.chosen)) is not None]
    mean, least = math.exp(statistics.fmean(map(math.log, best))) if best else None, min(ratios, default=None)
    return [
        _goal("peak allocated: median error at most 2 %", memory.median if memory else None, 0.02),
        _goal("peak allocated: nine in ten within 5 %", memory.ninetieth if memory else None, 0.05),
        _goal("latency: median error at most 7 %", seconds.median if seconds else None, 0.07),
        _goal("regret: median at most 3 %", statistics.median(finite) if finite else None, 0.03),
        _goal("regret: worst at most 10 %", max(regrets) if regrets else None, 0.10),
        Goal("no chosen plan runs out of memory", f"{len(lost)} of {len(groups)} did" if groups else "-", not lost if groups else None),
        Goal("never slower than a practice of today", f"least ratio {least:.2f}" if least else "-", least >= 1 if least else None),
        Goal("1.5 times faster than the best of them, geometric mean", f"{mean:.2f}" if mean else "-", mean >= 1.5 if mean else None),
    ]  # fmt: skip


def _goal(name: str, seen: float | None, limit: float) -> Goal:
    return Goal(name, "-" if seen is None else f"{100 * seen:.1f} %", None if seen is None else seen <= limit)


__all__ = ["Errors", "Goal", "Group", "Predict", "Row", "at_steps", "coverage", "goals", "groups_of", "latency", "rows_of", "step_seconds"]
