"""Order instead of size: which of two plans is faster, and which offload needs less."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

from planner.types import Frozen
from planner.validate.stats import RowResult

FASTER_BY = 0.10
"""Pairs whose measured values differ by no more than this share are not asked about."""
LEANER_BY = 0.02
TIMED = ("latency_s", "it_per_s")
Pair = tuple[RowResult, RowResult]


class Ordering(Frozen):
    """How many pairs were in the right order, and the ones that were not."""

    pairs: int = 0
    right: int = 0
    wrong: tuple[tuple[str, str], ...] = ()

    @property
    def share(self) -> float | None:
        """Share of pairs in the right order; None without pairs."""
        return self.right / self.pairs if self.pairs else None


def _differ(pair: Pair, by: float) -> bool:
    low, high = sorted((pair[0].measured, pair[1].measured))
    return low > 0 and high / low > 1 + by


def _judge(pairs: Iterable[Pair]) -> Ordering:
    """A predicted tie is a wrong answer."""
    right, wrong = 0, []
    for first, second in pairs:
        assert first.predicted is not None
        assert second.predicted is not None
        measured, predicted = first.measured - second.measured, first.predicted - second.predicted
        if measured * predicted > 0:
            right += 1
        else:
            wrong.append((first.row, second.row))
    return Ordering(pairs=right + len(wrong), right=right, wrong=tuple(wrong))


def _pairs(results: Sequence[RowResult], key: Callable[[RowResult], tuple[str, ...]], by: float) -> Iterable[Pair]:
    groups: dict[tuple[str, ...], list[RowResult]] = defaultdict(list)
    for result in results:
        if result.predicted is not None and result.expressed:
            groups[key(result)].append(result)
    for members in groups.values():
        yield from (pair for pair in combinations(members, 2) if _differ(pair, by))


def faster(results: Sequence[RowResult]) -> Ordering:
    """Pairs of different plans for the same job, on the same card, from the same source and with the same metric."""
    timed = [result for result in results if result.metric in TIMED]
    pairs = _pairs(timed, lambda r: (r.series, r.gpu or "", r.metric, r.job), FASTER_BY)
    return _judge(pair for pair in pairs if pair[0].plan != pair[1].plan)


def faster_of_any(results: Sequence[RowResult]) -> Ordering:
    """As :func:`faster`, for any two different rows of a source on one card: jobs may differ as well."""
    timed = [result for result in results if result.metric in TIMED]
    pairs = _pairs(timed, lambda r: (r.series, r.gpu or "", r.metric), FASTER_BY)
    return _judge(pair for pair in pairs if (pair[0].plan, pair[0].job) != (pair[1].plan, pair[1].job))


def ladders(results: Sequence[RowResult]) -> dict[str, Ordering]:
    """Per series: peak memory of the same job under different offload, two at a time.

    Rows of a ladder may differ in quantization and tiling too, as published ladders do.
    """
    peaks = [result for result in results if result.metric.startswith("peak_") or result.metric == "nvidia_smi_gb"]
    by_series: dict[str, list[Pair]] = defaultdict(list)
    for pair in _pairs(peaks, lambda r: (r.series, r.gpu or "", r.metric, r.job), LEANER_BY):
        if pair[0].offload != pair[1].offload:
            by_series[pair[0].series].append(pair)
    return {series: _judge(pairs) for series, pairs in sorted(by_series.items())}
