"""Putting settings in force on a live pipeline as one transaction, and taking them back."""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.errors import ApplyError
from planner.facts import PipelineFacts
from planner.knobs import KNOBS, Knob, Site, Undo, parse_settings
from planner.knobs.live import loggers, quiet
from planner.snapshot import Snapshot
from planner.types import KnobValue, Settings

MAX_TRIES = 2
"""A step back that fails is taken once more: what stopped it, such as a full device, may be over once its frames are gone."""


@dataclass(slots=True)
class Applied:
    """Settings in force on a pipeline. ``undo`` may be called twice; the second time does nothing."""

    pipe: Any
    settings: dict[str, KnobValue]
    before: Snapshot
    steps: list[Undo] = field(default_factory=list)
    """What undoes each change, in the order of the changes."""

    @classmethod
    def begin(cls, pipe: Any, settings: Settings) -> Applied:
        """The way back, before anything is touched. Raises UsageError: an unknown knob or value."""
        return cls(pipe=pipe, settings=parse_settings(settings), before=Snapshot.of(pipe))

    @property
    def in_force(self) -> bool:
        """Whether there is still something to undo."""
        return bool(self.steps)

    def put(self, device: Any, facts: PipelineFacts) -> None:
        """Put every setting in force; raises as :func:`apply_settings` does, everything rolled back."""
        site = Site(pipe=self.pipe, device=device, facts=facts, settings=self.settings, started=self.steps)
        process, current = _process_state(), "none"
        try:
            with quiet():
                for each in in_order(self.settings):
                    current = f"{each.name}={self.settings[each.name]}"
                    undo = each.apply(site, self.settings[each.name])
                    if undo not in self.steps:
                        self.steps.append(undo)
        except BaseException as error:
            with uninterrupted():
                _roll_back(self)
                process()
                _give_back_memory()
                left = self.before.differences(self.pipe)
            if left:
                lost = f"and the pipeline could not be put back: {_listed(left)}. Load it again."
                raise ApplyError(f"{_why(current, error)}, {lost}") from error
            if isinstance(error, Exception):
                raise ApplyError(f"{_why(current, error)}; the pipeline is as it was before.") from error
            raise

    def undo(self) -> None:
        """Undo every knob in exact reverse order, then whatever is left over. Ctrl-C waits until that is done.

        Raises:
            ApplyError: the pipeline still differs from before; the message lists how.
        """
        if not self.steps:
            return
        with uninterrupted():
            failures = _roll_back(self)
            left = self.before.differences(self.pipe)
        if left:
            raise ApplyError(f"undo left the pipeline changed: {_listed(left)}. Load it again.") from next(iter(failures), None)
        for failure in failures:
            if not isinstance(failure, Exception):
                raise failure


def apply_settings(pipe: Any, settings: Settings, device: Any, facts: PipelineFacts) -> Applied:
    """Put every setting in force, in apply order, or none of them.

    ``device`` is the torch device the pipeline will run on. Knobs that are not named are left alone.

    Raises:
        ApplyError: a knob failed (which, and why); everything was rolled back.
        UsageError: an unknown knob or value; nothing was touched.
        KeyboardInterrupt: after rolling back.
    """
    applied = Applied.begin(pipe, settings)
    applied.put(device, facts)
    return applied


def in_order(settings: Settings) -> Iterator[Knob]:
    """The named knobs in the order in which they must be applied under these settings."""
    named = [each for each in KNOBS if each.name in settings]
    yield from sorted(named, key=lambda each: each.order(settings))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block has ended, as half of a way back is no state to stop in. It only ever reaches the main thread."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _roll_back(applied: Applied) -> list[BaseException]:
    """Undo all steps in reverse; a step that fails does not keep the others from being undone."""
    failures: list[BaseException] = []
    while applied.steps:
        _insist(applied.steps[-1], failures)
        applied.steps.pop()
    _insist(lambda: applied.before.restore(applied.pipe), failures)
    return failures


def _insist(step: Undo, failures: list[BaseException]) -> None:
    """Every step back may be taken again: it does what is left to do."""
    for _ in range(MAX_TRIES):
        try:
            step()
        except BaseException as error:
            failures.append(error)
            traceback.clear_frames(error.__traceback__)
        else:
            return


def _process_state() -> Undo:
    """Puts back what libraries use up or turn off on the way. For failures only: afterwards it is the user's to change."""
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    states = [(generator, generator.get_state()) for generator in generators]
    levels, gradients = [(logger, logger.level) for logger in loggers()], torch.is_grad_enabled()

    def put_back() -> None:
        torch.set_grad_enabled(gradients)
        for generator, state in states:
            generator.set_state(state)
        for logger, level in levels:
            logger.setLevel(level)

    return put_back


def _listed(left: list[str]) -> str:
    return "; ".join(left[:5]) + (f"; and {len(left) - 5} more" if len(left) > 5 else "")


def _why(what: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    detail = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{what} could not be applied ({detail})"


def _give_back_memory() -> None:
    """Cached device memory back to the driver, as after an OOM. Best effort: the device itself may be the failure."""
    import gc

    gc.collect()
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
