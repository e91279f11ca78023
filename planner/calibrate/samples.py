"""What a probe leaves behind: every repetition it timed, and what is derived from them. Nothing here imports torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from planner.calibrate.signature import MAX_TEXT
from planner.types import Frozen

UNSTABLE_SPREAD = 0.25
"""Median absolute deviation over the median above which a measurement is called unstable."""
BUSY_SECONDS = 1e-3
"""Host time for one operation that no idle machine takes; assumed: twenty times what is measured on slow ones."""
MAX_REPETITIONS = 64
Seconds = Annotated[float, Field(gt=0, lt=1e5, allow_inf_nan=False)]


def _a_date(text: str) -> str:
    from datetime import datetime

    datetime.fromisoformat(text)
    return text


Date = Annotated[str, Field(max_length=40), AfterValidator(_a_date)]


class Sample(Frozen):
    """Timings of one distinct operation. ``seconds`` is the median; None with the reason in ``skipped``."""

    signature: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    threads: Annotated[int, Field(ge=1, le=4096)]
    repetitions: Annotated[tuple[Seconds, ...], Field(max_length=MAX_REPETITIONS)] = ()
    skipped: Annotated[str, Field(max_length=300)] | None = None

    @property
    def seconds(self) -> float | None:
        return statistics.median(self.repetitions) if self.repetitions else None

    @property
    def unstable(self) -> bool:
        """Whether its repetitions scatter by more than :data:`UNSTABLE_SPREAD`."""
        return spread(self.repetitions) > UNSTABLE_SPREAD


RateName = Literal["launch", "python", "fresh_memory", "picture", "pinned_to_device", "pinned_to_host", "pageable_to_device",
                   "pageable_to_host"]  # fmt: skip


class Rate(Frozen):
    """A device or host constant. ``units`` is what each repetition did: bytes moved or operations launched."""

    name: RateName
    units: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    repetitions: Annotated[tuple[Seconds, ...], Field(min_length=1, max_length=MAX_REPETITIONS)]
    threads: Annotated[int, Field(ge=1, le=4096)]

    @property
    def seconds_per_unit(self) -> float:
        return statistics.median(self.repetitions) / self.units

    @property
    def least_per_unit(self) -> float:
        """The lower quartile of the repetitions, per unit: other load only ever adds."""
        known = self.repetitions
        return (statistics.quantiles(known, n=4)[0] if len(known) > 1 else known[0]) / self.units

    @property
    def unstable(self) -> bool:
        return spread(self.repetitions) > UNSTABLE_SPREAD

    @property
    def busy(self) -> bool:
        """Whether the machine must have been doing something else: see :data:`BUSY_SECONDS`."""
        return self.name in ("launch", "python") and self.seconds_per_unit > BUSY_SECONDS


class Run(Frozen):
    """One run of the device probes. ``complete`` is false when it was interrupted or its time was up."""

    id: Annotated[str, Field(pattern=r"^[0-9a-zA-Z:.+-]{1,60}$")]
    date: Date
    quick: bool
    complete: bool
    threads: Annotated[int, Field(ge=1, le=4096)]
    samples: Annotated[tuple[Sample, ...], Field(max_length=1000)] = ()
    rates: Annotated[tuple[Rate, ...], Field(max_length=100)] = ()

    @property
    def quiet(self) -> bool:
        """Whether its host and link figures can be relied on, all of them: a machine is busy with other things or it is not."""
        return not any(rate.unstable or rate.busy for rate in self.rates)

    def unstable(self) -> tuple[str, ...]:
        """What scattered too much to be relied on, by name."""
        rates = tuple(rate.name for rate in self.rates if rate.unstable or rate.busy)
        return (*rates, *(sample.signature[:80] for sample in self.samples if sample.unstable))


def spread(values: Iterable[float]) -> float:
    """Median absolute deviation over the median; 0 for fewer than two values."""
    known = tuple(values)
    if len(known) < 2:
        return 0.0
    middle = statistics.median(known)
    return statistics.median(abs(value - middle) for value in known) / middle if middle else 0.0
