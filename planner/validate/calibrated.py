"""Predictions of a table's times after fitting a few numbers per card on a few of its rows: what calibration is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.cost.coefficients import Coefficients, default_coefficients
from planner.cost.estimate import step_seconds
from planner.cost.model import CallCost, Cost, CostModel, PhaseCost
from planner.cost.transfer import transfer_seconds
from planner.dryrun.trace import Floats
from planner.errors import PlannerError
from planner.recipe import Recipe
from planner.types import Device
from planner.validate.case import Case
from planner.validate.express import express
from planner.validate.predict import Predictor, then
from planner.validate.report import Predict
from planner.validate.rows import Row, Torch2Row

TIMED = ("latency_seconds", "step_seconds", "steps_per_second", "call_steps_per_second")
Anchors = Callable[[Row], bool]
Base = Callable[["Job"], Coefficients]
_PRIOR = 0.05
"""Weight of the shipped coefficients in a fit on three rows: one standard deviation of a row counts as 20 of the prior's."""


@dataclass(frozen=True, slots=True)
class Job:
    """One measured time and all that predicts it again under other coefficients."""

    row: Row
    case: Case
    model: CostModel
    recipe: Recipe

    @property
    def device(self) -> Device:
        return self.model.device

    @property
    def measured_seconds(self) -> float:
        """The row's number as seconds: of a step where it counts steps, else of the call."""
        steps = self.case.workload.num_inference_steps or 1
        value = self.case.measured_si
        if self.case.counter == "steps_per_second":
            return 1.0 / value
        return steps / value if self.case.counter == "call_steps_per_second" else value

    def seconds(self, coefficients: Coefficients) -> float | None:
        """The same number predicted; None when the pipeline has no steps."""
        coefficients = then(self.case, self.device, coefficients)
        return predicted_seconds(self.model, self.recipe, coefficients, self.case.counter in ("step_seconds", "steps_per_second"))


def predicted_seconds(model: CostModel, recipe: Recipe, coefficients: Coefficients, of_step: bool) -> float | None:
    """Time of a call or of one of its steps, memory left out, which makes it fast enough for a fit."""
    if model.coefficients is not coefficients and model.coefficients != coefficients:
        model.coefficients = coefficients
        model.forget()
    cost = _timed(model, recipe)
    return step_seconds(model, cost) if of_step else cost.seconds


def _timed(model: CostModel, recipe: Recipe) -> Cost:
    trace = model.trace_for(recipe)
    placed = model.residency(trace, recipe)
    counts, _ = model.held(trace)
    phases = []
    for index in range(len(trace.calls)):
        time = model.call_seconds(trace, index, recipe)
        moved = transfer_seconds(placed, index, counts[index], time, model.device, model.coefficients, recipe,
                                 trace.calls[index].component)  # fmt: skip
        compute = model.compute_seconds(trace, index, time, recipe)
        phases.append(PhaseCost(index, counts[index], 0, 0, CallCost(0, 0, 0, 0, time), compute, moved, False))
    around = model.around_cost(trace, recipe, placed)
    return Cost(tuple(phases), 0, 0, 0, around.glue_seconds, around.host_seconds, 0.0, 0, 0, placed, trace, recipe.calls)


def jobs_of(rows: Iterable[Row], predictor: Predictor | None = None) -> list[Job]:
    """Every row with a time that the planner can price."""
    predictor = predictor or Predictor()
    out = []
    for row in rows:
        case = express(row)
        if not isinstance(case, Case) or case.counter not in TIMED or case.gpu is None:
            continue
        try:
            model, recipe = predictor.priced(case)
            job = Job(row, case, model, recipe)
            known = job.seconds(model.coefficients) is not None
        except PlannerError:
            continue
        if known:
            out.append(job)
    return out


# -- a fit on few rows ------------------------------------------------------------------------------------------------


