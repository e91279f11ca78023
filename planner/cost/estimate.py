"""From the cost of one recipe to the estimate that users see: every counter, its interval, its terms."""

from __future__ import annotations

from planner.cost.coefficients import Coefficients
from planner.cost.model import Cost, CostModel, PhaseCost
from planner.cost.reserved import lodged_bytes, replayed, reserved_bytes
from planner.dryrun.trace import Kind
from planner.recipe import Recipe
from planner.types import Basis, Bound, Device, Estimate, Phase, Term

EXACT_MEMORY_ERROR = 0.015
"""Half width of the interval around weights: rounding of parameters, buffers and small tables."""
RESERVED_SPREAD = (0.87, 1.12)
"""Interval of reserved bytes, upwards from a replay with the largest workspaces known: which kernel a convolution gets depends on
card and release. Nine in ten measured values of all sources, each source weighted by the root of its rows: calibration/README.md."""
DEVICE_SPREAD = (0.86, 1.14)
"""Interval of the device's own counter: contexts and libraries differ by driver and release. Fitted as the one above."""


def estimate_of(model: CostModel, recipe: Recipe, cost: Cost | None = None, *, detailed: bool = True) -> Estimate:
    """The estimate for one recipe. ``detailed`` replays the caching allocator; otherwise reserved bytes scale allocated ones."""
    cost = cost or model.cost(recipe)
    coefficients = model.coefficients
    peak = cost.peak_bytes
    reserved, most_reserved = _reserved(model, recipe, cost, detailed)
    used = reserved + coefficients.context_bytes
    low, high = _memory_interval(cost, coefficients)
    spread = coefficients.latency_error if not _measured(cost) else min(coefficients.latency_error, 0.15)
    latency, step, setup = cost.seconds, step_seconds(model, cost), cost.setup_seconds
    budget = model.device.budget_bytes
    return Estimate(
        fits=budget is None or cost.needed_bytes <= budget,
        peak_allocated_bytes=peak, peak_allocated_bytes_low=low, peak_allocated_bytes_high=high,
        peak_reserved_bytes=reserved, peak_reserved_bytes_low=max(low, round(reserved * RESERVED_SPREAD[0])),
        peak_reserved_bytes_high=max(high, most_reserved),
        device_used_bytes=used, device_used_bytes_low=round(used * DEVICE_SPREAD[0]), device_used_bytes_high=round(used * DEVICE_SPREAD[1]),
        host_bytes=cost.host_bytes, host_bytes_low=round(cost.host_bytes * 0.95), host_bytes_high=round(cost.host_bytes * 1.1),
        latency_seconds=latency, latency_seconds_low=latency / (1 + spread), latency_seconds_high=latency * (1 + spread),
        step_seconds=step, step_seconds_low=None if step is None else step / (1 + spread),
        step_seconds_high=None if step is None else step * (1 + spread),
        setup_seconds=setup, setup_seconds_low=setup / 2, setup_seconds_high=setup * 2,
        phases=tuple(_phase(cost, phase) for phase in cost.phases), terms=_terms(model, cost), basis=_basis(model, cost))  # fmt: skip


def step_seconds(model: CostModel, cost: Cost) -> float | None:
    """One denoising iteration: the time of everything in the loop over the iterations the pipeline counted."""
    steps = cost.trace.steps
    repeated = [phase for phase in cost.phases if steps and phase.count >= steps]
    loop = [phase for phase in repeated if model.role(cost.trace.calls[phase.call].component) != "vae"]
    if not steps or not loop:
        return None
    glue = cost.glue_seconds / steps if steps > 1 else 0.0
    return sum(phase.seconds for phase in loop) / steps + glue


def _reserved(model: CostModel, recipe: Recipe, cost: Cost, detailed: bool) -> tuple[int, int]:
    """Peak reserved bytes, and the upper end of their interval."""
    if detailed:
        replays = (reserved_bytes(model, recipe, cost), replayed(model, recipe, cost, most=True).peak_bytes)
        likely, most = (max(size, cost.peak_bytes) for size in replays)
        most += lodged_bytes(model, recipe, cost)
    else:
        likely = most = round(cost.peak_bytes * 1.05)
    upper = max(likely, most) * RESERVED_SPREAD[1]
    held = [_held_back(round(size), model.device, model.coefficients) for size in (likely, upper)]
    return max(held[0], cost.needed_bytes), max(held[1], cost.needed_bytes)


def _held_back(reserved: int, device: Device, coefficients: Coefficients) -> int:
    """The allocator gives cached blocks back before it runs out (c10 CUDACachingAllocator), so it never reserves more than there is."""
    return min(reserved, device.total_bytes - coefficients.context_bytes) if device.kind == "cuda" else reserved


