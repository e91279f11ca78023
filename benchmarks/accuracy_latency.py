"""Latency after calibration on three published rows per card: ``python -m benchmarks.accuracy_latency [--strict]``.

The three "SD - txt2img, 2.0, eager" rows of each card in ``torch2_table.csv`` fix its compute scale, bandwidth scale and launch
pace; every other row is predicted. ``--strict`` first refits the shipped coefficients without that table. :func:`page` gives
the same as Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.fit_latency import TABLES, Fit, is_resident, overridden
from planner.cost.coefficients import Coefficients
from planner.validate import read_table
from planner.validate.calibrated import Base, Errors, Job, fit_cards, is_anchor, jobs_of, shipped
from planner.validate.rows import Torch2Row

TARGETS = {"eager": 0.08, "compile": 0.15}
"""Wanted mean absolute error of the predicted rows, by execution."""


def table_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The rows of ``torch2_table.csv``."""
    return [job for job in jobs if isinstance(job.row, Torch2Row)]


def without_table(jobs: Sequence[Job]) -> Base:
    """Coefficients fitted on all other sources."""
    fit = Fit([job for job in jobs if is_resident(job) and not isinstance(job.row, Torch2Row)])
    return partial(overridden, fit.named(fit.solve()))


def errors(jobs: Sequence[Job], fitted: dict[str, Coefficients]) -> dict[tuple[str, str, str], Errors]:
    """Errors of rate predictions by execution, torch version and card; ``all`` stands for every version or card."""
    out: dict[tuple[str, str, str], Errors] = {}
    for job in jobs:
        row = job.row
        if not isinstance(row, Torch2Row) or is_anchor(row) or job.device.name not in fitted:
            continue
        seconds = job.seconds(fitted[job.device.name]) or math.inf
        for version in (row.torch, "all"):
            for card in (job.device.name, "all"):
                out.setdefault((row.execution, version, card), Errors()).add(job.measured_seconds, seconds)  # the table counts rates
    return out


def page(jobs: Sequence[Job], base: Base = shipped) -> str:
    """A Markdown section."""
    found = errors(jobs, fit_cards(table_jobs(jobs), base=base))
    lines = ["| execution | torch | card | rows | mean absolute error | wanted | median | 90 % |", "|---|---|---|---|---|---|---|---|"]
    for (execution, version, card), one in sorted(found.items()):
        target = f"{TARGETS[execution]:.0%}" if version == card == "all" and execution in TARGETS else ""
        sizes = f"{one.mean:.1%} | {target} | {one.median:.1%} | {one.decile:.1%}"
        lines.append(f"| {execution} | {version} | {card} | {len(one.values)} | {sizes} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="shipped coefficients fitted without this table")
    strict = parser.parse_args(arguments).strict
    tables = TABLES if strict else [path for path in TABLES if "torch2" in path.name]
    jobs = jobs_of(row for path in tables for row in read_table(path))
    sys.stdout.write(page(jobs, without_table(jobs) if strict else shipped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
