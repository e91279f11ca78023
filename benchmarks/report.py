"""The page about predicted against measured on real GPUs, made anew from the raw runs.

    python -m benchmarks.report calibration/runs/*.jsonl

Predictions are made now, from the stored settings with the cost model as it is: once with the shipped coefficients, once
calibrated with the probes of the same run. Without runs the page says that there are none.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import pictures
from benchmarks.gpu.evaluate import Errors, Group, Predict, Row, coverage, goals, groups_of, latency, rows_of
from benchmarks.gpu.ledger import latest, read_records
from benchmarks.gpu.practices import WORDS
from benchmarks.gpu.predictions import Predictor, by_machine, fitted, machine_of, operation_seconds
from benchmarks.gpu.records import Machine, Record
from benchmarks.gpu.subjects import find_subject
from planner.units import GIB, format_bytes, format_seconds

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu-report.md"
HEAD = """# Predicted against measured on GPUs

This page is generated: `python -m benchmarks.report calibration/runs/*.jsonl`. Do not edit it.
"""
NOTHING = """
**There is no run on a GPU yet.** Nothing on this page was measured, and every number that the planner states for a GPU
rests on datasheets and on measurements that others published (`calibration/published`).

The campaign that fills this page is one command, `python -m benchmarks.gpu --budget-seconds 1500 --out DIR`; how to run it,
also on a machine without a network, is in `benchmarks/gpu/README.md`.
"""
METHOD = """
Models have their published architecture and size, and random weights: values change pictures, not times or bytes. A call's
latency is the median of its repetitions after a first call; its peak is torch's `max_memory_allocated` over the repetitions.
Small cards are played: torch may reserve what such a card has less the CUDA context, and `mem_get_info` tells of that card.
"Error" is predicted over measured, less one. "Chosen" is what the cost model takes now among the plans that were measured.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its pictures; without runs, the page that says so."""
    parser = argparse.ArgumentParser(description="Write docs/gpu-report.md from raw runs.")
    parser.add_argument("runs", nargs="*", type=Path, help="JSON lines that benchmarks.gpu wrote")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page; pictures go to a folder gpu-report beside it")
    given = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    records = latest([record for path in given.runs if path.is_file() for record in read_records(path)])
    text = page(records, given.out.parent / "gpu-report")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    print(f"{given.out}: {len(records)} cells")
    return 0


def page(records: Sequence[Record], folder: Path) -> str:
    """The whole page; pictures are written to ``folder``. A run on a CPU is a rehearsal and is called that."""
    machines = by_machine(records)
    parts = [HEAD]
    if not any(machine.device.kind == "cuda" for found in machines.values() if (machine := machine_of(found))):
        parts.append(NOTHING)
    for name, found in sorted(machines.items()):
        machine = machine_of(found)
        if machine is not None:
            uncalibrated: Predict = Predictor(machine)
            fit = fitted(found, machine.device)
            probes = operation_seconds(found)
            calibrated = Predictor(machine, fit.coefficients, probes) if fit is not None else None
            parts.append(section(machine, found, uncalibrated, calibrated, folder / _slug(name)))
    return "\n".join(parts)


def section(machine: Machine, records: Sequence[Record], uncalibrated: Predict, calibrated: Predict | None, folder: Path) -> str:
    """One machine: what it is, goals, errors, small cards, failures."""
    rehearsal = " (a rehearsal, no GPU)" if machine.device.kind == "cpu" else ""
    lines = [f"\n## {machine.device.name}{rehearsal}", "", *_about(machine, records), METHOD]
    best_rows: list[Row] = []
    for title, predict in (("Shipped coefficients", uncalibrated), ("Calibrated with this run's probes", calibrated)):
        if predict is None:
            lines += [f"### {title}", "", "The run has no usable probe of the device, so there is nothing to calibrate with.", ""]
            continue
        rows = rows_of(records, predict)
        groups = groups_of(rows, records)
        lines += [f"### {title}", "", *_goal_lines(rows, groups), "", *_error_lines(rows), "", *_coverage_lines(rows), ""]
        lines += _card_lines(groups)
        best_rows, best_groups = rows, groups
    lines += _picture_lines(best_rows, best_groups, folder) if best_rows else []
    lines += [*_cell_lines(best_rows), *_failure_lines(records)]
    return "\n".join(lines) + "\n"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def _about(machine: Machine, records: Sequence[Record]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine.versions.items()))
    runs = ", ".join(sorted({record.run for record in records}))
    power = f", power limit {machine.power_limit_watts:.0f} W" if machine.power_limit_watts else ""
    return [
        f"{format_bytes(machine.device.total_bytes)}, driver {machine.driver or 'unknown'}{power}; {machine.cpu}, {machine.cores} cores, "
        f"{format_bytes(machine.host_bytes)} of host memory; Python {machine.python}, {versions}; commit {machine.commit or 'unknown'}.",
        f"{len(records)} cells; runs of {runs}.",
    ]


# -- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return "did not run" if math.isinf(value) else f"{100 * value:.1f} %"


def _goal_lines(rows: Sequence[Row], groups: Sequence[Group]) -> list[str]:
    words = {True: "met", False: "**not met**", None: "not measured"}
    return table(("goal", "seen", ""), [(goal.name, goal.seen, words[goal.met]) for goal in goals(rows, groups)])


def _error_lines(rows: Sequence[Row]) -> list[str]:
    subjects = sorted({row.record.cell.subject for row in rows})
    lines = []
    for subject in [*subjects, "all"]:
        own = [row for row in rows if subject in ("all", row.record.cell.subject)]
        for what, name in (("peak allocated", "memory_error"), ("peak reserved", "reserved_error"), ("latency", "time_error"),
                           ("step", "step_error")):  # fmt: skip
            errors = Errors.of(getattr(row, name) for row in own)
            if errors is not None:
                signed = f"{100 * errors.signed:+.1f} %"
                lines.append((subject, what, str(errors.count), _percent(errors.median), signed, _percent(errors.ninetieth)))
    return table(("model", "what", "n", "median error", "median, signed", "nine in ten within"), lines)


def _coverage_lines(rows: Sequence[Row]) -> list[str]:
    found = []
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "latency_seconds", "step_seconds"):
        inside, known = coverage(rows, name)
        if known:
            found.append((name, f"{inside} of {known}", _percent(inside / known)))
    return table(("90 % interval of", "holds the measured value", "share"), found) if found else []


def _card_lines(groups: Sequence[Group]) -> list[str]:
    if not groups:
        return ["No small card was played.", ""]
    lines = []
    for group in groups:
        chosen, fastest = group.chosen, group.fastest
        regrets = (_percent(group.regret(chosen)), _percent(group.regret(group.planned)))
        lines.append((group.name, str(len(group.rows)), _brief(chosen), *regrets, _brief(fastest), str(len(group.false_fits)),
                      str(len(group.missed_fits))))  # fmt: skip
    head = ("small card", "plans", "chosen", "regret", "regret as planned before", "fastest measured", "false fits", "missed fits")
    return [*table(head, lines), "", *_ratio_lines(groups), ""]


def _brief(row: Row | None) -> str:
    """The settings of a plan that matter most, in few words."""
    if row is None:
        return "nothing fits"
    settings = row.record.cell.settings
    words = [str(settings.get("offload", "none"))]
    words += ["stream"] if settings.get("offload_stream") else []
    words += [f"compile {settings['compile']}"] if settings.get("compile", "none") != "none" else []
    words += [word for name, word in (("vae_tiling", "tiled"), ("vae_slicing", "sliced"), ("channels_last", "NHWC")) if settings.get(name)]
    words += [f"{settings['batch_split']} calls"] if settings.get("batch_split", 1) != 1 else []
    return ", ".join(words)


def _ratio_lines(groups: Sequence[Group]) -> list[str]:
    names = [name for name in WORDS if any(record.cell.practice == name for group in groups for record in group.practices)]
    lines = []
    for group in groups:
        steps = find_subject(group.subject).default_steps
        own = {record.cell.practice: record for record in group.practices}
        lines.append((group.name, *(_ratio(group, own.get(name), steps) for name in names)))
    if not names:
        return ["No practice of today was measured."]
    head = ("times faster than", *(f"`{WORDS[name]}`" for name in names))
    return [*table(head, lines), "", "In brackets: at the usual number of steps, extrapolated by the measured step."]


def _ratio(group: Group, practice: Record | None, steps: int) -> str:
    if practice is None:
        return "-"
    if latency(practice) is None:
        return "out of memory" if practice.failure and practice.failure.kind == "oom" else "failed"
    ratio, extrapolated = group.ratio(practice, group.chosen), group.ratio(practice, group.chosen, steps)
    return "-" if ratio is None else f"{ratio:.2f}" + (f" ({extrapolated:.2f})" if extrapolated else "")


def _picture_lines(rows: Sequence[Row], groups: Sequence[Group], folder: Path) -> list[str]:
    drawn = {
        "memory": ("Peak memory, predicted against measured", pictures.scatter(rows, "memory", folder / "memory.png")),
        "latency": ("Latency, predicted against measured", pictures.scatter(rows, "time", folder / "latency.png")),
        "regret": ("Regret on small cards", pictures.regrets(groups, folder / "regret.png")),
        "practices": ("Against today's practices", pictures.ratios(groups, folder / "practices.png")),
    }
    shown = [f"![{title}](gpu-report/{folder.name}/{name}.png)" for name, (title, there) in drawn.items() if there]
    return ["### Pictures", "", *shown, ""]


def _cell_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        seen, cell = row.record.seen, row.record.cell
        if seen is not None:
            sizes = (row.predicted.peak_allocated_bytes, seen.steady.peak_allocated_bytes, seen.first.peak_allocated_bytes)
            predicted, measured, first = map(format_bytes, sizes)
            times = (format_seconds(row.predicted.latency_seconds), format_seconds(row.seconds), _percent(row.time_error))
            lines.append((cell.subject, cell.note, predicted, measured, _percent(row.memory_error), first, *times,
                          format_seconds(seen.first_seconds)))  # fmt: skip
    head = ("model", "cell", "predicted peak", "measured", "error", "first call's", "predicted latency", "measured", "error", "first call")
    return ["### Cell by cell", "", *table(head, sorted(lines)), ""] if lines else []


def _failure_lines(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        failure, cell = record.failure, record.cell
        if failure is not None:
            cap = f"{cell.cap_bytes / GIB:.0f} GiB" if cell.cap_bytes else "whole device"
            peak = format_bytes(failure.counters.peak_allocated_bytes) if failure.counters else "?"
            text = " ".join(failure.text.split())[:160].replace("|", "/")
            lines.append((cell.subject, cell.note, cap, failure.kind, failure.stage, peak, text))
    head = ("model", "cell", "card", "outcome", "while", "peak allocated", "what was said")
    return ["### What did not run", "", *table(head, sorted(lines)), ""] if lines else []


if __name__ == "__main__":
    raise SystemExit(main())
