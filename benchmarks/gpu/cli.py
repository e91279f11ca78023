"""The command: ``python -m benchmarks.gpu --budget-seconds N --out DIR``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.records import Cell, CellList, Kind
from planner.errors import EXIT_FAULT, EXIT_OK, PlannerError, ProfileError, UsageError
from planner.types import Device

KINDS: tuple[Kind, ...] = ("plan", "capped", "practice", "probe")
PREPARED = "cells.json"
MAX_PREPARED_BYTES = 15 << 20
RESERVE_SECONDS = 6.0
"""Kept back at the end: stopping the worker, reading the records, printing the summary."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure on this GPU what the planner predicts.")
    found.add_argument("--budget-seconds", type=float, help="wall time for everything, planning the cells included")
    found.add_argument("--out", type=Path, required=True, help="folder for the raw results")
    found.add_argument("--cells", default=",".join(KINDS), help=f"kinds of cells, separated by commas: {', '.join(KINDS)}")
    found.add_argument("--subjects", help="models, separated by commas (default: all five; tiny:sd15 is a small one for rehearsals)")
    found.add_argument("--resume", action="store_true", help="go on in a folder that has results; finished cells are skipped")
    found.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA when there is a GPU, else the CPU")
    found.add_argument("--prepare", action="store_true", help=f"only plan the cells and write DIR/{PREPARED}; needs no GPU with --gpu")
    found.add_argument("--gpu", help="with --prepare: the GPU profile to plan for, such as H200")
    found.add_argument("--list", action="store_true", help="print the cells in the order of value per second, measure nothing")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when the campaign ended by itself, 2 for a wrong call, 3 for a fault."""
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given = parser().parse_args(argv)
    try:
        return _run(given, started)
    except PlannerError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return error.exit_code or EXIT_FAULT


def _run(given: argparse.Namespace, started: float) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    kinds, names = _kinds(given.cells), _names(given.subjects)
    if given.gpu and not given.prepare and not given.list:
        raise UsageError("--gpu names a GPU to plan cells for; a campaign measures the one that is here. Add --prepare.")
    if given.prepare or given.list:
        return _planned(given, kinds, names)
    if given.budget_seconds is None or given.budget_seconds <= 0:
        raise UsageError("give the wall time that the campaign may take: --budget-seconds N.")
    return _measured(given, kinds, names, started)


def _kinds(text: str) -> frozenset[str]:
    found = frozenset(word.strip() for word in text.split(",") if word.strip())
    if unknown := found - set(KINDS):
        raise UsageError(f"--cells {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}.")
    return found


def _names(text: str | None) -> tuple[str, ...]:
    from benchmarks.gpu.subjects import SUBJECTS, find_subject

    if text is None:
        return tuple(subject.name for subject in SUBJECTS)
    return tuple(find_subject(word.strip()).name for word in text.split(",") if word.strip())


# -- the cells --------------------------------------------------------------------------------------------------------


def _planned(given: argparse.Namespace, kinds: frozenset[str], names: Sequence[str]) -> int:
    from benchmarks.gpu.machine import commit
    from benchmarks.gpu.schedule import ordered

    device = device_for(given.gpu, given.device)
    cells = plan(device, kinds, names)
    if given.list:
        for cell in ordered(cells):
            print(f"{cell.value / cell.cost_seconds:9.3f}/s {cell.cost_seconds:8.1f} s  {cell.key}  {cell.note}")
        print(f"{len(cells)} cells, {sum(cell.cost_seconds for cell in cells):.0f} s in all, for {device.name}")
    if given.prepare:
        given.out.mkdir(parents=True, exist_ok=True)
        prepared = CellList(device=device, commit=commit(), cells=tuple(cells))
        (given.out / PREPARED).write_text(prepared.model_dump_json(by_alias=True) + "\n", encoding="utf-8")
        print(f"{given.out / PREPARED}: {len(cells)} cells for {device.name}")
    return EXIT_OK


def device_for(gpu: str | None, kind: str | None) -> Device:
    """A profile's device, or the one that is here. Raises HardwareError."""
    from planner.hardware.detect import detect_device
    from planner.hardware.profiles import device_from_profile, find_gpu

    if gpu is not None:
        return device_from_profile(find_gpu(gpu)[0])
    return detect_device(kind)


def plan(device: Device, kinds: frozenset[str], names: Sequence[str]) -> list[Cell]:
    """All cells of these subjects on the device; the whole device is their budget but for a headroom."""
    from benchmarks.gpu.cells import cells_for
    from benchmarks.gpu.subjects import find_subject
    from planner.targets import with_budget

    return list(cells_for([find_subject(name) for name in names], with_budget(device, None), kinds, _say))


def read_prepared(path: Path, device: Device, kinds: frozenset[str], names: Sequence[str]) -> list[Cell] | None:
    """Prepared cells of the asked kinds and subjects; None when there is no such file, or it is for another kind of device.

    Raises:
        ProfileError: the file is too large or no list of cells.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_PREPARED_BYTES:
        raise ProfileError(f"{path}: larger than any list of cells ({MAX_PREPARED_BYTES} bytes); make it again with --prepare.")
    try:
        prepared = CellList.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProfileError(f"{path}: not a list of cells ({str(error).splitlines()[0]}); make it again with --prepare.") from error
    here, there = device, prepared.device
    if (here.kind, here.compute_capability) != (there.kind, there.compute_capability) or here.total_bytes < 0.9 * there.total_bytes:
        print(f"{path.name} was prepared for {there.name}, this is {here.name}: cells are planned anew", file=sys.stderr)
        return None
    wanted = {*names, "device"}
    return [cell for cell in prepared.cells if cell.kind in kinds and cell.subject in wanted]


# -- the campaign -----------------------------------------------------------------------------------------------------


def _measured(given: argparse.Namespace, kinds: frozenset[str], names: Sequence[str], started: float) -> int:
    from benchmarks.gpu.campaign import Campaign
    from benchmarks.gpu.cells import switch_seconds
    from benchmarks.gpu.ledger import Ledger, latest
    from benchmarks.gpu.pool import Pool
    from benchmarks.gpu.subjects import find_subject
    from benchmarks.gpu.summary import describe, render
    from planner.calibrate.store import now

    ledger = Ledger(given.out)
    if ledger.files() and not given.resume:
        raise UsageError(f"{given.out} has results already; add --resume to go on, or give another folder.")
    device = device_for(None, given.device)
    cells = read_prepared(given.out / PREPARED, device, kinds, names)
    if cells is None:
        cells = plan(device, kinds, names)
    print(f"{len(cells)} cells for {device.name}, ready after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="planner-campaign-") as cache:
        pool = Pool(device.kind, now(), switch_seconds(find_subject(name) for name in names), given.out / "workers.log", Path(cache))
        campaign = Campaign(ledger, pool, time.monotonic, started, given.budget_seconds - RESERVE_SECONDS, _say,
                            lambda record: _say(f"         {describe(record)}"))  # fmt: skip
        outcome = campaign.run(cells)
    text = render(outcome, latest(ledger.records()), given.budget_seconds)
    (given.out / "summary.txt").write_text(text, encoding="utf-8")
    print(text, end="")
    return EXIT_OK


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


__all__ = ["KINDS", "PREPARED", "device_for", "main", "parser", "plan", "read_prepared"]
