"""What is measured: real architectures at their real size, and tiny ones for rehearsals on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.errors import UsageError
from planner.models import ModelSource, resolve
from planner.types import Workload
from planner.units import GIB

TINY = "tiny:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model with its calls. Steps are few: a step is like the next, and its time is recorded on its own.

    ``weight`` multiplies the value of its cells, so that large models, whose cells are slow, get their share.
    """

    name: str
    workload: Workload
    batches: tuple[int, ...]
    caps: tuple[tuple[int, int], ...]
    """(card in GiB, batch) pairs that are played on a memory cap."""
    weight: float
    default_steps: int
    """Steps of a usual call, to which the report extrapolates ratios of latencies."""

    def at_batch(self, batch: int) -> Workload:
        """The same call with another batch."""
        return self.workload.model_copy(update={"batch_size": batch})


def _image(side: int, steps: int) -> Workload:
    return Workload(height=side, width=side, num_inference_steps=steps)


SUBJECTS = (
    Subject(name="stable-diffusion-v1-5", workload=_image(512, 20), batches=(1, 4, 16), caps=((8, 16),), weight=1.0, default_steps=50),
    Subject(name="stable-diffusion-xl", workload=_image(1024, 10), batches=(1, 4, 16), caps=((8, 4), (12, 4), (16, 4), (24, 4)),
            weight=2.0, default_steps=50),
    Subject(name="flux.1-dev", workload=_image(1024, 6), batches=(1, 4, 16), caps=((8, 1), (12, 1), (16, 1), (24, 1)), weight=5.0,
            default_steps=28),
    Subject(name="stable-diffusion-3.5-large", workload=_image(1024, 6), batches=(1, 4, 16), caps=((8, 1), (12, 1), (16, 1), (24, 1)),
            weight=3.0, default_steps=28),
    Subject(name="wan2.1-t2v-1.3b", workload=Workload(height=480, width=832, num_frames=33, num_inference_steps=4), batches=(1, 4),
            caps=((8, 1), (12, 1), (16, 1), (24, 1)), weight=4.0, default_steps=50),
)  # fmt: skip
"""Steps: enough that a load once per call does not drown the loop, few enough that sequential offload ends in seconds.
Default steps are those of the pipelines' calls in diffusers 0.42.1."""


def find_subject(name: str) -> Subject:
    """The named subject; ``tiny:sd15`` is a pipeline of the test zoo at 32 x 32 pixels. Raises UsageError."""
    for subject in SUBJECTS:
        if subject.name == name:
            return subject
    if name.startswith(TINY):
        return Subject(name=name, workload=_image(32, 2), batches=(1, 2), caps=(), weight=1.0, default_steps=2)
    names = ", ".join(subject.name for subject in SUBJECTS)
    raise UsageError(f"no subject is called {name!r}; there are {names}, and {TINY}FAMILY for a small one of the test zoo.")


def source_of(subject: Subject) -> ModelSource:
    """The model for predictions: a bundled profile on ``meta``, or the tiny live pipeline itself."""
    return resolve(tiny_pipeline(subject.name)) if subject.name.startswith(TINY) else resolve(subject.name)


def tiny_pipeline(name: str) -> Any:
    """A pipeline of the test zoo. Raises UsageError for an unknown family, or where the tests are not there."""
    try:
        from tests.zoo import FAMILIES
    except ImportError as error:
        raise UsageError(f"{name}: tiny pipelines are in tests/zoo of a checkout ({error}).") from error
    family = name.removeprefix(TINY)
    if family not in FAMILIES:
        raise UsageError(f"{name}: the zoo has no family {family!r}; it has {', '.join(sorted(FAMILIES)[:12])} …")
    return FAMILIES[family].build()


def weight_estimate_bytes(subject: Subject) -> int:
    """Bytes of the weights in 16 bit, from the profile's counts; 0 for tiny ones."""
    if subject.name.startswith(TINY):
        return 0
    profile = resolve(subject.name).profile
    return 2 * profile.parameter_count if profile is not None else 8 * GIB


__all__ = ["SUBJECTS", "Subject", "TINY", "find_subject", "source_of", "tiny_pipeline", "weight_estimate_bytes"]
