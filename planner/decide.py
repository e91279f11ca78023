"""From traces, device and wishes to a plan: searches the space, prices the neighbours, and says why the rest lost."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner.cost.estimate import estimate_of
from planner.cost.model import CostModel
from planner.cost.reserved import lacking_bytes
from planner.errors import NoFeasiblePlan, UnsupportedPipeline, UsageError
from planner.explain.words import difference, settings_text
from planner.knobs import knob, normalize, parse_settings, to_python, violations
from planner.knobs.base import Context
from planner.outcome import Outcome, choose, explain_choice
from planner.plan import FrontierPoint, Plan, SearchCounts, WhatIf
from planner.search import Candidate, Limits
from planner.space import Space, build_space, recipe_of
from planner.types import Alternative, Device, Estimate, KnobValue, Objective, Quality, Settings
from planner.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.autoplan import Request
    from planner.dryrun.provider import Traces
    from planner.models import ModelSource

NOT_NEEDED = "never faster, and the memory that it saves is not needed here"
SETUP_NOTICE = 0.05
"""Share of a call that the one-off costs must reach, spread over the assumed calls, to be pointed out."""
USUAL_CALLS = 20
"""Assumed number of calls that one-off costs (compiling, quantizing, moving) are weighed against when nobody says how many."""
HOST_NOTICE_BYTES = 16 * GIB
"""Assumed: host memory that many desktops do not have free; where the host is unknown, more than this is pointed out."""
STAGE_MARGIN = 0.02
"""Time that a stage may lose to the best plan without any memory limit before more of the space is opened."""


def decide(source: ModelSource, traces: Traces, model: CostModel, request: Request, *,
           excluded: Mapping[str, Collection[KnobValue]] | None = None) -> Plan:  # fmt: skip
    """The fastest plan that fits, with everything an explanation needs.

    Raises:
        NoFeasiblePlan: nothing fits; carries the leanest candidate and the missing bytes.
        UsageError: a fixed knob that is refused here.
    """
    space, chosen = _search(traces, model, request, excluded or {})
    outcome = explain_choice(space, chosen)
    if chosen is None:
        raise _nothing_fits(space, model, outcome)
    return _plan(source, traces, model, request, space, chosen, outcome)


def glance(traces: Traces, model: CostModel, request: Request) -> tuple[dict[str, KnobValue], Estimate]:
    """What the plan of :func:`decide` changes and its estimate, without the reasons: for tables of many plans. Raises as it does."""
    space, chosen = _search(traces, model, request, {})
    if chosen is None:
        raise _nothing_fits(space, model, explain_choice(space, None))
    changes = {name: value for name, value in _plain(chosen.settings).items() if space.baseline[name] != value}
    return changes, _estimate(model, space, chosen)


def _search(traces: Traces, model: CostModel, request: Request,
            excluded: Mapping[str, Collection[KnobValue]]) -> tuple[Space, Candidate | None]:  # fmt: skip
    """The space that was searched last, and what is taken from it."""
    context = context_for(traces, model.device, request.quality)
    host = host_budget(request, model.device)
    split_margin = model.coefficients.latency_error / 2
    for stage, margin in stages(context, request, split_margin):
        barred = {name: dict.fromkeys(values, NOT_NEEDED) for name, values in stage.items()}
        for name, values in excluded.items():
            barred[name] = barred.get(name, {}) | dict.fromkeys(values, "ruled out after a plan with it did not hold")
        with _blaming_dtype(parse_settings(request.fix or {}).get("dtype"), context):
            space = build_space(context, model, fix=request.fix, calls=request.calls or USUAL_CALLS, host_bytes=host, excluded=barred)
            chosen = _choose(space, request.objective, split_margin)
            if chosen is not None and _good_enough(space, chosen, margin):
                break
    return space, chosen


def _choose(space: Space, objective: Objective, split_margin: float) -> Candidate | None:
    """The plan to take, by a model of torch's allocator: one whose tensors fit, but not around the holes they leave, is passed over.

    The limit sinks below each plan passed over, for the ones that need less are all that may be better off.
    """
    limits = space.limits
    while True:
        chosen = choose(space, objective, split_margin=split_margin)
        if chosen is None:
            space.limits = limits
            return None
        if not space.lacking_bytes(chosen):
            return chosen
        space.limits = replace(limits, bytes=chosen.needed_bytes - 1)


Stage = tuple[dict[str, list[KnobValue]], float]
"""Values left out, and by how much a plan may be slower than the best without any memory limit to be taken."""


def stages(context: Context, request: Request, split_margin: float) -> list[Stage]:
    """Values left out at first, ever fewer of them. Each needs dry runs of its own, and none of them is ever faster.

    Tiling, smaller tiles and splitting the batch only save memory, files only the host's; fp32 saves nothing that 16 bit does
    not. So when the best plan without them is nearly as fast as the best without a memory limit, they cannot help and need not
    be traced; a split must win by ``split_margin`` in any case. The last stage leaves nothing out and is for when nothing else
    fits.
    """
    if request.objective == "memory":
        return [({}, 0.0)]
    fixed = request.fix or {}

    def beyond(name: str, keep: int = 1) -> list[KnobValue]:
        return [] if name in fixed else list(knob(name).values(context)[keep:])

    half = context.device.kind != "cpu" and context.facts.dtype != "fp32" and "dtype" not in fixed
    split: dict[str, list[KnobValue]] = {"dtype": ["fp32"] if half else [], "offload_disk": beyond("offload_disk")}
    tiles = split | {"batch_split": beyond("batch_split")}
    small = tiles | {"vae_tile": beyond("vae_tile", 2)}
    whole = tiles | {"vae_tiling": beyond("vae_tiling"), "vae_tile": beyond("vae_tile")}
    usual = split | {"vae_tile": beyond("vae_tile", 2)}
    return [(whole, STAGE_MARGIN), (small, STAGE_MARGIN), (tiles, split_margin), (usual, float("inf")), ({}, float("inf"))]


def _good_enough(space: Space, chosen: Candidate, margin: float) -> bool:
    """Nearly as fast as the best plan without any memory limit, so that what the stage leaves out cannot help."""
    unlimited = space.solver.best(Limits())
    return unlimited is not None and chosen.cost <= unlimited.cost * (1 + margin)


def settings_estimate(traces: Traces, model: CostModel, settings: Settings, quality: Quality = "lossy") -> Estimate:
    """The estimate of one combination. Raises UsageError where a rule forbids it, with the rule."""
    context = context_for(traces, model.device, quality)
    broken = violations(settings, context)
    if broken:
        name, value, reason, source = broken[0]
        raise UsageError(f"{name}={value} cannot be used here: {reason} [{source}].")
    full = normalize(settings, context)
    with _blaming_dtype(full["dtype"], context):
        recipe = recipe_of(full, context)
        cost = model.cost(recipe)
        found = estimate_of(model, recipe, cost)
        return found.model_copy(update={"fits": found.fits and not lacking_bytes(model, recipe, cost)})


@contextlib.contextmanager
def _blaming_dtype(dtype: KnobValue | None, context: Context) -> Iterator[None]:
    """A dry run that fails in a dtype which the user asked for says so, first of all where components differ in it."""
    try:
        yield
    except UnsupportedPipeline as error:
        if dtype in (None, context.facts.dtype):
            raise
        raise UsageError(f"dtype={dtype} cannot be used here: {error}") from error


def context_for(traces: Traces, device: Device, quality: Quality) -> Context:
    """What knobs may look at. On a device that is not here, torch's own compiler and torchao count as installable."""
    return Context(facts=traces.facts, device=device, workload=traces.workload, quality=quality, usable=usable_here(device))


