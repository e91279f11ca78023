"""Fit of the shipped latency coefficients on published tables, and its error on sources and cards left out.

    python benchmarks/fit_latency.py [--write] [--leave-out source|card|both] [TABLE ...]

Without arguments: the two bundled tables, and the fitted numbers are printed. ``--write`` puts them into
``calibration/coefficients/defaults.toml``; ``--leave-out`` fits again without each source and each card and prints the
errors on what was left out (some minutes). Needs scipy; traces come from the cache or are made first.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from planner.cost.coefficients import Coefficients, default_coefficients, host_of
from planner.dryrun.trace import Floats
from planner.validate import read_table
from planner.validate.calibrated import Errors, Job, jobs_of
from planner.validate.order import FASTER_BY
from planner.validate.report import job_text, plan_text

ROOT = Path(__file__).resolve().parent.parent
TABLES = (ROOT / "calibration/published/published.csv", ROOT / "calibration/published/torch2_table.csv")
DEFAULTS = ROOT / "calibration/coefficients/defaults.toml"
SHARED = {"8.9": "8.6", "12.0": "8.6"}
"""Capabilities that take another one's numbers: GeForce cards of three generations, whose rates per multiprocessor are equal."""
LABELS: dict[str, Callable[[Job], str]] = {"source": lambda job: job.case.series, "card": lambda job: job.device.name}
_SCALE = 0.1
"""Residuals (of the logarithm) beyond this count linearly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One fitted coefficient: where it stands in the file, its range, and how firmly a prior holds it."""

    section: str
    """``base``, ``host.desktop`` or ``capability.8.0``."""
    name: str
    prior: float
    low: float
    high: float
    sigma: float = 0.5
    """Standard deviation of the prior's logarithm."""


def _share(section: str, name: str, prior: float, sigma: float = 0.5) -> Number:
    return Number(section=section, name=name, prior=prior, low=0.05, high=0.95, sigma=sigma)


NUMBERS = (
    _share("base", "vector_share", 0.7),
    _share("base", "bandwidth_share", 0.8, 0.2),
    Number(section="base", name="pointwise_per_flop", prior=0.015, low=0.003, high=0.1),
    Number(section="base", name="launch_seconds", prior=3e-5, low=5e-6, high=2e-4),
    Number(section="base", name="compiled_launch_seconds", prior=6e-6, low=2e-6, high=3e-5, sigma=0.3),
    Number(section="capability.9.0", name="launch_seconds", prior=2.5e-5, low=5e-6, high=1e-4, sigma=0.3),
    Number(section="host.desktop", name="launch_seconds", prior=1.2e-5, low=3e-6, high=1e-4),
    *(_share(f"capability.{key}", "convolution_share", 0.55, 0.3) for key in ("7.5", "8.0", "8.6")),
    # No row of the fit tells it. An A100 makes 1092 of 2048 operations per multiprocessor and clock, with the kernels that an H100 had.
    _share("capability.9.0", "convolution_share", 0.267, 0.1),
    *(_share(f"capability.{key}", "attention_share", 0.45, 0.3) for key in ("7.5", "8.0", "8.6", "9.0")),
    *(_share(f"capability.{key}", "matmul_share", 0.7, 0.3) for key in ("7.5", "8.0", "8.6", "9.0")),
)


def is_plain(job: Job) -> bool:
    """Nothing quantized, nothing offloaded."""
    return not job.recipe.weights and is_resident(job)


def is_resident(job: Job) -> bool:
    """Nothing offloaded: what the fit looks at."""
    return all(recipe.offload == "none" for recipe in (job.recipe, *job.recipe.only.values()))


def sections(job: Job) -> tuple[str, ...]:
    """Sections of the file that a job's card reads."""
    capability = ".".join(map(str, job.device.compute_capability or ()))
    return ("base", f"host.{host_of(job.device)}", f"capability.{SHARED.get(capability, capability)}")


