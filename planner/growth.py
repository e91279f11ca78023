"""``objective="throughput"``: a larger batch where that makes more samples a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from planner.errors import NoFeasiblePlan, UsageError
from planner.outcome import GAIN
from planner.plan import Plan
from planner.types import Estimate

LARGEST_BATCH = 64
"""Assumed: beyond it no denoiser of an image is anything but compute-bound, and each doubling costs a dry run."""


class Priced(Protocol):
    """A plan, or a glance at one."""

    @property
    def predicted(self) -> Estimate: ...


P = TypeVar("P", bound=Priced)


def grow(planned: Callable[[int], P], batch_size: int) -> tuple[int, P]:
    """The batch, doubled from ``batch_size`` on for as long as a sample takes less time by more than ``GAIN``, and its plan.

    ``planned`` makes the plan of one batch. Inputs that say how large the batch is (a tensor with a row each) end the growth.

    Raises:
        NoFeasiblePlan, UsageError: what ``planned`` raises for ``batch_size`` itself.
    """
    batch, best = batch_size, planned(batch_size)
    while batch * 2 <= LARGEST_BATCH:
        try:
            larger = planned(batch * 2)
        except (NoFeasiblePlan, UsageError):
            break
        if larger.predicted.latency_seconds * (1 + GAIN) > best.predicted.latency_seconds * 2:
            break
        batch, best = batch * 2, larger
    return batch, best


def grown(planned: Callable[[int], Plan], batch_size: int) -> Plan:
    """The plan of :func:`grow`, which tells of the batch if it is another."""
    batch, plan = grow(planned, batch_size)
    if batch == batch_size:
        return plan
    told = f"the batch grew from {batch_size} to {batch} for throughput: call with {batch} samples, or use plan.run(pipe, …)"
    return plan.model_copy(update={"warnings": (told, *plan.warnings)})
