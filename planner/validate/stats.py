"""Error statistics over results: plain arithmetic, nothing of tables or models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.types import Frozen


class RowResult(Frozen):
    """What one row came to. ``expressed`` is true only where a prediction stands beside the measurement."""

    row: str
    numbered: bool = False
    """``row`` is the row's number, because the table has no id for it."""
    line: int
    series: str
    source: str
    metric: str
    measured: float
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    expressed: bool
    reason: str | None = None
    fits: bool | None = None
    """Predicted to fit the card; None: unknown."""
    tolerance: float | None = None
    gpu: str | None = None
    plan: str = ""
    """Settings in one line; rows with equal text are the same plan."""
    offload: str = ""
    job: str = ""
    """Model, workload and inputs in one line: what was computed, however it was run."""

    @property
    def error(self) -> float | None:
        """Signed relative error, predicted over measured less one; None without a prediction or for a zero."""
        if self.predicted is None or self.measured == 0 or self.metric == "oom":
            return None
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measurement lies in the predicted interval; None without one."""
        if self.low is None or self.high is None or self.metric == "oom":
            return None
        return self.low <= self.measured <= self.high


class Statistics(Frozen):
    """Errors of a group of rows, as shares (0.03 is 3 %). None where no row has a prediction."""

    n: int
    median_absolute: float | None = None
    mean_absolute: float | None = None
    bias: float | None = None
    """Median signed error."""
    percentile_90: float | None = None
    """90th percentile of the absolute error."""
    coverage: float | None = None
    """Share of measurements inside the predicted interval."""
    worst: tuple[str, ...] = ()
    """Rows with the largest absolute errors, worst first."""


class Confusion(Frozen):
    """Fit and OOM, measured against predicted."""

    fit_as_fit: int = 0
    fit_as_oom: int = 0
    oom_as_oom: int = 0
    oom_as_fit: int = 0
    wrong: tuple[str, ...] = ()


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between ranks, as numpy's default. ``values`` must not be empty.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def statistics(results: Sequence[RowResult], worst: int = 3) -> Statistics:
    """Statistics of the rows that have a numeric error; ``worst`` rows are named."""
    errors = [(result.row, result.error) for result in results]
    known = [(row, error) for row, error in errors if error is not None]
    if not known:
        return Statistics(n=0)
    absolute = [abs(error) for _, error in known]
    inside = [result.inside for result in results if result.error is not None and result.inside is not None]
    ranked = sorted(known, key=lambda pair: (-abs(pair[1]), pair[0]))
    return Statistics(
        n=len(known),
        median_absolute=percentile(absolute, 0.5),
        mean_absolute=sum(absolute) / len(absolute),
        bias=percentile([error for _, error in known], 0.5),
        percentile_90=percentile(absolute, 0.9),
        coverage=sum(inside) / len(inside) if inside else None,
        worst=tuple(row for row, _ in ranked[:worst]),
    )


def confusion(results: Sequence[RowResult]) -> Confusion:
    """Every row whose source names a card counts: a published number is a published fit."""
    counts = {(False, True): 0, (False, False): 0, (True, False): 0, (True, True): 0}
    wrong = []
    for result in results:
        if result.fits is None or not result.expressed:
            continue
        ran_out = result.metric == "oom" and result.measured > 0
        counts[ran_out, result.fits] += 1
        if ran_out == result.fits:
            wrong.append(result.row)
    return Confusion(
        fit_as_fit=counts[False, True],
        fit_as_oom=counts[False, False],
        oom_as_oom=counts[True, False],
        oom_as_fit=counts[True, True],
        wrong=tuple(wrong),
    )
