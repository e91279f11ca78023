"""The story: detect -> dry run -> probe -> search -> apply -> check -> correct or roll back -> learn."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.calibrate import Calibration, calibration_for
from planner.cost.model import CostModel
from planner.decide import decide, settings_estimate
from planner.dryrun.provider import Traces
from planner.errors import NoFeasiblePlan, PlannerError, UnsupportedPipeline, UsageError, VerificationError
from planner.models import ModelSource, resolve
from planner.plan import Plan
from planner.progress import Progress, silent
from planner.targets import live_target, target_for
from planner.types import Device, Estimate, KnobValue, Objective, Quality, Workload

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 4
"""Plans that are tried on the live pipeline before giving up, the first one included."""
PROBE_SECONDS = {"auto": 20.0, "full": 60.0}
_WORKLOAD_NAMES = {"frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user wants, besides the model and the workload."""

    quality: Quality = "lossless"
    objective: Objective = "latency"
    calls: int | None = None
    fix: Mapping[str, KnobValue] | None = None
    host_budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.quality not in ("exact", "lossless", "lossy"):
            raise UsageError(f"quality {self.quality!r}: choose exact, lossless or lossy.")
        if self.objective not in ("latency", "throughput", "memory"):
            raise UsageError(f"objective {self.objective!r}: choose latency, throughput or memory.")
        if self.calls is not None and self.calls < 1:
            raise UsageError(f"calls {self.calls!r}: give how many calls you will make, at least 1.")


