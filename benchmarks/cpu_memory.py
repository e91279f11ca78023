"""Predicted against measured peaks of real pipelines on this CPU, for every memory knob: ``python -m benchmarks.cpu_memory [NAME ...]``.

A name is a family of ``tests.zoo`` or a bundled model (random weights; the latter take gigabytes and minutes). Each line is one
pipeline, batch, size and knob, planned and applied through :func:`planner.autoplan` with every other knob fixed to what the
pipeline does by itself. Measured are the CPU allocator's own events during ``plan.run`` (``planner.measure.cpu_peak_bytes``),
above the weights that are there already; the last lines say how many are within 5 per cent.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import planner
from planner.errors import PlannerError
from planner.measure import cpu_peak_bytes
from planner.types import KnobValue
from tests.zoo import FAMILIES

FAMILY_NAMES = ("sd15", "sdxl", "sd3", "flux", "pixart_sigma")
BATCHES = (1, 2, 4)
SIDES = {"zoo": (64, 128), "bundled": (192, 256)}
WANTED = 0.05
KNOBS: dict[str, dict[str, KnobValue]] = {
    "as it is": {},
    "vae_slicing": {"vae_slicing": True},
    "vae_tiling": {"vae_tiling": True},
    "sliced": {"attention": "sliced"},
    "vanilla": {"attention": "vanilla"},
    "bf16": {"dtype": "bf16"},
    "channels_last": {"channels_last": True},
    "fuse_qkv": {"fuse_qkv": True},
    "chunked": {"chunked_forward": True},
    "batch_split": {"batch_split": 2},
}


def measured_and_predicted(pipe: Any, inputs: Mapping[str, Any], batch: int, settings: Mapping[str, KnobValue]) -> tuple[int, int]:
    """Bytes above the weights: what the allocator saw, and what the plan says. Raises PlannerError where the knob is refused."""
    asked = {"batch_size": batch, "inputs": inputs, "device": "cpu", "calibrate": "never", "memory_budget": "1TiB"}
    untouched = planner.explain(pipe, "cpu", batch_size=batch, inputs=inputs, calibrate="never").baseline
    plan = planner.autoplan(pipe, **asked, verify=False, fix={**untouched, **settings})
    found = cpu_peak_bytes(lambda: plan.run(pipe, **inputs))
    plan.undo(pipe)
    resting = next(term.bytes for term in plan.predicted.terms if term.name == "allocated between calls")
    return found, plan.predicted.peak_allocated_bytes - (resting or 0)


def _zoo(name: str) -> tuple[Any, Callable[[int, int], dict[str, Any]]]:
    case = FAMILIES[name]
    pipe = case.build()
    return pipe, lambda batch, side: {**case.inputs(pipe), "height": side, "width": side, "num_images_per_prompt": batch}


def _bundled(name: str) -> tuple[Any, Callable[[int, int], dict[str, Any]]]:
    from benchmarks.gpu.build import build

    common = {"prompt": "a photo of a cat", "num_inference_steps": 1}
    return build(name).to(torch.float32), lambda batch, side: {**common, "height": side, "width": side, "num_images_per_prompt": batch}


def lines(names: Sequence[str]) -> Iterator[str]:
    """One line per pipeline, batch, size and knob, then one per knob and one for all."""
    errors: dict[str, list[float]] = defaultdict(list)
    for name in names:
        kind = "zoo" if name in FAMILIES else "bundled"
        pipe, inputs = _zoo(name) if kind == "zoo" else _bundled(name)
        for batch in BATCHES:
            for side in SIDES[kind]:
                for knob, settings in KNOBS.items():
                    try:
                        found, said = measured_and_predicted(pipe, inputs(batch, side), batch, settings)
                    except PlannerError as error:
                        yield f"{name:14}{batch:3}{side:5} {knob:14}not here: {str(error).splitlines()[0][:80]}"
                        continue
                    errors[knob].append(said / found - 1)
                    yield f"{name:14}{batch:3}{side:5} {knob:14}{found:12}{said:12}{said / found - 1:+8.1%}"
    for knob, each in errors.items():
        yield _summary(knob, each)
    yield _summary("all", [error for each in errors.values() for error in each])


def _summary(name: str, errors: Sequence[float]) -> str:
    sizes = [abs(error) for error in errors]
    within = sum(size <= WANTED for size in sizes)
    return f"{name:14}median {statistics.median(sizes):5.1%}, worst {max(sizes):5.1%}, within {WANTED:.0%}: {within} of {len(sizes)}"


if __name__ == "__main__":
    for line in lines(sys.argv[1:] or FAMILY_NAMES):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
