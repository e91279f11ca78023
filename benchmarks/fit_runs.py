"""Coefficients of an architecture from the probes of campaigns, as a table for ``calibration/coefficients/defaults.toml``.

    python -m benchmarks.fit_runs calibration/runs/*.jsonl

Prints; writes nothing: shipped defaults are changed by hand, with the residual that is printed beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.ledger import latest, read_records
from benchmarks.gpu.predictions import by_machine, fitted, machine_of
from benchmarks.gpu.records import Machine
from planner.calibrate.fit import Fit
from planner.cost.coefficients import default_coefficients

FITTED = ("matmul_share", "convolution_share", "attention_share", "bandwidth_share", "kernel_seconds", "launch_seconds", "link_share",
          "pageable_share", "picture_bytes_per_second")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0 when something was fitted, 1 when no file has a usable probe."""
    parser = argparse.ArgumentParser(description="Fit coefficients on the probes of raw runs.")
    parser.add_argument("runs", nargs="+", type=Path)
    given = parser.parse_args(argv)
    records = latest([record for path in given.runs for record in read_records(path)])
    done = 0
    for found in by_machine(records).values():
        machine = machine_of(found)
        fit = fitted(found, machine.device) if machine is not None else None
        if machine is not None and fit is not None:
            print(as_toml(machine, fit))
            done += 1
    if not done:
        print("no probe of a device in these runs; a campaign makes them unless --cells leaves `probe` out", file=sys.stderr)
    return 0 if done else 1


def as_toml(machine: Machine, fit: Fit) -> str:
    """The table of one capability: what the probes changed against the shipped defaults, and the context that was seen."""
    shipped = default_coefficients(machine.device)
    capability = machine.device.compute_capability
    where = "cpu" if capability is None else f'capability."{capability[0]}.{capability[1]}"'
    lines = [f"# {machine.device.name}: {fit.samples} probes, median residual {100 * fit.median_residual:.1f} %", f"[{where}]"]
    for name in FITTED:
        value = getattr(fit.coefficients, name)
        if value != getattr(shipped, name):
            lines.append(f"{name} = {value!r}  # shipped: {getattr(shipped, name)!r}")
    if machine.context_bytes is not None:
        lines.append(f"context_bytes = {machine.context_bytes}  # shipped: {shipped.context_bytes}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
