"""Automatic VRAM-aware optimization planner for Hugging Face diffusers.

>>> from planner import autoplan                    # doctest: +SKIP
>>> plan = autoplan(pipe, batch_size=8)             # doctest: +SKIP

Importing this package imports neither torch nor diffusers; the public names load what they need when first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from planner.errors import (
    ApplyError,
    CalibrationError,
    HardwareError,
    NoFeasiblePlan,
    PlannerError,
    ProfileError,
    UnsupportedPipeline,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from planner.autoplan import autoplan, estimate, explain, max_batch_size
    from planner.plan import Plan
    from planner.types import Estimate, Measurement, Workload

__version__ = "0.1.0"

_LAZY = {
    "autoplan": "planner.autoplan",
    "estimate": "planner.autoplan",
    "explain": "planner.autoplan",
    "max_batch_size": "planner.autoplan",
    "Plan": "planner.plan",
    "Estimate": "planner.types",
    "Measurement": "planner.types",
    "Workload": "planner.types",
}

__all__ = [
    "autoplan", "explain", "estimate", "max_batch_size", "Plan", "Workload", "Estimate", "Measurement",
    "PlannerError", "NoFeasiblePlan", "HardwareError", "ProfileError", "CalibrationError", "ApplyError",
    "VerificationError", "UnsupportedPipeline", "UsageError", "__version__",
]  # fmt: skip


class _Face(ModuleType):
    """This package's module. The submodules ``autoplan`` and ``explain`` must not hide the functions of those names:
    the import system would set them as attributes here once they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LAZY and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
