"""The pipeline as it is, run to compare a plan with: in the very call, else in a smaller one, else on the host's processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError, UsageError
from planner.verify import NUMERIC_KNOBS, few_steps, is_sound, run_seeded, samples, short_call

if TYPE_CHECKING:
    from planner.dryrun.provider import Traces
    from planner.plan import Plan
    from planner.types import Device, Estimate, Measurement, Workload

REFERENCE_SECONDS = 60.0
"""Assumed: the pipeline is run for comparison when that is predicted to take no longer than this, and stopped after twice as long."""
HALVINGS = 5
"""How often a call is halved at most: 1024 pixels become 32."""
SIDE_MULTIPLE = 32
"""Sides are rounded down to a multiple of this, which all patches and VAEs of diffusers divide, unless they are smaller."""
FRAMES_MULTIPLE = 8
"""One more than a multiple of this is a number of frames that every video VAE of diffusers takes."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the pipeline as it is gave."""

    output: list[Any] | None
    """Its samples; None where a plan's would draw other noise."""
    seconds: float | None = None
    """Of the checked call; None where only a smaller one was run."""
    inputs: Mapping[str, Any] | None = None
    """All arguments of the smaller call that ``output`` is of; None: of the checked call itself."""
    fold: int | None = 1
    """How many times as many samples the checked call makes; None: not known, where frames may be listed as samples are."""
    note: str | None = None
    """Which smaller call that was, and where it ran."""


