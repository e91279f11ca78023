"""Checking a plan that is in force: calls in the state of the real ones, their counters and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from planner.types import Measurement, Quality

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.reference import Reference

WHOLE_CALL_SECONDS = 20.0
"""Calls predicted to be shorter than this are checked whole; longer ones with fewer steps, extrapolated."""
SHORT_STEPS = 3
TIMED_RUNS, TIMED_SECONDS = 3, 6.0
"""Timed runs whose median counts, and how long they may take: of longer calls there is one. A single call of two seconds varies by
10 % from one to the next on a shared machine (two virtual cores, benchmarks/learning.py)."""
SLOWER = 1.15
"""A plan that takes this many times as long as the untouched pipeline, twice in a row, is slower beyond a busy machine's noise."""
OUTPUT_TOLERANCE: dict[Quality, float] = {"exact": 0.02, "lossless": 0.12, "lossy": 0.35}
"""Largest mean absolute difference from the untouched pipeline's output, relative to that output's range, per quality.
Assumed: kernel noise grows over the steps; a black or wrong picture differs by more than a third of the range."""
NUMERIC_KNOBS = frozenset({"dtype", "quantization", "attention", "vae_tiling", "vae_tile", "tf32", "cache", "scheduler", "steps"})
OVERFLOWING = ("dtype", "quantization")
"""Knobs that alone can turn an output black or not finite: they narrow the range of numbers."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a checked run showed, and every way in which it failed (empty: passed)."""

    measurement: Measurement
    failures: tuple[str, ...]
    slower: bool = False
    """Only that the untouched pipeline is faster."""
    unsound: bool = False
    """The output is black or not finite, though the untouched pipeline's is not."""


@dataclass(frozen=True, slots=True)
class ShortCall:
    """The user's inputs, with fewer steps where the whole call would take long, and the number of steps left out."""

    inputs: dict[str, Any]
    left_out: int


