"""Making the planned call: as many pipeline calls as the plan says, with its number of steps, outputs joined."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planner.progress import Progress, silent

if TYPE_CHECKING:
    from planner.plan import Plan


def call_split(plan: Plan, pipe: Any, inputs: Mapping[str, Any], parts: int | None = None, fewer_steps: bool = True,
               say: Progress = silent) -> Any:  # fmt: skip
    """The planned workload in ``parts`` equal calls (default: as the plan says), outputs joined. Steps show the pipeline's own bar.

    A batch that ``inputs`` give explicitly is honoured; it is cut so that no call is larger than planned.
    """
    from planner.batching import share
    from planner.dryrun.inputs import batch_argument, batch_of, call_arguments, call_parameters

    workload, parts = plan.workload, int(plan.settings.get("batch_split", 1)) if parts is None else parts
    argument = batch_argument(pipe)
    asked = batch_of(pipe, inputs)
    explicit = (argument is not None and inputs.get(argument) is not None) or asked > 1
    if explicit and asked != workload.batch_size:
        parts = parts_for(asked, max(workload.batch_size // parts, 1))
        workload = workload.model_copy(update={"batch_size": asked})
    arguments = call_arguments(pipe, workload, dict(inputs))
    steps = int(plan.settings.get("steps", 0)) if fewer_steps else 0
    if steps and "num_inference_steps" in call_parameters(pipe):
        arguments["num_inference_steps"] = min(steps, int(arguments.get("num_inference_steps") or steps))
    outputs = []
    for number, piece in enumerate(share(arguments, parts), 1):
        if parts > 1:
            say(f"call {number} of {parts}")
        outputs.append(pipe(**piece))
    return outputs[0] if len(outputs) == 1 else join(outputs)


def parts_for(batch: int, largest: int) -> int:
    """Least number of equal calls that cut ``batch`` into pieces of at most ``largest``."""
    return next(parts for parts in range(1, batch + 1) if batch % parts == 0 and batch // parts <= largest)


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
