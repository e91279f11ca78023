"""What applied plans teach: corrections of memory and time for one pipeline on one device, robust against wild runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from planner.calibrate.samples import Date
from planner.types import Estimate, Frozen, Measurement

LAST = 9
"""Observations that count: the newest ones, so that an old state of the machine is forgotten."""
BELIEVED_ALONE = math.log(1.3)
"""A single run may correct by this much; a larger error needs a second run that says the same."""
MEMORY_RANGE, TIME_RANGE = (0.5, 2.0), (0.25, 4.0)
_Ratio = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-zA-Z_.:-]{1,128}$")]


class Observation(Frozen):
    """One checked run: measured over what the model says without any correction. None where nothing was measured."""

    pipeline: _Digest
    settings: _Digest
    date: Date
    memory_ratio: _Ratio | None = None
    time_ratio: _Ratio | None = None


def observation(pipeline: str, settings: str, predicted: Estimate, measured: Measurement, date: str,
                applied: tuple[float, float] = (1.0, 1.0)) -> Observation:  # fmt: skip
    """What a run says of the model. ``applied`` is the (memory, time) correction that ``predicted`` already contains.

    The memory ratio is of activations and workspace, for weights are known: both peaks less the peak phase's weights.
    """
    memory = None
    if measured.peak_allocated_bytes is not None and predicted.phases:
        weights = max(predicted.phases, key=lambda phase: phase.peak_allocated_bytes).weights_bytes
        above, expected = measured.peak_allocated_bytes - weights, predicted.peak_allocated_bytes - weights
        memory = _ratio(above, expected, applied[0])
    time = _ratio(measured.latency_seconds, predicted.latency_seconds, applied[1])
    return Observation(pipeline=pipeline, settings=settings, date=date, memory_ratio=memory, time_ratio=time)


def _ratio(measured: float, predicted: float, applied: float) -> float | None:
    if not (measured > 0 and predicted > 0 and math.isfinite(measured) and math.isfinite(predicted)):
        return None
    return min(max(measured / predicted * applied, 1e-5), 1e5)


def learned_scales(observations: Sequence[Observation], pipeline: str) -> tuple[float, float]:
    """(memory_scale, time_scale) for a pipeline from its observations, oldest first; 1.0 where nothing is known."""
    mine = [item for item in observations if item.pipeline == pipeline]
    memory = robust_scale([item.memory_ratio for item in mine if item.memory_ratio is not None])
    time = robust_scale([item.time_ratio for item in mine if item.time_ratio is not None])
    return _clip(memory, MEMORY_RANGE), _clip(time, TIME_RANGE)


def robust_scale(ratios: Sequence[float]) -> float:
    """The ratio that the newest :data:`LAST` runs agree on.

    One run is believed within :data:`BELIEVED_ALONE`; of two the one nearer to 1; from three on the median of those within
    three scaled median absolute deviations of the median.
    """
    logs = [math.log(ratio) for ratio in ratios[-LAST:]]
    if not logs:
        return 1.0
    if len(logs) < 3:
        nearest = min(logs, key=abs)
        return math.exp(nearest) if len(logs) == 2 or abs(nearest) <= BELIEVED_ALONE else 1.0
    middle = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in logs)
    kept = [value for value in logs if abs(value - middle) <= 3 * max(deviation, 0.01)]
    return math.exp(statistics.median(kept))


def _clip(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
