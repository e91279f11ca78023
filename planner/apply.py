"""Putting settings in force on a live pipeline as one transaction, and taking them back."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from planner.errors import ApplyError
from planner.facts import PipelineFacts
from planner.knobs import KNOBS, Knob, Site, Undo, parse_settings
from planner.snapshot import Snapshot
from planner.types import KnobValue, Settings


@dataclass(slots=True)
class Applied:
    """Settings in force on a pipeline. ``undo`` may be called twice; the second time does nothing."""

    pipe: Any
    settings: dict[str, KnobValue]
    before: Snapshot
    steps: list[Undo] = field(default_factory=list)
    """What undoes each change, in the order of the changes."""

    @property
    def in_force(self) -> bool:
        """Whether there is still something to undo."""
        return bool(self.steps)

    def undo(self) -> None:
        """Undo every knob in exact reverse order, then whatever is left over.

        Raises:
            ApplyError: the pipeline still differs from before; the message lists how.
        """
        if not self.steps:
            return
        failures = _roll_back(self)
        left = self.before.differences(self.pipe)
        if left:
            shown = "; ".join(left[:5]) + (f"; and {len(left) - 5} more" if len(left) > 5 else "")
            raise ApplyError(f"undo left the pipeline changed: {shown}. Load it again.") from (failures[0] if failures else None)


def apply_settings(pipe: Any, settings: Settings, device: Any, facts: PipelineFacts) -> Applied:
    """Put every setting in force, in apply order, or none of them.

    ``device`` is the torch device the pipeline will run on. Knobs that are not named are left alone.

    Raises:
        ApplyError: a knob failed (which, and why); everything was rolled back.
        UsageError: an unknown knob or value; nothing was touched.
        KeyboardInterrupt: after rolling back.
    """
    chosen = parse_settings(settings)
    applied = Applied(pipe=pipe, settings=chosen, before=Snapshot.of(pipe))
    site = Site(pipe=pipe, device=device, facts=facts, settings=chosen, started=applied.steps)
    current = "none"
    try:
        for each in in_order(chosen):
            current = f"{each.name}={chosen[each.name]}"
            undo = each.apply(site, chosen[each.name])
            if undo not in applied.steps:
                applied.steps.append(undo)
    except Exception as error:
        _roll_back(applied)
        _give_back_memory()
        raise ApplyError(_why(current, error)) from error
    except BaseException:
        _roll_back(applied)
        raise
    return applied


def in_order(settings: Settings) -> Iterator[Knob]:
    """The named knobs in the order in which they must be applied under these settings."""
    named = [each for each in KNOBS if each.name in settings]
    yield from sorted(named, key=lambda each: each.order(settings))


def _roll_back(applied: Applied) -> list[BaseException]:
    """Undo all steps in reverse; a step that fails does not keep the others from being undone."""
    failures: list[BaseException] = []
    while applied.steps:
        undo = applied.steps.pop()
        try:
            undo()
        except BaseException as error:  # a second Ctrl-C must not leave half of the hooks in place
            failures.append(error)
    try:
        applied.before.restore(applied.pipe)
    except BaseException as error:  # whatever stopped it may be over: restoring is idempotent
        failures.append(error)
        traceback.clear_frames(error.__traceback__)
        applied.before.restore(applied.pipe)
    for failure in failures:
        if not isinstance(failure, Exception):
            raise failure
    return failures


def _why(what: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    detail = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{what} could not be applied ({detail}); the pipeline is as it was before."


def _give_back_memory() -> None:
    """Cached device memory back to the driver, as after an OOM. Best effort: the device itself may be the failure."""
    import gc

    import torch

    gc.collect()
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