class Fit:
    """Least squares on the logarithm of predicted over measured, soft in outliers, each (source, card) weighted alike."""

    def __init__(self, jobs: Sequence[Job], numbers: Sequence[Number] = NUMBERS) -> None:
        self.jobs = list(jobs)
        read = {section for job in self.jobs for section in sections(job)}
        self.numbers = [number for number in numbers if number.section in read]
        self.places = [[place for place, number in enumerate(self.numbers) if number.section in sections(job)] for job in self.jobs]
        self.bases = [default_coefficients(job.device) for job in self.jobs]
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for job in self.jobs:
            counts[job.case.series, job.device.name] += 1
        self.weights = np.array([counts[job.case.series, job.device.name] ** -0.25 for job in self.jobs])
        self.prior = np.log([number.prior for number in self.numbers])

    def coefficients(self, values: Floats) -> list[Coefficients]:
        """Coefficients of each job; equal for jobs that read the same numbers."""
        made: dict[tuple[object, ...], Coefficients] = {}
        out = []
        for job, places, base in zip(self.jobs, self.places, self.bases, strict=True):
            key = (job.device.name, *places)
            if key not in made:
                made[key] = base.model_copy(update={self.numbers[place].name: math.exp(values[place]) for place in places})
            out.append(made[key])
        return out

    def errors(self, values: Floats) -> Floats:
        """ln(predicted / measured), job by job."""
        chosen = self.coefficients(values)
        pairs = zip(self.jobs, chosen, strict=True)
        return np.array([math.log((job.seconds(own) or math.inf) / job.measured_seconds) for job, own in pairs])

    def residuals(self, values: Floats) -> Floats:
        sigma = np.array([number.sigma for number in self.numbers])
        return np.concatenate([self.errors(values) * self.weights, 0.1 * (values - self.prior) / sigma])

    def jacobian(self, values: Floats, step: float = 1e-3) -> Floats:
        """Differences forward; numbers that no job reads together are moved together."""
        here = self.errors(values)
        out = np.zeros((len(self.jobs) + len(values), len(values)))
        for group in self._independent():
            moved = values.copy()
            moved[group] += step
            change = (self.errors(moved) - here) / step * self.weights
            for place in group:
                out[: len(self.jobs), place] = [delta if place in own else 0.0 for delta, own in zip(change, self.places, strict=True)]
        for place, number in enumerate(self.numbers):
            out[len(self.jobs) + place, place] = 0.1 / number.sigma
        return out

    def _independent(self) -> list[list[int]]:
        together = [set(places) for places in self.places]
        groups: list[list[int]] = []
        for place in range(len(self.numbers)):
            home = next((group for group in groups if not any(place in own and own & set(group) for own in together)), None)
            if home is None:
                groups.append([place])
            else:
                home.append(place)
        return groups

    def solve(self, start: Mapping[tuple[str, str], float] | None = None) -> Floats:
        """Fitted values, as logarithms; ``start`` is a fit of nearly the same rows."""
        from scipy.optimize import least_squares

        low, high = (np.log([getattr(number, side) for number in self.numbers]) for side in ("low", "high"))
        known = start or {}
        first = np.log([known.get((number.section, number.name), number.prior) for number in self.numbers])
        solved = least_squares(self.residuals, np.clip(first, low + 1e-3, high - 1e-3), jac=self.jacobian, bounds=(low, high),
                               loss="soft_l1", f_scale=_SCALE, x_scale=0.3, max_nfev=40, ftol=1e-3 if start else 1e-4)  # fmt: skip
        return np.asarray(solved.x, dtype=np.float64)

    def named(self, values: Floats) -> dict[tuple[str, str], float]:
        """Section and name to the fitted value."""
        pairs = zip(self.numbers, np.exp(values), strict=True)
        return {(number.section, number.name): float(f"{value:.3g}") for number, value in pairs}


