"""Plans in force on live pipelines: applied, taken back, run under, and replaced when memory runs out."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planner.errors import ApplyError, NoFeasiblePlan, UnsupportedPipeline
from planner.types import Settings
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.apply import Applied
    from planner.plan import Plan

logger = logging.getLogger(__name__)
MAX_RECOVERIES = 3


@dataclass(slots=True)
class InForce:
    """A plan on a pipeline, and what undoes it."""

    plan: Plan
    applied: Applied


_in_force: weakref.WeakKeyDictionary[Any, InForce] = weakref.WeakKeyDictionary()


def in_force(pipe: Any) -> InForce | None:
    """What is in force on ``pipe``, if anything that this process applied."""
    return _in_force.get(pipe)


def put_in_force(plan: Plan, pipe: Any, settings: Settings | None = None) -> None:
    """Apply a plan's settings (or those of one of its alternatives) as one transaction.

    Raises:
        UnsupportedPipeline: another pipeline class than the plan's.
        ApplyError: a plan is in force already, or a knob failed; the pipeline is as it was.
    """
    from planner.apply import apply_settings
    from planner.dryrun.facts import read_facts

    name = type(pipe).__name__
    if name != plan.pipeline_class:
        raise UnsupportedPipeline(f"the plan is for {plan.pipeline_class}, this is {name}; plan for it: autoplan(pipe).")
    if in_force(pipe) is not None:
        raise ApplyError("a plan is in force on this pipeline already; take it back first: plan.undo(pipe).")
    chosen = dict(settings if settings is not None else plan.settings)
    applied = apply_settings(pipe, chosen, torch_device(plan), read_facts(pipe))
    _in_force[pipe] = InForce(plan, applied)


def take_back(pipe: Any) -> None:
    """Undo the plan in force. Raises ApplyError when there is none, or when the pipeline still differs afterwards."""
    current = _in_force.pop(pipe, None)
    if current is None:
        raise ApplyError("no plan of this process is in force on this pipeline, so there is nothing to undo.")
    current.applied.undo()


def torch_device(plan: Plan) -> Any:
    """The torch device a plan was made for; on CUDA the current one."""
    import torch

    if plan.device.kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if plan.device.kind == "cpu" else torch.device(plan.device.kind, 0)


def run_under(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Any:
    """Call the pipeline under the plan; see :meth:`planner.Plan.run`."""
    if in_force(pipe) is None:
        plan.apply(pipe)
    tried = 0
    while True:
        settings = in_force(pipe).applied.settings  # type: ignore[union-attr]
        try:
            return call_split(plan, pipe, inputs, int(settings.get("batch_split", 1)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tried += 1
            _next_plan(plan, pipe, settings, tried, error)


def call_split(plan: Plan, pipe: Any, inputs: Mapping[str, Any], parts: int) -> Any:
    """The planned workload in ``parts`` equal calls, outputs joined."""
    from planner.batching import share
    from planner.dryrun.inputs import call_arguments

    arguments = call_arguments(pipe, plan.workload, dict(inputs))
    outputs = [pipe(**piece) for piece in share(arguments, parts)]
    return outputs[0] if len(outputs) == 1 else join(outputs)


def join(outputs: list[Any]) -> Any:
    """One pipeline output from several: every field that is a list, array or tensor is concatenated along the batch."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(join_values([output[index] for output in outputs]) for index in range(len(first)))
    joined = copy.copy(first)
    for name in list(vars(first)):
        value = join_values([getattr(output, name) for output in outputs])
        setattr(joined, name, value)
        if isinstance(joined, dict) and name in joined:
            joined[name] = value
    return joined


def join_values(values: list[Any]) -> Any:
    """Concatenate lists, numpy arrays or tensors; anything else must be the same in all and is taken from the first."""
    first = values[0]
    if isinstance(first, list):
        return [item for value in values for item in value]
    if type(first).__module__ == "numpy" and first.ndim:
        import numpy

        return numpy.concatenate(values)
    if type(first).__module__.startswith("torch") and first.ndim:
        import torch

        return torch.cat(values)
    return first


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a device running out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def give_back_memory(pipe: Any) -> None:
    """What an exception in the middle of a call leaves behind: models on the device under model offload, cached blocks."""
    import gc

    import torch

    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _next_plan(plan: Plan, pipe: Any, failed: Settings, tried: int, error: BaseException) -> None:
    """Replace the settings in force by the next best that need less memory. Raises NoFeasiblePlan after too many."""
    give_back_memory(pipe)
    known = (item.predicted.peak_allocated_bytes for item in plan.alternatives if item.settings == failed)
    bar = next(known, plan.predicted.peak_allocated_bytes)
    smaller = [item for item in plan.alternatives if item.predicted.peak_allocated_bytes < 0.97 * bar]
    take_back(pipe)
    if tried > MAX_RECOVERIES or not smaller:
        raise NoFeasiblePlan(
            f"out of memory under the plan, and {'no alternative needs less' if not smaller else f'{MAX_RECOVERIES} others failed too'}; "
            "the pipeline is as it was. Plan again with a smaller memory_budget or batch_size.",
            leanest=min(plan.alternatives, key=lambda item: item.predicted.peak_allocated_bytes, default=None)) from error  # fmt: skip
    chosen = min(smaller, key=lambda item: item.predicted.latency_seconds)
    changed = ", ".join(f"{name}={value}" for name, value in chosen.settings.items() if failed.get(name) != value)
    logger.warning("out of memory: now %s (predicted peak %s)", changed, format_bytes(chosen.predicted.peak_allocated_bytes))
    put_in_force(plan, pipe, chosen.settings)