def reference(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Reference | None:
    """The untouched pipeline's output for the inputs of the check, and its time; None where neither can be had.

    Where it does not fit, takes too long or a plan splits the batch, a plan that changes numbers is given the output of a
    smaller call. The pipeline is as it was afterwards, whatever happens. What it raises in the very call comes out.
    """
    if not plan.changes:
        return None
    whole = _whole(plan, pipe, inputs) if _worth_it(plan, pipe, inputs) else None
    if not set(plan.changes) & NUMERIC_KNOBS:
        return whole
    if int(plan.settings.get("batch_split", 1)) > 1:  # several calls draw their random numbers in another order than one
        whole = whole and replace(whole, output=None)
    elif whole is not None:
        return whole
    smaller = _smaller(plan, pipe, inputs)
    return replace(smaller, seconds=whole.seconds) if smaller is not None and whole is not None else smaller or whole


def kind(plan: Plan) -> tuple[bool, ...]:
    """Plans of one kind have one reference."""
    return bool(plan.changes), bool(set(plan.changes) & NUMERIC_KNOBS), int(plan.settings.get("batch_split", 1)) > 1


def reference_output(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Reference | None:
    """:func:`reference`, only where the plan changes numbers."""
    return reference(plan, pipe, inputs) if set(plan.changes) & NUMERIC_KNOBS else None


def _worth_it(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> bool:
    """The untouched pipeline is predicted to fit and, with the short call's steps, to take no longer than a minute."""
    before = plan.baseline_predicted
    if before is None or not before.fits:
        return False
    saved = short_call(plan, pipe, inputs).left_out * (before.step_seconds or 0.0)
    return before.latency_seconds - saved <= REFERENCE_SECONDS


def _whole(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Reference | None:
    """The call that the plan is checked with; None where it turned out not to fit, or to take too long."""
    from planner.calls import call_split
    from planner.force import is_out_of_memory, torch_device

    def call(given: dict[str, Any]) -> Any:
        return call_split(plan, pipe, given, parts=1, fewer_steps=False)

    try:
        output, seen = _run(plan, pipe, short_call(plan, pipe, inputs).inputs, call, torch_device(plan))
    except TimeoutError:
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return Reference(samples(output), seen.latency_seconds)


def _run(plan: Plan, pipe: Any, inputs: Mapping[str, Any], call: Any, device: Any) -> tuple[Any, Measurement]:
    """One seeded call of the pipeline as it is on ``device``. Raises what it raises; the pipeline is as it was either way."""
    from planner.apply import Applied
    from planner.dryrun.facts import read_facts
    from planner.force import give_back_memory, release
    from planner.measure import measure_call

    applied = Applied.begin(pipe, plan.baseline)
    try:
        applied.put(device, read_facts(pipe))
        found = measure_call(pipe, lambda: run_seeded(pipe, inputs, call), device, counters=False, limit_seconds=2 * REFERENCE_SECONDS)
    except BaseException as error:
        release(error)
        applied.undo()
        give_back_memory(pipe)
        raise
    applied.undo()
    return found


# -- smaller calls ----------------------------------------------------------------------------------------------------


def _smaller(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Reference | None:
    """The largest smaller call that is predicted to fit where the plan runs, else on the host's processor, and gives a picture."""
    from planner.dryrun.inputs import batch_of
    from planner.force import torch_device
    from planner.models import resolve

    source, known = resolve(pipe), dict[int, "Traces | None"]()
    calls = list(smaller_calls(pipe, plan.workload, inputs))
    for device, first in _devices(plan, pipe):
        for number in range(first, len(calls)):
            if number not in known:
                known[number] = _traces(source, calls[number])
            if not _affordable(source.digest, known[number], device):
                continue
            output = _output(plan, pipe, calls[number], torch_device(plan) if device == plan.device else None)
            if output is not None and is_sound(output) is not False:  # a model may draw nothing at all in so small a picture
                fold = None if "num_frames" in calls[number] else plan.workload.batch_size // batch_of(pipe, calls[number])
                return Reference(output, inputs=calls[number], fold=fold, note=_described(calls[number], device, plan))
    return None


def smaller_calls(pipe: Any, workload: Workload, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All arguments of a call for one sample in few steps, then for half its sides and frames, and half of that again."""
    from planner.batching import share
    from planner.dryrun.inputs import call_arguments, call_parameters

    arguments = call_arguments(pipe, workload, inputs)
    with suppress(UsageError):  # held together by an argument that cannot be cut
        arguments = share(arguments, workload.batch_size)[0]
    if "num_inference_steps" in call_parameters(pipe):
        few = few_steps(pipe, arguments)
        arguments["num_inference_steps"] = min(int(arguments.get("num_inference_steps") or few), few)
    yield arguments
    for halvings in range(1, HALVINGS + 1):
        smaller = _halved(pipe, workload, arguments, 1 << halvings)
        if not smaller:  # nothing in the call says how large its output is
            return
        yield arguments | smaller


def _halved(pipe: Any, workload: Workload, arguments: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Arguments that say how large the output is, and pictures, made smaller."""
    from planner.dryrun.inputs import call_parameters, picture_size

    parameters = call_parameters(pipe)
    sides = dict(zip(("width", "height"), picture_size(pipe, workload), strict=True))
    found: dict[str, Any] = {name: _side(arguments.get(name) or side, factor) for name, side in sides.items() if name in parameters}
    frames = arguments.get("num_frames") or ("num_frames" in parameters and parameters["num_frames"].default)
    if isinstance(frames, int) and frames > 1:
        found["num_frames"] = (frames - 1) // factor // FRAMES_MULTIPLE * FRAMES_MULTIPLE + 1
    pictures = {name: _resized(value, factor) for name, value in arguments.items()}
    return found | {name: value for name, value in pictures.items() if value is not arguments[name]}


def _side(pixels: int, factor: int) -> int:
    small = max(pixels // factor, 1)
    return small // SIDE_MULTIPLE * SIDE_MULTIPLE or small


def _resized(value: Any, factor: int) -> Any:
    """A PIL picture, or a list of them, with smaller sides; anything else as it is."""
    if isinstance(value, list) and value and all(hasattr(item, "getpixel") for item in value):
        return [_resized(item, factor) for item in value]
    if hasattr(value, "getpixel") and hasattr(value, "resize"):
        return value.resize(tuple(_side(side, factor) for side in value.size))
    return value


def _devices(plan: Plan, pipe: Any) -> Iterator[tuple[Device, int]]:
    """Where to run, and from which of the smaller calls on: the plan's device where the weights fit, then the host."""
    from planner.dryrun.inputs import call_parameters
    from planner.hardware.detect import detect_device
    from planner.measure import weight_bytes
    from planner.targets import with_budget

    budget = plan.device.budget_bytes
    if budget is None or plan.baseline.get("offload", "none") != "none" or weight_bytes(pipe) < budget:
        yield plan.device, 0 if plan.workload.batch_size > 1 else 1
    # Without a generator of its own a pipeline draws its noise on the device, where the same seed means other numbers.
    if plan.device.kind != "cpu" and "generator" in call_parameters(pipe):
        yield with_budget(detect_device("cpu"), None, pipe), 0


def _traces(source: Any, arguments: Mapping[str, Any]) -> Traces | None:
    """None where the pipeline does not take a call of this size."""
    from planner.dryrun.provider import Traces
    from planner.types import Workload

    try:
        traces = Traces.of(source, Workload(), arguments)
        traces.trace()
    except (PlannerError, RuntimeError):
        return None
    return traces


def _affordable(digest: str, traces: Traces | None, device: Device) -> bool:
    predicted = traces and _predicted(digest, traces, device)
    return bool(predicted and predicted.fits and predicted.latency_seconds <= REFERENCE_SECONDS)


def _predicted(digest: str, traces: Traces, device: Device) -> Estimate:
    from planner.calibrate import calibration_for
    from planner.cost.model import CostModel
    from planner.decide import settings_estimate

    calibration = calibration_for(device)
    model = CostModel(traces, device, calibration.coefficients, traces.workload.batch_size)
    model.memory_scale, model.time_scale = calibration.corrections(digest)
    return settings_estimate(traces, model, {})


def _output(plan: Plan, pipe: Any, arguments: Mapping[str, Any], device: Any) -> list[Any] | None:
    """Samples of a smaller call; None when it did not get through, for whatever reason: the check itself will tell."""
    import torch

    try:
        output, _ = _run(plan, pipe, arguments, lambda given: pipe(**given), device or torch.device("cpu"))
    except Exception:
        return None
    return samples(output)


def _described(arguments: Mapping[str, Any], device: Device, plan: Plan) -> str:
    size = f" of {arguments['width']}x{arguments['height']}" if {"width", "height"} <= arguments.keys() else ""
    frames = f", {arguments['num_frames']} frames" if "num_frames" in arguments else ""
    where = " on the host's processor" if device != plan.device else ""
    steps = f", {arguments['num_inference_steps']} steps" if "num_inference_steps" in arguments else ""
    return f"compared with the pipeline as it is in a smaller call: one sample{size}{frames}{steps}{where}"
