"""A plan as plain diffusers code: what the knobs did, in the order in which they did it, without this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from planner.errors import ApplyError, PlannerError
from planner.explain import words
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.facts import PipelineFacts
    from planner.plan import Plan

_MODULES = ("diffusers", "diffusers.hooks", "diffusers.models.attention_processor", "torch", "torchao.quantization")
"""What the statements may name, in the order of their imports."""
_SIZES = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")


def render(plan: Plan, facts: PipelineFacts | None = None) -> str:
    """Python source that acts on a variable ``pipe`` and defines ``generate(**inputs)``, the planned call.

    ``facts`` are those of the untouched pipeline; by default they are looked up by the plan's model or pipeline.

    Raises:
        ApplyError: the plan was made for a live pipeline that this process no longer has.
    """
    lines, batch_argument = plan.statements, plan.batch_argument
    if facts is not None or lines is None:
        lines, batch_argument = _written(plan, facts if facts is not None else find_facts(plan))
    statements = [line for line in lines if not line.startswith("# call pipe(")]
    body = [*_head(plan), *_imports(statements), *(statements or ["# nothing to change"]), "", "", *_call(plan, batch_argument)]
    return "\n".join(body) + "\n"


def _written(plan: Plan, facts: PipelineFacts) -> tuple[tuple[str, ...], str | None]:
    from planner.knobs import Context, normalize, to_python

    context = Context(facts=facts, device=plan.device, workload=plan.workload, quality=plan.quality)
    return to_python(normalize(plan.settings, context), context), facts.batch_argument


def find_facts(plan: Plan) -> PipelineFacts:
    """Facts of the untouched pipeline: of the live one the plan is bound to, else of its model by name.

    Raises:
        ApplyError: neither is at hand.
    """
    pipe = plan._recall()
    if pipe is not None:
        from planner.dryrun.facts import read_facts
        from planner.force import in_force

        if in_force(pipe) is None:
            return read_facts(pipe)
    try:
        return _facts_by_name(plan)
    except PlannerError as error:
        raise ApplyError(
            f"the plan was made for a live {plan.pipeline_class}, whose parts are not in the plan file; write the code while the "
            "pipeline is there and untouched, or plan for its folder: planner.explain(folder)."
        ) from error


def _facts_by_name(plan: Plan) -> PipelineFacts:
    from planner.dryrun.provider import Traces
    from planner.models import resolve

    source = resolve(plan.model)
    if source.digest != plan.digest:
        raise ApplyError(f"{plan.model} is not what it was when the plan was made; plan again.")
    return Traces.of(source, plan.workload).facts


def _head(plan: Plan) -> list[str]:
    peak, time = format_bytes(plan.predicted.peak_allocated_bytes), format_seconds(plan.predicted.latency_seconds)
    return [
        f"# {plan.model} ({plan.pipeline_class}), {words.workload_text(plan.workload)}",
        f"# on {plan.device.name}: {words.plan_line(plan)}",
        f"# predicted: peak {peak}, {time} a call ({plan.predicted.basis} figures)",
        f'# pipe = {plan.pipeline_class}.from_pretrained(...), as published: in {plan.baseline.get("dtype", "its own dtype")}',
    ]


def _imports(statements: Iterable[str]) -> list[str]:
    """What the statements name, and nothing else."""
    text = "\n".join(statements)
    found = [f"import {module}" for module in _MODULES if f"{module}." in text]
    return ["", *found, ""] if found else [""]


def _call(plan: Plan, batch_argument: str | None) -> list[str]:
    """The planned call as a function: sizes filled in, a split batch as a loop."""
    parts = int(plan.settings.get("batch_split", 1))
    sizes = {name: getattr(plan.workload, name) for name in _SIZES if getattr(plan.workload, name) is not None}
    if plan.settings.get("steps"):
        sizes["num_inference_steps"] = int(plan.settings["steps"])
    if batch_argument is not None:
        sizes[batch_argument] = plan.workload.batch_size // parts
    known = "".join(f'"{name}": {value!r}, ' for name, value in sizes.items())
    merged = f"{{{known}**inputs}}"
    if parts == 1:
        return ["def generate(**inputs):", f"    return pipe(**{merged})"]
    return [
        "def generate(**inputs):",
        f'    """The batch of {plan.workload.batch_size} in {parts} calls; all samples in one list."""',
        "    samples = []",
        f"    for _ in range({parts}):",
        f"        samples.extend(pipe(**{{{known}**inputs, \"return_dict\": False}})[0])",
        "    return samples",
    ]
