"""Pictures of a report: predicted against measured, regret, ratios to today's practices. PNG by matplotlib, no display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.evaluate import Group, Row
from benchmarks.gpu.practices import WORDS
from planner.units import GIB


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Without a date inside, so that the same runs give the same bytes."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def scatter(rows: Sequence[Row], what: str, path: Path) -> bool:
    """Predicted against measured ``memory`` (GiB) or ``time`` (s), one colour per subject; False when there is nothing to draw."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pair = _memory(row) if what == "memory" else _time(row)
        if pair is not None:
            points.setdefault(row.record.cell.subject, []).append(pair)
    if not points:
        return False
    figure, axes = _figure(6.5, 6)
    for subject, pairs in sorted(points.items()):
        axes.scatter([x for x, _ in pairs], [y for _, y in pairs], s=16, alpha=0.7, label=subject)
    ends = [value for pairs in points.values() for pair in pairs for value in pair]
    line = [min(ends) / 1.2, max(ends) * 1.2]
    axes.plot(line, line, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
    unit = "GiB peak allocated" if what == "memory" else "seconds per call"
    axes.set(xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}")
    axes.legend(fontsize=8)
    _save(figure, path)
    return True


def _memory(row: Row) -> tuple[float, float] | None:
    peak = row.record.seen.steady.peak_allocated_bytes if row.record.seen else None
    return (peak / GIB, row.predicted.peak_allocated_bytes / GIB) if peak else None


def _time(row: Row) -> tuple[float, float] | None:
    return (row.seconds, row.predicted.latency_seconds) if row.seconds else None


def regrets(groups: Sequence[Group], path: Path) -> bool:
    """A bar of regret for every small card; those whose chosen plan did not run are marked."""
    known = [(group.name, regret) for group in groups if (regret := group.regret(group.chosen)) is not None]
    if not known:
        return False
    figure, axes = _figure(8, 1.2 + 0.3 * len(known))
    for place, (_, regret) in enumerate(known):
        if math.isfinite(regret):
            axes.barh(place, 100 * regret, color="tab:blue")
        else:
            axes.text(0, place, " ran out of memory", va="center", color="tab:red")
    axes.axvline(10, color="grey", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(known)), [name for name, _ in known], fontsize=8)
    axes.set(xlabel="regret, % slower than the fastest measured plan")
    axes.invert_yaxis()
    _save(figure, path)
    return True


def ratios(groups: Sequence[Group], path: Path) -> bool:
    """How many times faster the chosen plan is than each practice, card by card; a cross where the practice did not run."""
    groups = [group for group in groups if group.practices and group.chosen is not None]
    if not groups:
        return False
    names = [name for name in WORDS if any(record.cell.practice == name for group in groups for record in group.practices)]
    figure, axes = _figure(8, 1.4 + 0.35 * len(groups))
    marks = dict(zip(names, "osD^v", strict=False))
    for name in names:
        places = [(ratio, number) for number, group in enumerate(groups) for record in group.practices
                  if record.cell.practice == name and (ratio := group.ratio(record, group.chosen)) is not None]  # fmt: skip
        axes.scatter([x for x, _ in places], [y for _, y in places], marker=marks[name], s=28, label=WORDS[name])
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(groups)), [group.name for group in groups], fontsize=8)
    axes.set(xscale="log", xlabel="times faster than the practice")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    _save(figure, path)
    return True


__all__ = ["ratios", "regrets", "scatter"]