def usable_here(device: Device) -> dict[str, str | None]:
    """Backend to None when usable, else the reason."""
    from planner.hardware.backends import usable_backends

    found: dict[str, str | None] = {"triton": None, "torchao": None}
    if device.free_bytes is not None:
        found = dict(usable_backends(device))
    if device.kind == "cuda":
        found["inductor"] = found.get("triton", "triton is not installed")
    else:
        compiler = shutil.which("g++") or shutil.which("clang++")
        found["inductor"] = None if compiler else "no C++ compiler is installed (g++ or clang++)"
    found["flash"], found["sage"] = found.get("flash_attn", "not installed"), found.get("sageattention", "not installed")
    return found


def host_budget(request: Request, device: Device) -> int | None:
    """Host memory a plan may use: what was asked for, else what is free here; unknown for a device that is elsewhere."""
    if request.host_budget_bytes is not None:
        return request.host_budget_bytes
    return device.host_free_bytes if device.kind != "cpu" else None


# -- the plan ---------------------------------------------------------------------------------------------------------


def _lossy_hint(space: Space) -> str:
    return "" if space.context.quality == "lossy" else ", or allow quantized weights with quality lossy"


def _nothing_fits(space: Space, model: CostModel, outcome: Outcome) -> NoFeasiblePlan:
    leanest, budget = outcome.leanest, space.limits.bytes
    if leanest is None:
        return NoFeasiblePlan("the rules leave no combination of these fixed knobs; leave one of them free.")
    changes = {name: value for name, value in leanest.settings.items() if space.baseline.get(name) != value}
    named = settings_text(changes, "the pipeline as it is")
    short = outcome.shortfall_bytes or 0
    where = f" in {outcome.short_phase}" if outcome.short_phase else ""
    if budget is not None and leanest.needed_bytes > budget:
        lacks = f"needs {format_bytes(leanest.needed_bytes)}{where}, {format_bytes(short)} more than the budget of {format_bytes(budget)}"
    elif not short:
        short = space.lacking_bytes(leanest)
        lacks = f"needs {format_bytes(leanest.needed_bytes)}{where} and {format_bytes(short)} more for the holes between its blocks"
    else:
        lacks = f"needs {format_bytes(leanest.stock_bytes)} of host memory, {format_bytes(short)} more than there is"
    message = f"nothing fits: the leanest plan ({named}) {lacks}. Lower the batch size or the resolution, free memory{_lossy_hint(space)}."
    return NoFeasiblePlan(message, leanest=_alternative(model, space, leanest), shortfall_bytes=short)


