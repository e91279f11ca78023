"""Validation: every row of a table beside what the planner says of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from planner.errors import PlannerError
from planner.types import Frozen
from planner.validate.case import Case, Prediction, Unexpressed
from planner.validate.express import express
from planner.validate.order import Ordering, faster, faster_of_any, ladders
from planner.validate.rows import PublishedRow, Row
from planner.validate.stats import Confusion, RowResult, Statistics, confusion, statistics

Predict = Callable[[Case], Prediction]


class Report(Frozen):
    """Results per row and the statistics over them."""

    rows: tuple[RowResult, ...]
    by_metric: dict[str, Statistics]
    by_source: dict[str, Statistics]
    """Keyed ``series, metric``."""
    oom: Confusion
    faster: Ordering
    faster_of_any: Ordering
    ladders: dict[str, Ordering]


def _numbered(row: Row) -> bool:
    return not (isinstance(row, PublishedRow) and row.id)


def plan_text(case: Case) -> str:
    """What the row did, apart from the work: equal texts are equal plans."""
    parts = [f"{name}={value}" for name, value in sorted(case.settings.items())]
    parts += [f"without {name}" for name in case.without]
    return " ".join(parts + [f"{name}: {checkpoint}" for name, checkpoint in sorted(case.replaced.items())])


def _offload(case: Case) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(case.settings.items()) if "offload" in name)


def job_text(case: Case) -> str:
    """What the row worked on: rows of equal text can be compared."""
    inputs = " ".join(f"{name}={value}" for name, value in sorted(case.inputs.items()))
    return f"{case.model} {case.subject} {case.workload.model_dump_json(exclude_none=True)} {inputs}".strip()


def _result(row: Row, case: Case, prediction: Prediction) -> RowResult:
    reason = prediction.reason
    if prediction.value is None and reason is None:
        reason = "no prediction was made"
    return RowResult(
        row=case.row, numbered=_numbered(row), line=row.line, series=case.series, source=case.source, metric=case.metric,
        measured=case.measured, predicted=prediction.value, low=prediction.low, high=prediction.high,
        expressed=prediction.value is not None, reason=reason if prediction.value is None else None,
        fits=prediction.fits if row.gpu else None, tolerance=case.tolerance, gpu=case.gpu,
        plan=plan_text(case), offload=_offload(case), job=job_text(case),
    )  # fmt: skip


def _refused(row: Row, refusal: Unexpressed) -> RowResult:
    return RowResult(
        row=refusal.row,
        numbered=_numbered(row),
        line=row.line,
        series=refusal.series,
        source=refusal.source,
        metric=refusal.metric,
        measured=refusal.measured,
        expressed=False,
        reason=refusal.reason,
        gpu=row.gpu or None,
    )


def _grouped(results: Sequence[RowResult], key: Callable[[RowResult], str]) -> dict[str, Statistics]:
    groups: dict[str, list[RowResult]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return {name: statistics(groups[name]) for name in sorted(groups) if any(r.expressed for r in groups[name])}


def summarize(results: Sequence[RowResult]) -> Report:
    """Statistics over results, in a fixed order."""
    rows = tuple(results)
    return Report(
        rows=rows,
        by_metric=_grouped([r for r in rows if r.metric != "oom"], lambda r: r.metric),
        by_source=_grouped([r for r in rows if r.metric != "oom"], lambda r: f"{r.series}, {r.metric}"),
        oom=confusion(rows),
        faster=faster(rows),
        faster_of_any=faster_of_any(rows),
        ladders=ladders(rows),
    )


def _predicted(case: Case, predict: Predict) -> Prediction:
    try:
        return predict(case)
    except PlannerError as error:
        return Prediction(reason=str(error))


def validate(rows: Iterable[Row], predict: Predict) -> Report:
    """Predict every row. ``predict`` answers a case in the row's unit; a PlannerError it raises becomes the reason."""
    results = []
    for row in rows:
        case = express(row)
        results.append(_refused(row, case) if isinstance(case, Unexpressed) else _result(row, case, _predicted(case, predict)))
    return summarize(results)