def scaled(base: Coefficients, values: Floats) -> Coefficients:
    """``base`` with compute and bandwidth shares scaled and launches at another pace; ``values`` are natural logarithms."""
    compute, bandwidth, launch = np.exp(values[:3])
    pointwise = base.pointwise_per_flop
    return base.model_copy(update={
        "matmul_share": min(base.matmul_share * compute, 1.0), "convolution_share": min(base.convolution_share * compute, 1.0),
        "attention_share": min(base.attention_share * compute, 1.0), "bandwidth_share": min(base.bandwidth_share * bandwidth, 1.0),
        "pointwise_per_flop": None if pointwise is None else pointwise * bandwidth,
        "launch_seconds": launch, "compiled_launch_seconds": base.compiled_launch_seconds * launch / base.launch_seconds,
    })  # fmt: skip


def fit_rows(jobs: Sequence[Job], base: Coefficients) -> Coefficients:
    """Compute scale, bandwidth scale and launch overhead of one card from a few of its rows, near ``base`` where they do not tell.

    The loss is the squared logarithm of predicted over measured; rows may come in any order.
    """
    from scipy.optimize import least_squares

    start = np.array([0.0, 0.0, math.log(base.launch_seconds)])

    def residuals(values: Floats) -> Floats:
        tried = scaled(base, values)
        errors = [math.log((job.seconds(tried) or math.inf) / job.measured_seconds) for job in jobs]
        return np.array([*errors, *(_PRIOR * (values - start))])

    # The pace of launches makes a step a maximum of two times: several starts find the side it is on.
    solved = [least_squares(residuals, start + np.array([0.0, 0.0, shift]), x_scale=0.3) for shift in (-1.0, 0.0, 0.7)]
    return scaled(base, min(solved, key=lambda one: one.cost).x)


def shipped(job: Job) -> Coefficients:
    """The coefficients in the package for a job's card."""
    return default_coefficients(job.device)


def is_anchor(row: Row) -> bool:
    """The three rows per card that calibrate ``torch2_table.csv``: SD 1.5 text to image, torch 2.0, eager, all batches."""
    return (isinstance(row, Torch2Row) and row.pipeline == "SD - txt2img" and row.torch == "2.0" and row.execution == "eager"
            and row.metric == "it_per_s")  # fmt: skip


def fit_cards(jobs: Iterable[Job], anchors: Anchors = is_anchor, base: Base = shipped) -> dict[str, Coefficients]:
    """Card name to coefficients fitted on that card's anchor rows alone, starting from ``base``."""
    by_card: dict[str, list[Job]] = {}
    for job in jobs:
        if anchors(job.row):
            by_card.setdefault(job.device.name, []).append(job)
    return {name: fit_rows(own, base(own[0])) for name, own in sorted(by_card.items())}


def calibrated_predictor(rows: Iterable[Row], anchors: Anchors = is_anchor) -> Predict:
    """A predictor whose coefficients are fitted, card by card, on the anchor rows alone; other cards keep the shipped ones."""
    predictor = Predictor()
    predictor.fitted = fit_cards(jobs_of((row for row in rows if anchors(row)), predictor), anchors)
    return predictor.predict


@dataclass(slots=True)
class Errors:
    """Relative errors of predicted times."""

    values: list[float] = field(default_factory=list)

    def add(self, predicted: float, measured: float) -> None:
        self.values.append(predicted / measured - 1.0)

    def quantile(self, share: float) -> float:
        """A quantile of the absolute errors."""
        return float(np.quantile(np.abs(self.values), share))

    @property
    def mean(self) -> float:
        return float(np.abs(self.values).mean())

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def decile(self) -> float:
        return self.quantile(0.9)

    @property
    def width(self) -> float:
        """``w`` of the interval from ``/ (1 + w)`` to ``* (1 + w)`` around the prediction that holds nine in ten rows."""
        return math.expm1(float(np.quantile(np.abs(np.log1p(self.values)), 0.9)))

    def text(self) -> str:
        """One line; the bias is the median error with its sign."""
        if not self.values:
            return "no rows"
        return (f"n {len(self.values):3d}  median {self.median:6.1%}  mean {self.mean:6.1%}  p90 {self.decile:6.1%}"
                f"  bias {np.median(self.values):+6.1%}  width {self.width:.2f}")  # fmt: skip


__all__ = [
    "Errors", "Job", "calibrated_predictor", "fit_cards", "fit_rows", "is_anchor", "jobs_of", "predicted_seconds", "scaled", "shipped",
]  # fmt: skip
