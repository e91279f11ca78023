"""What several knobs need to change a live pipeline and put it back. The only floor here that imports torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from planner.dryrun.facts import pipeline_modules
from planner.facts import Role
from planner.knobs.base import Site, Undo
from planner.snapshot import Snapshot, place


def nothing() -> None:
    """The undo of a value that changed nothing."""


def reversible(site: Site, change: Callable[[], None], official: Callable[[], None] = nothing) -> Undo:
    """Run ``change``; the result runs ``official`` (the library's own way back) and then restores what it left over.

    It is registered before the change begins: when that raises, the transaction undoes whatever it did. ``official`` must bear
    a change that happened only in part, and being called again after it failed itself. Once done, undoing does nothing.
    """
    snapshot = Snapshot.of(site.pipe)
    pending = [True]

    def undo() -> None:
        if not pending:
            return
        official()  # where it fails, its next try finds its hooks still there
        snapshot.restore(site.pipe)
        pending.clear()

    site.started.append(undo)
    change()
    return undo


def modules_of(site: Site, *roles: Role) -> dict[str, nn.Module]:
    """The pipeline's modules with one of ``roles`` (all without), by component name."""
    wanted = {component.name for component in site.facts.components if not roles or component.role in roles}
    return {name: module for name, module in pipeline_modules(site.pipe).items() if name in wanted}


def tensor_slots(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer once, by its full name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def place_everything(site: Site, device: Any) -> None:
    """Move every component to ``device``, tensor objects kept."""
    for module in pipeline_modules(site.pipe).values():
        place_module(module, device)


def place_module(module: nn.Module, device: Any) -> None:
    """Move one module to ``device``, tensor objects kept."""
    for _, tensor in tensor_slots(module):
        place(tensor, torch.device(device))


def loggers() -> list[logging.Logger]:
    """Of the libraries that talk while they are changed."""
    return [logging.getLogger(name) for name in ("diffusers", "accelerate")]


@contextmanager
def quiet() -> Iterator[None]:
    """Library chatter about experimental interfaces and expected casts stays off the user's screen."""
    levels = [logger.level for logger in loggers()]
    try:
        for logger in loggers():
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers(), levels, strict=True):
            logger.setLevel(level)
