"""Checking a plan that is in force: one run in the state of the real one, its counters, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planner.types import Measurement, Quality

if TYPE_CHECKING:
    from planner.plan import Plan

WHOLE_CALL_SECONDS = 20.0
"""Calls predicted to be shorter than this are checked whole; longer ones with fewer steps, extrapolated."""
SHORT_STEPS = 3
OUTPUT_TOLERANCE: dict[Quality, float] = {"exact": 0.02, "lossless": 0.12, "lossy": 0.35}
"""Largest mean absolute difference from the untouched pipeline's output, relative to that output's range, per quality.
Assumed: kernel noise grows over the steps; a black or wrong picture differs by more than a third of the range."""
NUMERIC_KNOBS = frozenset({"dtype", "quantization", "attention", "vae_tiling", "vae_tile", "tf32", "cache", "scheduler", "steps"})


@dataclass(frozen=True, slots=True)
class Check:
    """What a checked run showed, and every way in which it failed (empty: passed)."""

    measurement: Measurement
    failures: tuple[str, ...]


def short_inputs(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The user's inputs, with fewer steps when the whole call would take long; and the number of steps left out."""
    from planner.dryrun.inputs import call_parameters

    chosen = dict(inputs)
    steps = plan.workload.num_inference_steps
    if plan.predicted.latency_seconds <= WHOLE_CALL_SECONDS or "num_inference_steps" not in call_parameters(pipe):
        return chosen, 0
    default = call_parameters(pipe)["num_inference_steps"].default
    whole = int(chosen.get("num_inference_steps") or steps or default or 0)
    if whole <= SHORT_STEPS:
        return chosen, 0
    return chosen | {"num_inference_steps": SHORT_STEPS}, whole - SHORT_STEPS


def reference_output(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Any:
    """Output of the untouched pipeline for the same seed, as an array; None where the plan changes no numbers,
    or where the untouched pipeline would run on another device than the plan."""
    if not (set(plan.changes) & NUMERIC_KNOBS) or _device_type(pipe) != plan.device.kind:
        return None
    chosen, _ = short_inputs(plan, pipe, inputs)
    return as_array(_run(plan, pipe, chosen, parts=1))


def check(plan: Plan, pipe: Any, inputs: Mapping[str, Any], reference: Any = None) -> Check:
    """Run the applied plan once and compare. Whatever the pipeline raises comes out, an OOM among it."""
    from planner.force import torch_device
    from planner.measure import measure_call

    chosen, left_out = short_inputs(plan, pipe, inputs)
    parts = int(plan.settings.get("batch_split", 1))
    warm = 1 if plan.settings.get("compile", "none") != "none" else 0
    output, seen = measure_call(pipe, lambda: _run(plan, pipe, chosen, parts), torch_device(plan), warmup=warm)
    array = as_array(output)
    finite = _is_sound(array)
    difference = _difference(array, reference)
    latency, note = seen.latency_seconds, None
    if left_out and seen.step_seconds is not None:
        latency += left_out * seen.step_seconds * parts
        note = f"checked with {SHORT_STEPS} steps; {left_out} more extrapolated from the measured step"
    measurement = seen.model_copy(
        update={"latency_seconds": latency, "output_finite": finite, "output_difference": difference, "note": note})  # fmt: skip
    return Check(measurement, tuple(_failures(plan, measurement)))


def _run(plan: Plan, pipe: Any, inputs: Mapping[str, Any], parts: int) -> Any:
    """The planned call with a fixed seed where the pipeline takes one."""
    import torch

    from planner.dryrun.inputs import call_parameters
    from planner.force import call_split

    seeded = dict(inputs)
    if "generator" in call_parameters(pipe):
        seeded["generator"] = torch.Generator("cpu").manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return call_split(plan, pipe, seeded, parts)


def as_array(output: Any) -> Any:
    """The pictures, frames or samples of a pipeline output as one float array in [0, 1] where they are pictures."""
    import numpy as np

    value = output
    if hasattr(output, "__dict__") and not hasattr(output, "shape"):
        value = next((item for item in vars(output).values() if item is not None), None)
    elif isinstance(output, tuple) and output:
        value = output[0]
    return np.asarray(_flatten(value), dtype=np.float64) if value is not None else None


def _flatten(value: Any) -> Any:
    import numpy as np

    if hasattr(value, "detach"):
        return value.detach().float().cpu().numpy()
    if isinstance(value, list | tuple):
        parts = [np.ravel(_flatten(item)) for item in value]
        return np.concatenate(parts) if parts else np.zeros(0)
    array = np.asarray(value)
    if array.dtype == np.uint8:
        return array / 255.0
    return array if np.issubdtype(array.dtype, np.number) else np.zeros(0)


def _is_sound(array: Any) -> bool | None:
    """Finite and not constant; None when there is nothing to look at."""
    import numpy as np

    if array is None or array.size == 0:
        return None
    return bool(np.isfinite(array).all()) and (array.size == 1 or float(np.ptp(array)) > 0)


def _difference(array: Any, reference: Any) -> float | None:
    import numpy as np

    if array is None or reference is None or array.size == 0:
        return None
    if np.size(array) != np.size(reference):
        return math.inf
    spread = float(np.ptp(reference)) or 1.0
    return float(np.abs(np.ravel(array) - np.ravel(reference)).mean()) / spread


def _failures(plan: Plan, seen: Measurement) -> list[str]:
    found = []
    if seen.output_finite is False:
        found.append("the output is constant or not finite (a black picture): the dtype overflows here")
    limit = OUTPUT_TOLERANCE[plan.quality]
    if seen.output_difference is not None and not seen.output_difference <= limit:
        found.append(f"the output differs from the untouched pipeline's by {seen.output_difference:.2f} of its range, more than {limit}")
    budget = plan.device.budget_bytes
    peak = seen.peak_allocated_bytes
    if budget is not None and peak is not None and peak > budget:
        found.append(f"the measured peak of {peak} bytes is above the budget of {budget}")
    return found


def _device_type(pipe: Any) -> str:
    from planner.dryrun.facts import read_facts

    return read_facts(pipe).device
