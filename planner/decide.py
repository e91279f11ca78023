"""From traces, device and wishes to a plan: searches the space, prices the neighbours, and says why the rest lost."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from planner.cost.estimate import estimate_of
from planner.cost.model import Cost, CostModel
from planner.errors import NoFeasiblePlan, UsageError
from planner.knobs import normalize, violations
from planner.knobs.base import Context
from planner.plan import FrontierPoint, Plan, SearchCounts, WhatIf
from planner.search import Candidate, Limits
from planner.space import Space, build_space, recipe_of
from planner.types import Alternative, Device, Estimate, KnobValue, Quality, Rejection, Settings
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.autoplan import Request
    from planner.dryrun.provider import Traces
    from planner.models import ModelSource

MAJOR = ("offload", "dtype", "compile", "attention", "vae_tiling", "vae_slicing", "channels_last", "quantization", "batch_split")
"""Knobs whose other values are shown as the nearest alternatives."""
MAX_ALTERNATIVES = 12
SPLIT_MARGIN = 0.10
"""Assumed: a split batch needs plan.run, so it must win by more than the model's doubt about two plans on one device."""
MORE_MEMORY = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Budgets, in multiples of the present one, that are tried for "with so much more"."""


def decide(source: ModelSource, traces: Traces, model: CostModel, request: Request, *,
           excluded: Mapping[str, Collection[KnobValue]] | None = None) -> Plan:  # fmt: skip
    """The fastest plan that fits, with everything an explanation needs.

    Raises:
        NoFeasiblePlan: nothing fits; carries the leanest candidate and the missing bytes.
        UsageError: a fixed knob that is refused here.
    """
    context = context_for(traces, model.device, request.quality)
    host = host_budget(request, model.device)
    space = build_space(context, model, fix=request.fix, calls=request.calls, host_bytes=host, excluded=excluded)
    chosen = _choose(space, request)
    if chosen is None:
        raise _nothing_fits(space, model, request)
    return _plan(source, traces, model, request, space, chosen)


def settings_estimate(traces: Traces, model: CostModel, settings: Settings, quality: Quality = "lossy") -> Estimate:
    """The estimate of one combination. Raises UsageError where a rule forbids it, with the rule."""
    context = context_for(traces, model.device, quality)
    broken = violations(settings, context)
    if broken:
        name, value, reason, source = broken[0]
        raise UsageError(f"{name}={value} cannot be used here: {reason} [{source}].")
    full = normalize(settings, context)
    return estimate_of(model, recipe_of(full, context))


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


# -- choosing ---------------------------------------------------------------------------------------------------------


def _choose(space: Space, request: Request) -> Candidate | None:
    """The optimum of the objective; a split batch only where it clearly wins or nothing unsplit fits."""
    solver, limits = space.solver, space.limits
    if request.objective == "memory":
        return solver.leanest(stock_bytes=limits.stock_bytes) if solver.best(limits) is not None else None
    if "batch_split" in space.fixed or request.objective == "throughput":
        return solver.best(limits)
    whole = solver.best(limits, {"batch_split": 1})
    if whole is None:
        return solver.best(limits)
    unlimited = solver.best(Limits(), {"batch_split": 1})
    if unlimited is not None and whole.cost * (1 - SPLIT_MARGIN) <= unlimited.cost:
        return whole  # no split is faster than the unsplit optimum without a limit, so none can win by the margin
    split = solver.best(limits)
    return split if split is not None and split.cost < whole.cost * (1 - SPLIT_MARGIN) else whole


def _nothing_fits(space: Space, model: CostModel, request: Request) -> NoFeasiblePlan:
    leanest = space.solver.leanest(stock_bytes=space.limits.stock_bytes) or space.solver.leanest()
    if leanest is None:
        return NoFeasiblePlan("the rules leave no combination of these fixed knobs; leave one of them free.")
    budget, host = space.limits.bytes, space.limits.stock_bytes
    missing = max(leanest.needed_bytes - (budget or leanest.needed_bytes), 0)
    short_host = max(leanest.stock_bytes - (host if host is not None else leanest.stock_bytes), 0)
    changes = _text({name: value for name, value in leanest.settings.items() if space.baseline.get(name) != value})
    what = f"{format_bytes(missing)} more than the budget of {format_bytes(budget)}"
    if not missing:
        what = f"{format_bytes(short_host)} more host memory than there is"
    message = (
        f"nothing fits: the leanest plan ({changes or 'the pipeline as it is'}) needs {format_bytes(leanest.needed_bytes)}, {what}. "
        "Lower batch_size or the resolution, free memory, or allow quality='lossy'."
    )
    return NoFeasiblePlan(message, leanest=_alternative(model, space, leanest), shortfall_bytes=missing or short_host)


# -- the plan ---------------------------------------------------------------------------------------------------------


def _plan(source: ModelSource, traces: Traces, model: CostModel, request: Request, space: Space, chosen: Candidate) -> Plan:
    recipe = space.recipe(_plain(chosen.settings))
    cost = model.cost(recipe)
    predicted = estimate_of(model, recipe, cost)
    rivals = _rivals(space, chosen)
    alternatives = [Alternative(settings=_plain(chosen.settings), predicted=predicted)]
    alternatives += [_alternative(model, space, item) for item in rivals]
    baseline = space.solver.evaluate(space.baseline)
    return Plan(
        model=source.name, pipeline_class=traces.facts.class_name, digest=source.digest, workload=traces.workload, device=model.device,
        quality=request.quality, objective=request.objective, calls=request.calls, settings=_plain(chosen.settings),
        baseline=dict(space.baseline), predicted=predicted, baseline_predicted=_estimate(model, space, baseline, detailed=False),
        alternatives=tuple(sorted(alternatives, key=lambda item: item.predicted.latency_seconds)),
        rejected=tuple(_rejections(space, chosen, rivals, model)), frontier=tuple(_frontier(space, chosen, rivals)),
        binding=_binding(space, chosen, cost), what_if=_what_if(space, chosen),
        counts=SearchCounts(candidates=space.problem.size, evaluated=space.solver.evaluations),
        warnings=tuple(_warnings(traces, model, space, chosen, predicted)), notes=tuple(dict.fromkeys((*source.notes, *traces.notes))),
    )  # fmt: skip


def _rivals(space: Space, chosen: Candidate) -> list[Candidate]:
    """The best plan for every other value of the major knobs, those that fit, nearest first."""
    found: dict[tuple[Any, ...], Candidate] = {}
    for name in MAJOR:
        axis = next((item for item in space.problem.axes if item.name == name), None)
        for value in axis.values if axis is not None else ():
            if value != chosen.settings[name]:
                rival = space.solver.best(space.limits, _beside(chosen, name, value))
                if rival is not None:
                    found[rival.values] = rival
    return sorted(found.values(), key=lambda item: item.rank)[:MAX_ALTERNATIVES]


def _rejections(space: Space, chosen: Candidate, rivals: list[Candidate], model: CostModel) -> list[Rejection]:
    found = [Rejection(settings={name: value}, kind="rule", reason=reason) for name, value, reason in space.left_out]
    for name in MAJOR:
        axis = next((item for item in space.problem.axes if item.name == name), None)
        for value in axis.values if axis is not None else ():
            if value == chosen.settings[name]:
                continue
            found.append(_why_not(space, chosen, name, value, model))
    lost = [item for item in (space.solver.evaluate(space.baseline),) if not item.fits(space.limits)]
    for item in lost:
        found.insert(0, _too_big(space, item, dict(space.baseline), "leaving the pipeline as it is", model))
    return found


def _beside(chosen: Candidate, name: str, value: Any) -> dict[str, Any]:
    """One knob at another value, the batch split as chosen unless it is that knob."""
    return {"batch_split": chosen.settings["batch_split"]} | {name: value}


def _why_not(space: Space, chosen: Candidate, name: str, value: Any, model: CostModel) -> Rejection:
    fixed = _beside(chosen, name, value)
    best = space.solver.best(space.limits, fixed)
    settings = {name: value}
    count = space.problem.size // len(next(axis.values for axis in space.problem.axes if axis.name == name))
    if best is not None:
        ratio = best.cost / max(chosen.cost, 1)
        reason = "no faster, and departs further from the pipeline as it is"
        if ratio > 1.005:
            reason = f"{(ratio - 1) * 100:.0f} % slower at best"
        return Rejection(settings=settings, kind="time", reason=reason, count=count)
    leanest = space.solver.leanest(fixed, space.limits.stock_bytes)
    if leanest is None:
        return Rejection(settings=settings, kind="rule", reason="conflicts with what else is needed here", count=count)
    return _too_big(space, leanest, settings, "at its leanest", model, count)


def _too_big(space: Space, item: Candidate, settings: dict[str, Any], what: str, model: CostModel, count: int = 1) -> Rejection:
    budget, host = space.limits.bytes, space.limits.stock_bytes
    if budget is not None and item.needed_bytes > budget:
        short = item.needed_bytes - budget
        cost = model.cost(space.recipe(_plain(item.settings)))
        phase = max(cost.phases, key=lambda part: part.peak_bytes, default=None)
        name = cost.trace.calls[phase.call].name if phase is not None else None
        reason = f"{what} it needs {format_bytes(item.needed_bytes)}, {format_bytes(short)} too much" + (f" (in {name})" if name else "")
        return Rejection(settings=_plain(settings), kind="memory", reason=reason, shortfall_bytes=short, phase=name, count=count)
    short = item.stock_bytes - (host or 0)
    return Rejection(settings=_plain(settings), kind="host", reason=f"{what} it needs {format_bytes(item.stock_bytes)} of host memory",
                     shortfall_bytes=short, count=count)  # fmt: skip


def _frontier(space: Space, chosen: Candidate, rivals: list[Candidate]) -> list[FrontierPoint]:
    """Least time for ever smaller budgets, from no limit down to the leanest plan. No point is beaten in both."""
    split = {"batch_split": chosen.settings["batch_split"]}
    points, limit = [], None
    for _ in range(12):
        best = space.solver.best(Limits(limit, space.limits.stock_bytes), split)
        if best is None:
            break
        points.append(FrontierPoint(peak_allocated_bytes=best.needed_bytes, latency_seconds=best.nanoseconds / 1e9,
                                    settings=_plain(best.settings), fits=best.fits(space.limits)))  # fmt: skip
        limit = best.needed_bytes - max(best.needed_bytes // 20, 1)
    return points


def _binding(space: Space, chosen: Candidate, cost: Cost) -> str:
    """What limits the chosen plan now: the memory of a phase that a faster plan would overflow, or how its time is spent."""
    free = space.solver.best(Limits(None, space.limits.stock_bytes), {"batch_split": chosen.settings["batch_split"]})
    longest = max(cost.phases, key=lambda phase: phase.seconds)
    name = cost.trace.calls[longest.call].name
    spent = "transfer" if longest.transfer_seconds > longest.compute_seconds else longest.cost.time.bound
    if free is not None and free.cost < 0.995 * chosen.cost:
        top = max(cost.phases, key=lambda phase: phase.peak_bytes)
        peak = cost.trace.calls[top.call].name
        return f"memory: {peak} sets the peak, and every faster plan needs more than the budget; time goes to {name} ({spent}-bound)"
    return f"{spent}: {name} takes most of the time; memory does not limit the choice"


def _what_if(space: Space, chosen: Candidate) -> WhatIf | None:
    """The nearest larger budget that would change the choice for the better."""
    budget = space.limits.bytes
    if budget is None:
        return None
    split = {"batch_split": chosen.settings["batch_split"]}
    for factor in MORE_MEMORY:
        better = space.solver.best(Limits(int(budget * factor), space.limits.stock_bytes), split)
        if better is not None and better.cost < 0.98 * chosen.cost:
            return WhatIf(extra_bytes=better.needed_bytes - budget, settings=_plain(better.settings), speedup=chosen.cost / better.cost)
    return None


def _warnings(traces: Traces, model: CostModel, space: Space, chosen: Candidate, predicted: Estimate) -> list[str]:
    found = []
    if int(chosen.settings["batch_split"]) > 1:
        found.append(f"the batch runs in {chosen.settings['batch_split']} calls: use plan.run(pipe, …), not pipe(…)")
    if predicted.basis != "measured":
        here = "run: planner calibrate" if model.device.free_bytes is not None else "on that machine run: planner calibrate"
        found.append(f"times rest on {predicted.basis} coefficients, not on measurements of this device; {here}")
    if chosen.settings["dtype"] != space.baseline["dtype"] and chosen.settings["dtype"] == "fp16":
        found.append("fp16 can overflow to black pictures in models that were not trained for it; autoplan checks the output")
    fallbacks = model.trace_for(space.recipe(_plain(chosen.settings))).fallbacks
    if fallbacks:
        found.append(f"{len(fallbacks)} operations could not be traced exactly: {', '.join(fallbacks[:3])}")
    return found


def _alternative(model: CostModel, space: Space, item: Candidate) -> Alternative:
    return Alternative(settings=_plain(item.settings), predicted=_estimate(model, space, item, detailed=False))


def _estimate(model: CostModel, space: Space, item: Candidate, *, detailed: bool) -> Estimate:
    estimate = estimate_of(model, space.recipe(_plain(item.settings)), detailed=detailed)
    return estimate if detailed else estimate.model_copy(update={"terms": ()})


def _plain(settings: Mapping[str, Any]) -> dict[str, KnobValue]:
    return {name: value for name, value in settings.items() if isinstance(value, bool | int | str)}


def _text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