def short_call(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> ShortCall:
    """The same for all plans of one workload that are compared: decided by the slower of plan and untouched pipeline."""
    from planner.dryrun.inputs import call_parameters

    slowest = max(plan.predicted.latency_seconds, plan.baseline_predicted.latency_seconds if plan.baseline_predicted else 0.0)
    parameters = call_parameters(pipe)
    if slowest <= WHOLE_CALL_SECONDS or "num_inference_steps" not in parameters:
        return ShortCall(dict(inputs), 0)
    default = parameters["num_inference_steps"].default
    asked = int(inputs.get("num_inference_steps") or plan.workload.num_inference_steps or default or 0)
    few = few_steps(pipe, inputs)
    if asked <= few:
        return ShortCall(dict(inputs), 0)
    left_out = (int(plan.settings.get("steps", 0)) or asked) - few
    return ShortCall(dict(inputs) | {"num_inference_steps": few}, max(left_out * SHORT_STEPS // few, 0))


def few_steps(pipe: Any, inputs: Mapping[str, Any]) -> int:
    """What to ask for so that :data:`SHORT_STEPS` are run: an image-to-image call leaves some out, by its ``strength``."""
    from planner.dryrun.inputs import call_parameters

    parameters = call_parameters(pipe)
    strength = inputs.get("strength", parameters["strength"].default if "strength" in parameters else None)
    return math.ceil(SHORT_STEPS / strength) if isinstance(strength, float) and 0 < strength < 1 else SHORT_STEPS


def compiles(plan: Plan) -> bool:
    """Whether the first run under the plan compiles."""
    return plan.settings.get("compile", "none") != "none"


def _warmups(plan: Plan) -> int:
    """Runs before the measured one; the CPU's run for the allocator's events warms up as well."""
    return 1 if compiles(plan) or plan.device.kind != "cpu" else 0


def _timed_runs(predicted_seconds: float) -> int:
    """An odd number, so that the median is a run."""
    return TIMED_RUNS if predicted_seconds * TIMED_RUNS <= TIMED_SECONDS else 1


def check_seconds(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> float:
    """How long :func:`check` is predicted to take: its runs, and setting up where the first of them compiles."""
    parts = int(plan.settings.get("batch_split", 1))
    left_out = short_call(plan, pipe, inputs).left_out * (plan.predicted.step_seconds or 0.0) * parts
    each = max(plan.predicted.latency_seconds - left_out, 0.0)
    runs = _warmups(plan) + (1 if plan.device.kind == "cpu" else 0) + _timed_runs(each)
    return runs * each + (plan.predicted.setup_seconds if compiles(plan) else 0.0)


def check(plan: Plan, pipe: Any, inputs: Mapping[str, Any], compared: Reference | None = None) -> Check:
    """Run the applied plan and compare. Whatever the pipeline raises comes out, an OOM among it.

    ``measured`` times are of the whole call: steps that were left out are added at the measured pace.
    """
    from planner.calls import call_split
    from planner.force import torch_device
    from planner.measure import measure_call

    short, device, warm = short_call(plan, pipe, inputs), torch_device(plan), _warmups(plan)

    def once() -> Any:
        return run_seeded(pipe, short.inputs, lambda given: call_split(plan, pipe, given))

    predicted = plan.predicted.latency_seconds
    output, seen = measure_call(pipe, once, device, warmup=warm, repetitions=_timed_runs(predicted) if not short.left_out else 1)
    slower = bool(plan.changes) and _slower(seen.latency_seconds, compared)
    if slower:  # once more: another process may have had the processor
        _, again = measure_call(pipe, once, device, counters=False)
        slower = _slower(again.latency_seconds, compared)
        best = min(seen, again, key=lambda one: one.latency_seconds)
        times = {"latency_seconds": best.latency_seconds, "step_seconds": best.step_seconds}
        seen = seen.model_copy(update=times | {"repetitions": (*seen.repetitions, *again.repetitions)})
    found = [samples(output)]
    if compared is not None and compared.inputs is not None:
        found.append(samples(_smaller_call(pipe, compared.inputs, compiles(plan))))
    return _judged(plan, found, compared, slower, _whole(plan, seen, short.left_out))


def _smaller_call(pipe: Any, inputs: Mapping[str, Any], compiled: bool) -> Any:
    """The call of a smaller reference under the plan. Compiled code is left out: made for other sizes, it would take the place of
    what was made for the planned ones."""
    import torch

    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        return run_seeded(pipe, inputs, lambda given: pipe(**given))


def _slower(seconds: float, compared: Reference | None) -> bool:
    return compared is not None and compared.seconds is not None and seconds > SLOWER * compared.seconds


def _whole(plan: Plan, seen: Measurement, left_out: int) -> Measurement:
    if not left_out or seen.step_seconds is None:
        return seen
    parts = int(plan.settings.get("batch_split", 1))
    note = f"checked with {SHORT_STEPS} steps; {left_out} more extrapolated from the measured step"
    return seen.model_copy(update={"latency_seconds": seen.latency_seconds + left_out * seen.step_seconds * parts, "note": note})


def _judged(plan: Plan, found: list[list[Any] | None], compared: Reference | None, slower: bool, seen: Measurement) -> Check:
    """``found``: samples of the planned call, and of the smaller one that ``compared`` is of, where it is."""
    finite = min((sound for sound in map(is_sound, found) if sound is not None), default=None)
    difference = difference_of(found[-1], compared.output if compared else None)
    # A plan that changes nothing is the untouched pipeline.
    blameless = not plan.changes or (compared is not None and is_sound(compared.output) is False)
    notes = [seen.note, compared.note if compared else None]
    if difference is None and set(plan.changes) & NUMERIC_KNOBS:
        notes.append("not compared with the pipeline as it is")
    note = "; ".join(note for note in notes if note) or None
    seen = seen.model_copy(update={"output_finite": finite, "output_difference": difference, "note": note})
    unsound = finite is False and not blameless
    failures = _failures(plan, seen, unsound)
    wanted = compared.fold * len(compared.output) if compared is not None and compared.output and compared.fold else None
    if wanted is not None and found[0] is not None and len(found[0]) != wanted:
        failures.append(f"the output has {len(found[0])} samples, {wanted} were asked for")
    result = Check(seen, tuple(failures), unsound=unsound)
    if slower and not failures and plan.objective == "latency" and compared is not None and compared.seconds is not None:
        line = f"slower than the untouched pipeline ({min(seen.repetitions):.3g} s against {compared.seconds:.3g} s)"
        return replace(result, failures=(line,), slower=True)
    return result


def _failures(plan: Plan, seen: Measurement, unsound: bool) -> list[str]:
    found = []
    if unsound:
        found.append("the output is constant or not finite (a black picture): the numbers overflow")
    limit = OUTPUT_TOLERANCE[plan.quality]
    if not unsound and seen.output_difference is not None and seen.output_difference > limit:
        found.append(f"the output differs from the untouched pipeline's by {seen.output_difference:.2f} of its range, more than {limit}")
    budget, peak = plan.device.budget_bytes, seen.peak_allocated_bytes
    if budget is not None and peak is not None and peak > budget:
        found.append(f"the measured peak of {peak} bytes is above the budget of {budget}")
    return found


def run_seeded(pipe: Any, inputs: Mapping[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
    """``call`` with these inputs and a fixed seed, where the pipeline takes one; one per sample where the inputs give a list."""
    import torch

    from planner.batching import own_lists
    from planner.dryrun.inputs import call_parameters
    from planner.noise import one_noise_for_all_dtypes

    given = inputs.get("generator")
    fresh = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(given) if isinstance(given, list | tuple) else 1)]
    seed = {"generator": fresh if isinstance(given, list | tuple) else fresh[0]} if "generator" in call_parameters(pipe) else {}
    with torch.random.fork_rng(devices=[]), one_noise_for_all_dtypes():
        torch.manual_seed(0)
        try:
            return call(own_lists(inputs) | seed)
        except ValueError as error:
            if given is not None or "generator" not in str(error):
                raise
        torch.manual_seed(0)  # it wants a generator per sample, or none
        return call(own_lists(inputs))


# -- outputs ----------------------------------------------------------------------------------------------------------


def samples(output: Any) -> list[Any] | None:
    """Each picture, video or waveform of a pipeline output as a flat float array, pictures in [0, 1]; None without any.

    A text is an array of its bytes, as whole numbers: it can be compared, but neither overflows nor is black.
    """
    value = output
    if hasattr(output, "__dict__") and not hasattr(output, "shape"):
        value = next((item for item in vars(output).values() if item is not None), None)
    elif isinstance(output, tuple) and output:
        value = output[0]
    if value is None:
        return None
    if not isinstance(value, list | tuple) and getattr(value, "ndim", 0) < 2:
        value = [value]
    return [_flat(item) for item in value]


def as_array(output: Any) -> Any:
    """All of :func:`samples` in one flat array; None where there is nothing to look at."""
    import numpy as np

    found = samples(output)
    return np.concatenate(found) if found else None


def _flat(value: Any) -> Any:
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    if isinstance(value, str):
        return np.frombuffer(value.encode(), dtype=np.uint8).astype(np.int64)
    if isinstance(value, list | tuple):
        parts = [_flat(item) for item in value]
        return np.concatenate(parts) if parts else np.zeros(0)
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.number):
        return np.zeros(0)
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return np.ravel(array).astype(np.float64) / scale


def is_sound(found: list[Any] | None) -> bool | None:
    """Whether every sample is finite and not constant; None when there is nothing to look at, such as in a text."""
    import numpy as np

    full = [array for array in found or [] if array.size and array.dtype == np.float64]
    if not full:
        return None
    return all(bool(np.isfinite(array).all()) and (array.size == 1 or float(np.ptp(array)) > 0) for array in full)


def difference_of(found: list[Any] | None, expected: list[Any] | None) -> float | None:
    """Mean absolute difference over the expected output's range, of the sample where it is largest."""
    import numpy as np

    if not found or not expected:
        return None
    if [array.size for array in found] != [array.size for array in expected]:
        return math.inf
    differences = []
    for array, other in zip(found, expected, strict=True):
        known = np.isfinite(other)  # where the untouched pipeline's own numbers overflow there is nothing to compare with
        if not known.any():
            continue
        spread = float(np.ptp(other[known])) or 1.0
        each = float(np.abs(array[known] - other[known]).mean()) / spread
        differences.append(math.inf if math.isnan(each) else each)
    return max(differences, default=None if any(array.size for array in found) else 0.0)