def _memory_interval(cost: Cost, coefficients: Coefficients) -> tuple[int, int]:
    """Weights are known but for rounding; activations and workspace carry the model's error."""
    peak = cost.peak_bytes
    top = max(cost.phases, key=lambda phase: phase.peak_bytes, default=None)
    moving = top.cost.activations_bytes + top.cost.workspace_bytes if top is not None else 0
    width = moving * coefficients.memory_error + peak * EXACT_MEMORY_ERROR
    return round(max(peak - width, 0)), round(peak + width)


def _phase(cost: Cost, phase: PhaseCost) -> Phase:
    trace = cost.trace.calls[phase.call]
    bound: Bound = "transfer" if phase.transfer_seconds > phase.compute_seconds else phase.cost.time.bound
    return Phase(
        name=trace.name, component=trace.component, calls=phase.count * cost.calls, seconds=phase.seconds * cost.calls,
        weights_bytes=phase.resident_bytes + phase.cost.window_bytes, activations_bytes=phase.held_bytes + phase.cost.activations_bytes,
        workspace_bytes=phase.cost.workspace_bytes, peak_allocated_bytes=phase.peak_bytes, bound=bound)  # fmt: skip


def _measured(cost: Cost) -> bool:
    total = sum(phase.compute_seconds for phase in cost.phases)
    known = sum(phase.compute_seconds * phase.cost.time.measured_share for phase in cost.phases)
    return bool(total) and known > 0.8 * total


def _basis(model: CostModel, cost: Cost) -> Basis:
    if _measured(cost):
        return "measured"
    order: tuple[Basis, ...] = ("assumed", "published", "datasheet", "measured")
    return min(model.coefficients.basis, model.device.basis, key=order.index)


def _terms(model: CostModel, cost: Cost) -> tuple[Term, ...]:
    """Every line of the two sums, for ``explain -v``."""
    coefficients = model.coefficients
    top = max(cost.phases, key=lambda phase: phase.peak_bytes, default=None)
    terms: list[Term] = []
    if top is not None:
        name = cost.trace.calls[top.call].name
        terms += [
            Term(name=f"weights resident during {name}", bytes=top.resident_bytes, basis="datasheet",
                 source="the model's configuration; offload simulated over the calls made"),
            Term(name="weights moving through", bytes=top.cost.window_bytes, basis="datasheet",
                 source="largest unit that offload keeps on the device"),
            Term(name="held by the pipeline", bytes=top.held_bytes, basis="datasheet", source="lifetimes in the dry run"),
            Term(name=f"activations of {name}", bytes=top.cost.activations_bytes, basis="datasheet", source="lifetimes in the dry run"),
            Term(name=f"operator workspace of {name}", bytes=top.cost.workspace_bytes, basis="published",
                 source="layout copies and attention buffers, planner.cost.workspace"),
        ]  # fmt: skip
    resting = cost.residency.rest_bytes + cost.blas_bytes
    terms.append(Term(name="allocated between calls", bytes=resting, basis="datasheet", source="weights that stay, cuBLAS workspace"))
    if cost.blas_bytes:
        source = coefficients.source("blas_workspace_bytes")
        terms.append(Term(name="cuBLAS workspace", bytes=cost.blas_bytes, basis="datasheet", source=source))
    if cost.graph_pool_bytes:
        source = "activations of the captured call stay in its pool"
        terms.append(Term(name="CUDA graph pool", bytes=cost.graph_pool_bytes, basis="assumed", source=source))
    filed = sum(cost.residency.disk_bytes.values())
    if filed:
        source = "group offload writes a safetensors file per group (diffusers ModuleGroup)"
        terms.append(Term(name="weights in files on disk", bytes=filed, basis="datasheet", source=source))
    if coefficients.context_bytes:
        name, source = "context and libraries (not torch's)", coefficients.source("context_bytes")
        terms.append(Term(name=name, bytes=coefficients.context_bytes, basis=coefficients.basis, source=source))
    for phase in cost.phases:
        trace = cost.trace.calls[phase.call]
        flops = sum(float(trace.flops[trace.kind == kind].sum()) for kind in (Kind.MATMUL, Kind.CONVOLUTION, Kind.ATTENTION))
        how = f"{phase.count} x {flops / 1e12:.3g} TFLOP, {phase.cost.time.kernels} kernels"
        terms.append(Term(name=f"{trace.name}", seconds=phase.compute_seconds * cost.calls, basis=coefficients.basis, source=how))
        if phase.transfer_seconds:
            source = coefficients.source("link_share")
            copies = phase.transfer_seconds * cost.calls
            terms.append(Term(name=f"{trace.name}: copies", seconds=copies, basis=coefficients.basis, source=source))
    for name, seconds, field in (
        ("the pipeline's own code", cost.glue_seconds, "launch_seconds"),
        ("pictures on the host", cost.host_seconds, "picture_bytes_per_second"),
    ):
        source = coefficients.source(field)
        terms.append(Term(name=name, seconds=seconds * cost.calls, basis=coefficients.basis, source=source))
    return tuple(terms)


__all__ = ["estimate_of", "reserved_bytes", "step_seconds"]
