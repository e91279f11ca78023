"""What a campaign prints last: how much was measured, and predicted against measured at a glance."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.gpu.campaign import Outcome, shares
from benchmarks.gpu.records import Record
from planner.units import format_bytes, format_seconds


def render(outcome: Outcome, records: Sequence[Record], budget_seconds: float) -> str:
    """The summary of this run, and of everything in the folder."""
    lines = [f"{len(outcome.finished)} cells in {format_seconds(outcome.seconds)} of {format_seconds(budget_seconds)}: {outcome.reason}"]
    if outcome.skipped:
        lines.append(f"{outcome.skipped} were measured before and skipped")
    if outcome.left:
        lines.append(f"{len(outcome.left)} cells are left; run the same command with --resume")
    lines += [f"given up: {name}" for name in outcome.given_up]
    lines.append("in all: " + (", ".join(f"{count} {name}" for name, count in shares(records).items()) or "nothing"))
    machine = next((record.machine for record in records if record.machine), None)
    if machine is not None:
        lines.append(f"device: {machine.device.name}, driver {machine.driver or '?'}, torch {machine.versions.get('torch', '?')}")
    lines += ["", *table(records)]
    return "\n".join(lines) + "\n"


def table(records: Iterable[Record]) -> list[str]:
    """Per subject the median error of memory and of time as predicted before the run, and the failures."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.cell.kind != "probe":
            found.setdefault(record.cell.subject, []).append(record)
    lines = [f"{'subject':30s}{'cells':>6s}{'oom':>5s}{'memory':>9s}{'time':>9s}   predicted before the run / measured - 1, median of |.|"]
    for subject, rows in sorted(found.items()):
        memory = [error for record in rows if (error := memory_error(record)) is not None]
        seconds = [error for record in rows if (error := time_error(record)) is not None]
        oom = sum(record.failure is not None and record.failure.kind == "oom" for record in rows)
        lines.append(f"{subject:30s}{len(rows):6d}{oom:5d}{_middle(memory):>9s}{_middle(seconds):>9s}")
    return lines


def _middle(errors: Sequence[float]) -> str:
    return f"{statistics.median(map(abs, errors)):.1%}" if errors else "-"


def memory_error(record: Record) -> float | None:
    """Predicted peak allocated bytes over measured, less one."""
    peak = record.seen.steady.peak_allocated_bytes if record.seen else None
    return record.cell.predicted.peak_allocated_bytes / peak - 1 if peak and record.cell.predicted else None


def time_error(record: Record) -> float | None:
    """Predicted latency over the median repetition, less one."""
    if record.seen is None or record.cell.predicted is None:
        return None
    return record.cell.predicted.latency_seconds / statistics.median(record.seen.repetitions) - 1


def describe(record: Record) -> str:
    """One line on a cell that has just ended."""
    if record.failure is not None:
        first = record.failure.text.splitlines()[0] if record.failure.text else ""
        return f"{record.failure.kind} while {record.failure.stage}: {first[:120]}"
    if record.seen is None:
        return f"{len(record.probes.samples) if record.probes else 0} operations timed"
    peak = record.seen.steady.peak_allocated_bytes
    return f"{format_seconds(statistics.median(record.seen.repetitions))}, peak {format_bytes(peak)}, in {record.seconds:.0f} s"


__all__ = ["describe", "memory_error", "render", "table", "time_error"]