def typical(fitted: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Geometric means over the generations: what a generation without rows gets."""
    found: dict[str, list[float]] = defaultdict(list)
    for (section, name), value in fitted.items():
        if section.startswith("capability.") and name.endswith("_share"):
            found[name].append(math.log(value))
    return {name: float(f"{math.exp(sum(logs) / len(logs)):.3g}") for name, logs in found.items()}


def overridden(fitted: Mapping[tuple[str, str], float], job: Job) -> Coefficients:
    """The shipped coefficients of a job's card with the fitted numbers in place; nothing fitted is left of the shipped ones."""
    own = typical(fitted) | {name: value for section in sections(job) for (where, name), value in fitted.items() if where == section}
    return default_coefficients(job.device).model_copy(update=own)


def left_out(jobs: Sequence[Job], label: Callable[[Job], str], start: Mapping[tuple[str, str], float]) -> dict[str, Errors]:
    """Errors on each label's rows by a fit that never saw them; ``start`` only saves time."""
    out = {}
    for name in sorted({label(job) for job in jobs}):
        fit = Fit([job for job in jobs if label(job) != name and is_resident(job)])
        fitted = fit.named(fit.solve(start))
        out[name] = errors_of([job for job in jobs if label(job) == name], partial(overridden, fitted))
    return out


def faster_pairs(jobs: Sequence[Job], errors: Mapping[str, Errors], label: Callable[[Job], str]) -> tuple[int, int]:
    """Pairs of plans for one job on one card of one source whose times differ by over 10 %, and how many are in the right order."""
    predicted: dict[tuple[str, ...], list[tuple[Job, float]]] = defaultdict(list)
    for name, found in errors.items():
        for job, error in zip([job for job in jobs if label(job) == name], found.values, strict=True):
            kind = (job.case.series, job.device.name, job.row.metric, job_text(job.case))
            predicted[kind].append((job, job.measured_seconds * (1.0 + error)))
    pairs = right = 0
    for group in predicted.values():
        for (first, one), (second, other) in combinations(group, 2):
            ratio = first.measured_seconds / second.measured_seconds
            if plan_text(first.case) != plan_text(second.case) and max(ratio, 1 / ratio) > 1 + FASTER_BY:
                pairs, right = pairs + 1, right + ((one - other) * (ratio - 1) > 0)
    return pairs, right


def errors_of(jobs: Sequence[Job], coefficients: Callable[[Job], Coefficients]) -> Errors:
    """Relative errors of all jobs."""
    errors = Errors()
    for job in jobs:
        errors.add(job.seconds(coefficients(job)) or math.inf, job.measured_seconds)
    return errors


def written(text: str, fitted: dict[tuple[str, str], float]) -> str:
    """The file's text with the fitted numbers replaced; the places must be there already."""
    targets = dict(fitted) | {("base", name): value for name, value in typical(fitted).items()}
    for key, like in SHARED.items():
        targets |= {(f"capability.{key}", name): value for (section, name), value in fitted.items() if section == f"capability.{like}"}
    section, out = "", []
    for line in text.splitlines():
        head = re.fullmatch(r'\[([\w.]+?)(?:\."([\d.]+)")?\]', line.strip())
        if head:
            section = head.group(1) + (f".{head.group(2)}" if head.group(2) else "")
        name = line.partition(" = ")[0]
        out.append(f"{name} = {targets[section, name]!r}" if (section, name) in targets else line)
    return "\n".join(out) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, default=list(TABLES))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--leave-out", choices=("source", "card", "both"), help="refit without each source, each card, or both in turn")
    given = parser.parse_args(arguments)
    jobs = jobs_of(row for path in given.tables for row in read_table(path))
    fit = Fit([job for job in jobs if is_resident(job)])
    fitted = fit.named(fit.solve())
    for (section, name), value in fitted.items():
        print(f"{section}.{name} = {value:g}")
    print(f"rows of the fit: {errors_of(fit.jobs, partial(overridden, fitted)).text()}")
    print(f"all rows:        {errors_of(jobs, partial(overridden, fitted)).text()}")
    if given.write:
        DEFAULTS.write_text(written(DEFAULTS.read_text(encoding="utf-8"), fitted), encoding="utf-8")
    if given.leave_out:
        for kind, label in LABELS.items():
            if given.leave_out not in (kind, "both"):
                continue
            print(f"\neach {kind} left out")
            found = left_out(jobs, label, fitted)
            for name, errors in found.items():
                print(f"  {name:28} {errors.text()}", flush=True)
            print(f"  {'all':28} {Errors([value for errors in found.values() for value in errors.values]).text()}")
            pairs, right = faster_pairs(jobs, found, label)
            print(f"  which of two plans is faster: {right} of {pairs} right ({right / max(pairs, 1):.1%})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
