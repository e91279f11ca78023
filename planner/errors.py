"""Everything this package raises on purpose.

PlannerError
├── UsageError            the call itself is wrong: a knob, a size, a budget
├── UnsupportedPipeline   the object or folder is no pipeline that can be planned
├── HardwareError         a device that is unknown, absent or unreadable
├── ProfileError          a GPU or model description that is missing or broken
├── CalibrationError      measured data that is stale, foreign or corrupt
├── NoFeasiblePlan        nothing fits; carries the leanest candidate
├── ApplyError            a plan could not be put in force; the pipeline is as before
└── VerificationError     a plan was in force and reality disagreed

Each message says what happened, what was seen, what was wanted and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.types import Alternative

EXIT_OK, EXIT_NOTHING_FITS, EXIT_USAGE, EXIT_FAULT = 0, 1, 2, 3


class PlannerError(Exception):
    """Base of all planner errors; ``exit_code`` is what the command line returns for it."""

    exit_code = EXIT_FAULT


class UsageError(PlannerError, ValueError):
    """The request cannot be meant as written."""

    exit_code = EXIT_USAGE


class UnsupportedPipeline(PlannerError):
    """The given object, folder or class is not a pipeline that can be planned, and why."""

    exit_code = EXIT_USAGE


class HardwareError(PlannerError):
    """A device is unknown, absent or does not answer."""


class ProfileError(PlannerError):
    """A GPU or model description is missing or broken; the message carries the path inside the file."""


class CalibrationError(PlannerError):
    """Stored measurements are stale, foreign, incompatible or corrupt."""


class NoFeasiblePlan(PlannerError):
    """No candidate fits. ``leanest`` is the candidate that needs least, ``shortfall_bytes`` what is missing."""

    exit_code = EXIT_NOTHING_FITS

    def __init__(self, message: str, *, leanest: Alternative | None = None, shortfall_bytes: int | None = None) -> None:
        super().__init__(message)
        self.leanest = leanest
        self.shortfall_bytes = shortfall_bytes


class ApplyError(PlannerError):
    """A plan could not be applied; the pipeline was put back as it was."""


class VerificationError(PlannerError):
    """An applied plan ran, and what it did differs from what was promised."""
