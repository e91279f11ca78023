"""``planner validate``: published measurements against predictions.

A table is read (:mod:`rows`), each row is put in the planner's vocabulary (:mod:`express`), the injected ``predict``
prices it, and :mod:`report` compares. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from planner.validate.case import Case, Prediction, Unexpressed
from planner.validate.counters import value_from_estimate
from planner.validate.express import express
from planner.validate.render import plot, render_text, row_record, write_jsonl
from planner.validate.report import Predict, Report, summarize, validate
from planner.validate.rows import PublishedRow, Row, Torch2Row, read_table
from planner.validate.stats import RowResult, Statistics


def run(path: str | Path, predict: Predict, *, out: str | Path | None = None, plot_path: str | Path | None = None) -> Report:
    """Validate a table in either format; write JSON lines to ``out`` and a picture to ``plot_path`` when given.

    Raises:
        UsageError: the file is none of the two formats, or an output cannot be written.
        ProfileError: a row of the table is broken.
    """
    report = validate(read_table(path), predict)
    if out is not None:
        write_jsonl(report.rows, out)
    if plot_path is not None:
        plot(report, plot_path)
    return report


__all__ = [
    "run", "validate", "summarize", "express", "read_table", "value_from_estimate", "render_text", "write_jsonl",
    "row_record", "plot", "Case", "Unexpressed", "Prediction", "Predict", "Report", "RowResult", "Statistics", "Row",
    "PublishedRow", "Torch2Row",
]  # fmt: skip