def _plan(source: ModelSource, traces: Traces, model: CostModel, request: Request, space: Space, chosen: Candidate,
          outcome: Outcome) -> Plan:  # fmt: skip
    predicted = estimate_of(model, space.recipe(_plain(chosen.settings)))
    alternatives = [Alternative(settings=_plain(chosen.settings), predicted=predicted)]
    alternatives += [_alternative(model, space, item) for item in outcome.alternatives if item.values != chosen.values]
    return Plan(
        model=source.name, pipeline_class=traces.facts.class_name, digest=source.digest, workload=traces.workload, device=model.device,
        quality=request.quality, objective=request.objective, calls=request.calls, settings=_plain(chosen.settings),
        baseline=dict(space.baseline), predicted=predicted,
        baseline_predicted=_untouched(model, space, outcome.baseline), alternatives=tuple(alternatives), rejected=outcome.rejected,
        frontier=tuple(_point(space, item) for item in outcome.frontier),
        candidates=tuple(_apart(_point(space, item), chosen.settings) for item in outcome.priced),
        binding=outcome.binding, what_if=_more(outcome),
        statements=to_python(_plain(chosen.settings), space.context), batch_argument=traces.facts.batch_argument,
        counts=SearchCounts(candidates=outcome.candidates, evaluated=outcome.evaluated),
        warnings=tuple(_warnings(model, space, chosen, predicted, outcome)), notes=tuple(dict.fromkeys((*source.notes, *traces.notes))),
    )  # fmt: skip


def _point(space: Space, item: Candidate) -> FrontierPoint:
    return FrontierPoint(peak_allocated_bytes=item.needed_bytes, latency_seconds=item.nanoseconds / 1e9,
                         settings=_plain(item.settings), fits=item.fits(space.limits))  # fmt: skip


def _apart(point: FrontierPoint, settings: Mapping[str, Any]) -> FrontierPoint:
    """The point with only those settings that are others than the plan's."""
    return point.model_copy(update={"settings": difference(point.settings, settings)})


def _more(outcome: Outcome) -> WhatIf | None:
    hint = outcome.what_if
    return None if hint is None else WhatIf(extra_bytes=hint.extra_bytes, settings=_plain(hint.candidate.settings), speedup=hint.speedup)


def _warnings(model: CostModel, space: Space, chosen: Candidate, predicted: Estimate, outcome: Outcome) -> list[str]:
    found = []
    if int(chosen.settings["batch_split"]) > 1:
        found.append(f"the batch runs in {chosen.settings['batch_split']} calls: use plan.run(pipe, …), not pipe(…)")
    if predicted.basis != "measured":
        here = "run: planner calibrate" if model.device.free_bytes is not None else "on that machine run: planner calibrate"
        found.append(f"times rest on {predicted.basis} coefficients, not on measurements of this device; {here}")
    if chosen.settings["dtype"] == "fp16" and space.baseline["dtype"] != "fp16":
        found.append("fp16 can overflow to black pictures in models that were not trained for it; autoplan checks the output")
    if space.limits.stock_bytes is None and predicted.host_bytes > HOST_NOTICE_BYTES:
        found.append(f"needs {format_bytes(predicted.host_bytes)} of host memory; to plan within yours add --host-memory, such as 32GiB")
    share = predicted.setup_seconds / USUAL_CALLS
    if space.problem.calls == USUAL_CALLS and share > SETUP_NOTICE * predicted.latency_seconds:
        setup = format_seconds(predicted.setup_seconds)
        found.append(f"setting up takes {setup}, weighed against {USUAL_CALLS} calls; say how many: --calls N")
    hint = outcome.what_if
    if hint is not None and space.budget_bytes is not None and hint.candidate.needed_bytes <= space.budget_bytes:
        found.append(f"a plan {hint.speedup:.2f} times as fast would fit but for the holes between its tensors: before starting Python "
                     "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, then plan again")  # fmt: skip
    fallbacks = model.trace_for(space.recipe(_plain(chosen.settings))).fallbacks
    if fallbacks:
        count = "1 operation" if len(fallbacks) == 1 else f"{len(fallbacks)} operations"
        found.append(f"{count} could not be traced exactly: {', '.join(fallbacks[:3])}")
    return found


def _alternative(model: CostModel, space: Space, item: Candidate) -> Alternative:
    return Alternative(settings=_plain(item.settings), predicted=_estimate(model, space, item))


def _estimate(model: CostModel, space: Space, item: Candidate) -> Estimate:
    """Without the replay of the allocator and the single terms, which only the chosen plan is shown with."""
    return estimate_of(model, space.recipe(_plain(item.settings)), detailed=False).model_copy(update={"terms": ()})


def _untouched(model: CostModel, space: Space, item: Candidate) -> Estimate:
    found = _estimate(model, space, item)
    return found.model_copy(update={"fits": found.fits and not space.lacking_bytes(item)})


def _plain(settings: Mapping[str, Any]) -> dict[str, KnobValue]:
    return {name: value for name, value in settings.items() if isinstance(value, bool | int | str)}