def autoplan(
    pipe: Any,
    *,
    batch_size: int = 1,
    inputs: Mapping[str, Any] | None = None,
    device: Any = None,
    memory_budget: int | str | None = None,
    host_memory_budget: int | str | None = None,
    quality: Quality = "lossless",
    objective: Objective = "latency",
    calls: int | None = None,
    fix: Mapping[str, KnobValue] | None = None,
    calibrate: str = "auto",
    apply: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Decide how to run ``pipe`` fastest within its device's memory, put it in force and check it.

    ``inputs`` are keyword arguments of your own call; ``memory_budget`` is bytes or a text such as ``"8GiB"``, by default
    what is free now less a headroom. With ``apply=False`` nothing is touched. ``progress`` gets one line per stage.

    Raises:
        NoFeasiblePlan: nothing fits; carries the leanest candidate and what is missing.
        UnsupportedPipeline: not a pipeline, or its code does not get through the dry run.
        UsageError: a size, budget, knob or word that cannot be meant.
        ApplyError, VerificationError: the plan did not take or did not hold; the pipeline is as it was.
    """
    say = progress or silent
    request = _request(quality, objective, calls, fix, host_memory_budget)
    source = _live(pipe)
    target = live_target(pipe, device, memory_budget, calibrate, say)
    say("tracing the pipeline on meta")
    traces = Traces.of(source, _workload(batch_size=batch_size), inputs)
    calibration = calibration_for(target, mode=_mode(calibrate))
    probes = _probe(traces, target, calibration, calibrate, say)
    model = CostModel(traces, target, calibration.coefficients, traces.workload.batch_size, probes)
    model.memory_scale, model.time_scale = calibration.corrections(source.digest)
    say("searching")
    plan = decide(source, traces, model, request)
    if not apply:
        return plan
    return _apply_and_check(plan, pipe, dict(inputs or {}), request, source, traces, model, calibration, verify, say)


def explain(model: Any, gpu: str | None = None, *, memory: int | str | None = None, host_memory: int | str | None = None,
            quality: Quality = "lossless", objective: Objective = "latency", calls: int | None = None,
            fix: Mapping[str, KnobValue] | None = None, calibrate: str = "auto", inputs: Mapping[str, Any] | None = None,
            **workload: Any) -> Plan:  # fmt: skip
    """The plan for ``model`` on ``gpu`` (default: what is detected), without weights and without touching anything.

    ``model``: live pipeline, folder, hub id or bundled name. ``workload``: ``batch_size height width num_frames
    num_inference_steps guidance_scale`` (or ``frames steps guidance``).

    Raises: as :func:`autoplan`, and HardwareError for an unknown GPU, ProfileError for an unknown model.
    """
    request = _request(quality, objective, calls, fix, host_memory)
    source = resolve(model)
    target = target_for(gpu, memory, request.host_budget_bytes)
    cost_model, traces = _model(source, target, calibrate, inputs, workload)
    return decide(source, traces, cost_model, request)


def estimate(model: Any, gpu: str | None = None, settings: Mapping[str, KnobValue] | None = None, *, memory: int | str | None = None,
             calibrate: str = "auto", inputs: Mapping[str, Any] | None = None, **workload: Any) -> Estimate:  # fmt: skip
    """The estimate of one given combination; knobs that ``settings`` does not name leave the pipeline as it is.

    Raises:
        UsageError: an unknown knob, or a combination that a rule forbids; the message gives the rule.
    """
    source = resolve(model)
    target = target_for(gpu, memory, None)
    cost_model, traces = _model(source, target, calibrate, inputs, workload)
    return settings_estimate(traces, cost_model, settings or {})


def max_batch_size(model: Any, gpu: str | None = None, *, limit: int = 256, **options: Any) -> int:
    """The largest batch up to ``limit`` that some plan fits without splitting it. 0 when not even one image fits.

    ``options``: as :func:`explain`. The need grows with the batch, so the answer is found by bisection.
    """
    fix = dict(options.pop("fix", None) or {}) | {"batch_split": 1}

    def fits(batch: int) -> bool:
        try:
            return explain(model, gpu, fix=fix, batch_size=batch, **options).predicted.fits
        except NoFeasiblePlan:
            return False

    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- steps ------------------------------------------------------------------------------------------------------------


def _request(quality: Quality, objective: Objective, calls: int | None, fix: Mapping[str, KnobValue] | None,
             host_memory: int | str | None) -> Request:  # fmt: skip
    from planner.units import parse_bytes

    host = parse_bytes(host_memory, "host memory") if host_memory is not None else None
    return Request(quality=quality, objective=objective, calls=calls, fix=fix, host_budget_bytes=host)


def _workload(**sizes: Any) -> Workload:
    from pydantic import ValidationError

    named = {_WORKLOAD_NAMES.get(name, name): value for name, value in sizes.items() if value is not None}
    try:
        return Workload.model_validate(named)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UsageError(f"{name} {first.get('input')!r}: {first['msg']}.") from error


def _mode(calibrate: str) -> Any:
    if calibrate not in ("auto", "never", "full"):
        raise UsageError(f"calibrate {calibrate!r}: choose auto, never or full.")
    return calibrate


def _live(pipe: Any) -> ModelSource:
    if isinstance(pipe, str | bytes):
        raise UnsupportedPipeline(f"autoplan needs a loaded pipeline, not {pipe!r}; for a name or folder use planner.explain({pipe!r}).")
    source = resolve(pipe)
    if source.kind != "live":
        raise UnsupportedPipeline(f"autoplan needs a loaded pipeline, this is {source.kind} {source.name}; use planner.explain for it.")
    return source


def _model(source: ModelSource, target: Device, calibrate: str, inputs: Mapping[str, Any] | None,
           workload: Mapping[str, Any]) -> tuple[CostModel, Traces]:  # fmt: skip
    traces = Traces.of(source, _workload(**workload), inputs)
    calibration = calibration_for(target, mode="never" if _mode(calibrate) == "never" else "auto")
    return CostModel(traces, target, calibration.coefficients, traces.workload.batch_size), traces


def _probe(traces: Traces, target: Device, calibration: Calibration, calibrate: str, say: Progress) -> Mapping[str, float] | None:
    """Time the operations that this pipeline would run as it is, where the device is here to be probed."""
    if calibrate == "never" or target.kind not in ("cpu", "cuda"):
        return None
    from planner.calibrate import probe_missing

    say("probing the operations of this pipeline")
    calls = [(call, trace.count(index)) for trace in (traces.trace(None, None),) for index, call in enumerate(trace.calls)]
    return probe_missing(calls, target, calibration, PROBE_SECONDS[calibrate], say)


def _apply_and_check(plan: Plan, pipe: Any, inputs: dict[str, Any], request: Request, source: ModelSource, traces: Traces,
                     model: CostModel, calibration: Calibration, verify: bool, say: Progress) -> Plan:  # fmt: skip
    """Apply; where reality disagrees, correct the model and take the next best plan, a bounded number of times."""
    from planner import verify as checking
    from planner.force import give_back_memory, is_out_of_memory, take_back

    warnings: list[str] = []
    refused: dict[str, set[KnobValue]] = {}
    for attempt in range(MAX_ATTEMPTS):
        reference = checking.reference_output(plan, pipe, inputs) if verify else None
        say("applying " + (", ".join(f"{name}={value}" for name, value in plan.changes.items()) or "nothing: the pipeline stays as it is"))
        started = time.perf_counter()
        plan.apply(pipe)
        if not verify:
            return plan
        try:
            say("checking with one run")
            seen = checking.check(plan, pipe, inputs, reference)
            failures, measured = seen.failures, seen.measurement
        except BaseException as error:
            take_back(pipe)
            if not is_out_of_memory(error):
                raise
            give_back_memory(pipe)
            failures, measured = (f"out of memory after {time.perf_counter() - started:.0f} s",), None
        if measured is not None:
            calibration.observe(source.digest, plan, measured)
        if not failures:
            return _checked(plan, measured, warnings)
        if measured is not None:
            take_back(pipe)
        warnings.append(f"attempt {attempt + 1} was taken back: {'; '.join(failures)}")
        logger.warning("%s", warnings[-1])
        plan = _replanned(plan, measured, refused, request, source, traces, model)
    raise VerificationError(f"{MAX_ATTEMPTS} plans were tried and none held; the pipeline is as it was. {'; '.join(warnings)}")


def _checked(plan: Plan, measured: Any, warnings: list[str]) -> Plan:
    checked = plan.model_copy(update={"measured": measured, "warnings": (*plan.warnings, *warnings)})
    checked._bound = plan._bound
    return checked


def _replanned(plan: Plan, measured: Any, refused: dict[str, set[KnobValue]], request: Request, source: ModelSource, traces: Traces,
               model: CostModel) -> Plan:  # fmt: skip
    """Correct the cost model by what was seen (memory), or rule out what spoiled the output, and decide again."""
    peak = measured.peak_allocated_bytes if measured is not None else None
    budget = model.device.budget_bytes
    if measured is None or (budget is not None and peak is not None and peak > budget):
        predicted = plan.predicted.peak_allocated_bytes
        factor = peak / predicted if peak else (budget or predicted) * 1.05 / predicted
        model.memory_scale *= max(factor, 1.02)
        model.forget()
    else:
        from planner.verify import NUMERIC_KNOBS

        for name, value in plan.changes.items():
            if name in NUMERIC_KNOBS:
                refused.setdefault(name, set()).add(value)
    excluded = {name: frozenset(values) for name, values in refused.items()}
    try:
        return decide(source, traces, model, request, excluded=excluded)
    except PlannerError as error:
        raise NoFeasiblePlan(f"after a plan that did not hold, nothing else fits: {error}") from error


__all__ = ["Request", "autoplan", "estimate", "explain", "max_batch_size"]
