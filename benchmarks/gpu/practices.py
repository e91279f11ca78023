"""What people do today on a budget, done with the libraries' own calls, and taken back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from planner.facts import PipelineFacts
from planner.knobs.base import Site
from planner.types import KnobValue

PRACTICES: dict[str, dict[str, KnobValue]] = {
    "to": {"offload": "none"},
    "model": {"offload": "model"},
    "sequential": {"offload": "sequential"},
    "group-leaf-stream": {"offload": "group_leaf", "offload_stream": True},
    "diffusers-mm": {"offload": "model"},
}
"""Practice to the plan that is physically nearest: only to guess how long it takes."""
WORDS = {
    "to": 'pipe.to("cuda")',
    "model": "pipe.enable_model_cpu_offload()",
    "sequential": "pipe.enable_sequential_cpu_offload()",
    "group-leaf-stream": 'pipe.enable_group_offload(offload_type="leaf_level", use_stream=True)',
    "diffusers-mm": "diffusers_mm.managed(pipe)",
}
LEAVES_TRACES = frozenset({"diffusers-mm"})
"""Practices that wrap the pipeline itself: the process is not used again after them."""


def absent(practice: str) -> str | None:
    """Why a practice cannot be tried here; None when it can."""
    if practice == "diffusers-mm" and importlib.util.find_spec("diffusers_mm") is None:
        return "the package diffusers-mm is not installed"
    return None


def start(practice: str, pipe: Any, device: torch.device) -> None:
    """Put a practice in force. Raises whatever the library raises; KeyError for an unknown one."""
    starts: dict[str, Callable[[Any, torch.device], Any]] = {
        "to": lambda pipe, device: pipe.to(device),
        "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
        "sequential": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
        "group-leaf-stream": _group,
        "diffusers-mm": _managed,
    }
    starts[practice](pipe, device)


def _group(pipe: Any, device: torch.device) -> None:
    pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _managed(pipe: Any, device: torch.device) -> None:
    from diffusers_mm import managed

    managed(pipe, device=device)


@contextmanager
def in_practice(practice: str, pipe: Any, device: torch.device, facts: PipelineFacts, put_back: Callable[[], None]) -> Iterator[None]:
    """The block runs under a practice; afterwards the pipeline is as before. ``put_back`` returns weights to the host.

    Raises:
        RuntimeError: the pipeline is not as it was.
    """
    from planner.snapshot import Snapshot

    before = Snapshot.of(pipe)
    try:
        start(practice, pipe, device)
        yield
    finally:
        _stop(Site(pipe=pipe, device=device, facts=facts, settings={}))
        put_back()
        before.restore(pipe)
    left = before.differences(pipe)
    if left and practice not in LEAVES_TRACES:
        raise RuntimeError(f"{practice} left the pipeline changed: {'; '.join(left[:3])}")


def _stop(site: Site) -> None:
    """Hooks off, the way the planner's own offload knob takes them off; the snapshot puts back what they changed."""
    from planner.knobs.live_offload import _disable_groups, _remove_accelerate_hooks

    _disable_groups(site)
    _remove_accelerate_hooks(site)


__all__ = ["LEAVES_TRACES", "PRACTICES", "WORDS", "absent", "in_practice", "start"]
