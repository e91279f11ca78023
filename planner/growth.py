"""``objective="throughput"``: a larger batch where that makes more samples a second."""

from __future__ import annotations

from collections.abc import Callable

from planner.errors import NoFeasiblePlan, UsageError
from planner.outcome import GAIN
from planner.plan import Plan

LARGEST_BATCH = 64
"""Assumed: beyond it no denoiser of an image is anything but compute-bound, and each doubling costs a dry run."""


def grow(planned: Callable[[int], Plan], batch_size: int) -> Plan:
    """The plan of the batch, doubled from ``batch_size`` on for as long as a sample takes less time by more than ``GAIN``.

    ``planned`` makes the plan of one batch. Inputs that say how large the batch is (a list of prompts, an image each) end it.

    Raises:
        NoFeasiblePlan, UsageError: what ``planned`` raises for ``batch_size`` itself.
    """
    best = planned(batch_size)
    while best.workload.batch_size * 2 <= LARGEST_BATCH:
        try:
            larger = planned(best.workload.batch_size * 2)
        except (NoFeasiblePlan, UsageError):
            break
        if _sample_seconds(larger) * (1 + GAIN) > _sample_seconds(best):
            break
        best = larger
    grown = best.workload.batch_size
    if grown == batch_size:
        return best
    told = f"the batch grew from {batch_size} to {grown} for throughput: call with {grown} samples, or use plan.run(pipe, …)"
    return best.model_copy(update={"warnings": (told, *best.warnings)})


def _sample_seconds(plan: Plan) -> float:
    return plan.predicted.latency_seconds / plan.workload.batch_size
