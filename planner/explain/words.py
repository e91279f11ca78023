"""Phrases that every rendering shares: settings, workloads, intervals, comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.types import Device, Estimate, KnobValue, Rejection, Settings, Workload
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.plan import Plan

WISHES = {"latency": "least time for a call", "throughput": "most samples per second", "memory": "least memory"}
"""What the objectives mean."""
LOST = ("too large", "host RAM", "slower", "no gain", "ruled out")
"""Why combinations lose, in the order in which an explanation says so."""
NO_BETTER = "neither faster nor smaller"


def value_text(value: KnobValue) -> str:
    """As ``--set`` takes it: ``true``, ``false``, a number or a word."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def settings_text(settings: Settings, nothing: str = "nothing changed") -> str:
    """``offload=model vae_tiling=true``, knobs by name."""
    return " ".join(f"{name}={value_text(settings[name])}" for name in sorted(settings)) or nothing


def difference(settings: Settings, other: Settings) -> dict[str, KnobValue]:
    """The settings that ``other`` does not have alike."""
    return {name: value for name, value in settings.items() if other.get(name) != value}


def wish_text(plan: Plan) -> str:
    """Objective, quality and number of calls, as asked for."""
    calls = "" if plan.calls is None else f", for {plan.calls} call{'s' if plan.calls > 1 else ''}"
    return f"{WISHES[plan.objective]}, quality {plan.quality}{calls}"


def plan_line(plan: Plan) -> str:
    """The plan in one line: what it changes."""
    return settings_text(plan.changes, "leave the pipeline as it is")


def workload_text(workload: Workload) -> str:
    """``batch 8, 1024x1024, 30 steps``; what the pipeline decides itself is left out."""
    parts = [f"batch {workload.batch_size}"]
    if workload.width and workload.height:
        parts.append(f"{workload.width}x{workload.height}")
    elif workload.width or workload.height:
        parts.append(f"width {workload.width}" if workload.width else f"height {workload.height}")
    for value, unit in ((workload.num_frames, "frames"), (workload.num_inference_steps, "steps")):
        if value is not None:
            parts.append(f"{value} {unit}")
    if workload.guidance_scale is not None:
        parts.append(f"guidance {workload.guidance_scale:g}")
    return ", ".join(parts)


def budget_text(device: Device) -> str:
    """``budget 10.90 GiB of 12.00 GiB``; what is free now is named where it is known."""
    if device.budget_bytes is None:
        return f"no budget set, {format_bytes(device.total_bytes)} in all"
    free = "" if device.free_bytes is None else f", {format_bytes(device.free_bytes)} free"
    return f"budget {format_bytes(device.budget_bytes)} of {format_bytes(device.total_bytes)}{free}"


def bytes_interval(estimate: Estimate, counter: str) -> str:
    """``9.81 GiB (9.20 to 10.41)`` of a counter such as ``peak_allocated_bytes``."""
    value, low, high = (getattr(estimate, f"{counter}{end}") for end in ("", "_low", "_high"))
    return f"{format_bytes(value)} ({_bare(low, high)})"


def _bare(low: float, high: float) -> str:
    """``9.20 to 10.41`` where both have one unit, else with units."""
    first, second = format_bytes(low).split(), format_bytes(high).split()
    return f"{first[0]} to {second[0]}" if first[1:] == second[1:] else f"{' '.join(first)} to {' '.join(second)}"


def seconds_interval(estimate: Estimate, what: str = "latency_seconds") -> str:
    """``21.0 s (19.5 s to 22.5 s)``; the value alone when it is unknown or certain."""
    value, low, high = (getattr(estimate, f"{what}{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or low == high:
        return format_seconds(value)
    return f"{format_seconds(value)} ({format_seconds(low)} to {format_seconds(high)})"


def times(value: float, reference: float) -> str:
    """``1.8 times as long``, ``12 % longer``, ``as long``: a latency against a reference."""
    if reference <= 0:
        return "of unknown relation"
    ratio = value / reference
    if abs(ratio - 1) < 0.005:
        return "as long"
    if ratio >= 2:
        return f"{ratio:.1f} times as long"
    return f"{abs(ratio - 1) * 100:.0f} % {'longer' if ratio > 1 else 'shorter'}"


def why_lost(estimate: Estimate, chosen: Estimate) -> str:
    """In what a feasible alternative is behind the chosen plan."""
    time = times(estimate.latency_seconds, chosen.latency_seconds)
    extra = estimate.peak_allocated_bytes - chosen.peak_allocated_bytes
    if abs(extra) < 0.005 * chosen.peak_allocated_bytes:
        return NO_BETTER if time == "as long" else time
    return f"{time}, {format_bytes(abs(extra))} {'more' if extra > 0 else 'less'}"


def rejected_name(rejection: Rejection, plan: Plan) -> str:
    """The settings that a rejected group shares; a whole candidate by what it sets differently from the plan."""
    if rejection.settings == plan.baseline:
        return "the pipeline as it is"
    if rejection.settings.keys() >= plan.settings.keys():
        return settings_text(difference(rejection.settings, plan.settings), "as chosen")
    return settings_text(rejection.settings)


def rejection_label(rejection: Rejection) -> str:
    """One of :data:`LOST`. What is as fast, or faster by no more than the model's uncertainty, is not called slower."""
    if rejection.kind in ("time", "dominated"):
        return "slower" if "times as slow" in rejection.reason else "no gain"
    return {"memory": "too large", "host": "host RAM", "rule": "ruled out"}[rejection.kind]


def rejection_text(rejection: Rejection) -> str:
    """Why a rejected combination lost, in one phrase."""
    if rejection.shortfall_bytes is not None:
        where = f" in {rejection.phase}" if rejection.phase else ""
        resource = " of host RAM" if rejection.kind == "host" else ""
        return f"short by {format_bytes(rejection.shortfall_bytes)}{resource}{where}"
    return rejection.reason


def throughput(plan: Plan, estimate: Estimate) -> float | None:
    """Samples per second of one call; None when its time is not above zero."""
    return plan.workload.batch_size / estimate.latency_seconds if estimate.latency_seconds > 0 else None
