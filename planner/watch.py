"""What is no longer as it was when a plan was made: free memory, the call's sizes, the pipeline's components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.plan import Plan

SIZES = ("height", "width", "num_frames", "num_inference_steps")
COMPARED_WITH_DEFAULT = ("num_frames", "num_inference_steps")


def changes_since(plan: Plan, pipe: Any, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """What has changed since ``plan`` was made, one line each; empty when it still holds.

    ``inputs`` are arguments of the next call. Cheap enough to ask before every call: counters and module counts.
    """
    found = [*_sizes(plan, pipe, inputs or {}), *_components(plan, pipe)]
    lacking = _memory(plan, pipe)
    return [*found, lacking] if lacking else found


def module_counts(pipe: Any) -> dict[str, int]:
    """Modules per component."""
    from planner.dryrun.facts import pipeline_modules

    return {name: sum(1 for _ in module.modules()) for name, module in pipeline_modules(pipe).items()}


def changed_components(pipe: Any) -> list[str]:
    """Names of components whose modules are not those that the plan in force left there."""
    from planner.force import in_force

    current, now = in_force(pipe), module_counts(pipe)
    before = current.modules if current is not None else now
    return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))


def _sizes(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> list[str]:
    from planner.dryrun.inputs import batch_argument, batch_of, call_parameters

    found = []
    argument = batch_argument(pipe)
    asked = batch_of(pipe, inputs)
    given = asked > 1 or (argument is not None and inputs.get(argument) is not None)
    if given and asked != plan.workload.batch_size:
        found.append(f"the plan was made for a batch of {plan.workload.batch_size}, this call asks for {asked}")
    parameters = call_parameters(pipe)
    for name in SIZES:
        value, planned = inputs.get(name), getattr(plan.workload, name)
        if planned is None and name in COMPARED_WITH_DEFAULT and name in parameters:
            planned = parameters[name].default
        if isinstance(value, int) and value != planned and (planned is not None or name not in COMPARED_WITH_DEFAULT):
            was = planned if planned is not None else "the pipeline's default"
            found.append(f"the plan was made for {name}={was}, this call asks for {value}")
    return found


def _components(plan: Plan, pipe: Any) -> list[str]:
    """Components that were changed: by module counts under a plan in force, by the digest before one is."""
    from planner.force import in_force
    from planner.models.live import live_digest

    if in_force(pipe) is not None:
        changed = changed_components(pipe)
        return [f"{', '.join(changed)} changed after the plan was applied (a LoRA or adapter?)"] if changed else []
    if plan._recall() is pipe and live_digest(pipe) != plan.digest:  # a plan from a file may be of a folder
        return ["the pipeline is not as it was when the plan was made (a LoRA, another component, dtype or processor?)"]
    return []


def _memory(plan: Plan, pipe: Any) -> str | None:
    """A line when what is free now, with what the pipeline holds already, is less than the plan needs."""
    from planner.force import torch_device
    from planner.measure import available_bytes

    available = available_bytes(torch_device(plan), pipe)
    needed = plan.predicted.peak_allocated_bytes
    if available is None or available >= needed:
        return None
    return f"the plan needs {format_bytes(needed)} on {plan.device.name}, only {format_bytes(available)} can be had now"
