"""A report as text, as JSON lines and as a picture. Nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from planner.errors import UsageError
from planner.files import write_text
from planner.validate.order import Ordering
from planner.validate.report import Report
from planner.validate.stats import RowResult, Statistics

_HEAD = ("", "n", "median", "mean", "bias", "90 %", "inside", "worst")
_FIELDS = ("id", "metric", "measured", "predicted", "low", "high", "expressed", "reason")


def _percent(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value * 100:+.1f}" if signed else f"{value * 100:.1f}"


def _statistics_line(name: str, s: Statistics) -> tuple[str, ...]:
    errors = (_percent(s.median_absolute), _percent(s.mean_absolute), _percent(s.bias, True), _percent(s.percentile_90))
    inside = "-" if s.coverage is None else f"{s.coverage * 100:.0f}"
    return (name, str(s.n), *errors, inside, " ".join(s.worst))


def _table(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """First and last columns to the left, the others to the right."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            text.ljust(width) if place in (0, last) else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _section(title: str, groups: dict[str, Statistics]) -> list[str]:
    if not groups:
        return []
    lines = [(title, *_HEAD[1:]), *(_statistics_line(name, s) for name, s in groups.items())]
    return ["", *_table(lines)]


def _ordering(what: str, order: Ordering) -> str:
    if not order.pairs:
        return f"{what}: no pairs"
    wrong = ", ".join(f"{a} / {b}" for a, b in order.wrong[:3])
    tail = f"; wrong: {wrong}{' ...' if len(order.wrong) > 3 else ''}" if wrong else ""
    return f"{what}: {order.right} of {order.pairs} pairs right ({_percent(order.share)} %){tail}"


def _decisions(report: Report) -> list[str]:
    oom = report.oom
    lines = [
        f"fit / OOM: {oom.fit_as_fit} fits and {oom.oom_as_oom} OOMs right; "
        f"{oom.fit_as_oom} fits called OOM, {oom.oom_as_fit} OOMs called fit"
        + (f"; wrong: {' '.join(oom.wrong[:6])}" if oom.wrong else ""),
        _ordering("faster plan for the same job", report.faster),
        _ordering("faster of any two rows of a source", report.faster_of_any),
    ]
    return ["", *lines, *(_ordering(f"offload ladder {name}", order) for name, order in report.ladders.items())]


def _unexpressed(report: Report) -> list[str]:
    groups: dict[str, list[str]] = {}
    for result in report.rows:
        if not result.expressed:
            groups.setdefault(result.reason or "?", []).append(result.row)
    if not groups:
        return []
    lines = ["", "not expressed:"]
    for reason, rows in groups.items():
        shown = " ".join(rows[:6]) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")
        lines.append(f"  {len(rows):>4}  {reason}: {shown}")
    return lines


def render_text(report: Report) -> str:
    """The report in plain, aligned text; errors in per cent of the measured value."""
    expressed = sum(result.expressed for result in report.rows)
    lines = [f"{len(report.rows)} rows, {expressed} expressed ({_percent(expressed / len(report.rows))} %)"]
    lines += ["error in % of the measured value; inside: % of measured values in the predicted 90 % interval"]
    lines += _section("metric", report.by_metric) + _section("source, metric", report.by_source)
    return "\n".join(lines + _decisions(report) + _unexpressed(report)) + "\n"


def row_record(result: RowResult) -> dict[str, Any]:
    """The eight published fields of a row. ``id`` is the row's number (an integer) where the table has no ids."""
    name: str | int = int(result.row) if result.numbered else result.row
    values = (name, result.metric, result.measured, result.predicted, result.low, result.high)
    return dict(zip(_FIELDS, (*values, result.expressed, result.reason), strict=True))


def write_jsonl(results: Iterable[RowResult], path: str | Path) -> None:
    """One JSON line per row. Raises UsageError when the file cannot be written."""
    text = "".join(json.dumps(row_record(result), ensure_ascii=False, allow_nan=False) + "\n" for result in results)
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error}); choose another --out.") from error


def _panel(axis: Any, title: str, results: Sequence[RowResult]) -> None:
    for series in sorted({result.series for result in results}):
        mine = [result for result in results if result.series == series]
        axis.scatter([r.measured for r in mine], [r.predicted for r in mine], s=12, alpha=0.7, label=series)
    values = [value for r in results for value in (r.measured, r.predicted) if value]
    low, high = min(values) * 0.8, max(values) * 1.25
    for factor, style in ((1.0, "-"), (0.9, ":"), (1.1, ":")):
        axis.plot([low, high], [low * factor, high * factor], style, color="grey", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="measured", ylabel="predicted", title=title)
    axis.legend(fontsize=5)


def plot(report: Report, path: str | Path) -> None:
    """Predicted against measured, one panel per metric, with lines at 10 % either side.

    Raises:
        UsageError: matplotlib is not installed, nothing can be drawn, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("A plot needs matplotlib, which is not installed; run: pip install 'diffusers-planner[plot]'.") from error
    drawn = {name: [r for r in report.rows if r.metric == name and r.error is not None and r.predicted] for name in
             report.by_metric}  # fmt: skip
    panels = {name: rows for name, rows in drawn.items() if rows}
    if not panels:
        raise UsageError("There is nothing to plot: no row has a prediction above zero.")
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, rows) in enumerate(panels.items(), start=1):
        _panel(figure.add_subplot(1, len(panels), place), name, rows)
    try:
        figure.savefig(str(path), dpi=120, metadata={"Software": None} if str(path).endswith(".png") else None)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the plot cannot be written ({error}); give a .png, .svg or .pdf path.") from error
