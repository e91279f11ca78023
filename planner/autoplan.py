"""The story: detect -> dry run -> probe -> search -> apply -> check -> correct or roll back -> learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.calibrate import Calibration, calibration_for
from planner.cost.model import CostModel
from planner.cost.residency import Known
from planner.decide import decide, glance, settings_estimate
from planner.dryrun.provider import Traces
from planner.errors import NoFeasiblePlan, UnsupportedPipeline, UsageError
from planner.growth import grow, grown
from planner.models import ModelSource, resolve
from planner.plan import Plan
from planner.probing import Prober
from planner.progress import Progress, to_stderr
from planner.session import Session
from planner.targets import live_target, target_for
from planner.types import Device, Estimate, KnobValue, Objective, Quality, Workload

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
    what is free now less a headroom. ``objective="throughput"`` may take a larger batch than ``batch_size``; the plan's
    workload says which. ``fix`` takes ``vae.dtype`` and the like for one component. With ``apply=False`` nothing is touched.
    ``progress`` gets one line per stage; by default they go to stderr when that is a terminal.

    Raises:
        NoFeasiblePlan: nothing fits; carries the leanest candidate and what is missing.
        UnsupportedPipeline: not a pipeline, or its code does not get through the dry run.
        UsageError: a size, budget, knob or word that cannot be meant.
        ApplyError, VerificationError: the plan did not take or did not hold; the pipeline is as it was.
    """
    say = progress or to_stderr
    request = _request(quality, objective, calls, fix, host_memory_budget)
    source = _live(pipe)
    target = live_target(pipe, device, memory_budget, calibrate, say)
    say("tracing the pipeline on meta (some seconds)")
    calibration = calibration_for(target, mode=_mode(calibrate))
    if objective == "throughput":
        batch_size = _best_batch(source, target, request, calibration, inputs, batch_size)
    traces = Traces.of(source, _workload(batch_size=batch_size), inputs)
    model = CostModel(traces, target, calibration.coefficients, traces.workload.batch_size)
    model.memory_scale, model.time_scale = calibration.corrections(source.digest)
    session = Session(source, traces, model, request, calibration, dict(inputs or {}))
    session.asked = {"device": device, "memory_budget": memory_budget, "host_memory_budget": host_memory_budget}
    prober = _probe(traces, model, calibration, calibrate, quality, say)
    if prober is not None:
        session.refine = lambda decided: prober.refine(traces, decided)
    say("searching (some seconds)")
    plan = session.decide()
    if apply:
        return session.settle(plan, pipe, say, verify)
    plan._remember(pipe)
    return plan


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

    def planned(**sizes: Any) -> Plan:
        cost_model, traces = _model(source, target, calibrate, inputs, {**workload, **sizes})
        return decide(source, traces, cost_model, request)

    return planned() if objective != "throughput" else grown(lambda batch: planned(batch_size=batch), workload.get("batch_size") or 1)


@dataclass(frozen=True, slots=True)
class Glance:
    """What a plan changes and what it is predicted to need, without reasons and alternatives."""

    device: Device
    batch_size: int
    changes: dict[str, KnobValue]
    predicted: Estimate


class Glances:
    """Plans of one model and workload on many devices: the traces, and what follows from them alone, are shared.

    Takes the options of :func:`explain`; ``on`` raises as it does.
    """

    def __init__(self, model: Any, *, memory: int | str | None = None, host_memory: int | str | None = None, quality: Quality = "lossless",
                 objective: Objective = "latency", calls: int | None = None, fix: Mapping[str, KnobValue] | None = None,
                 calibrate: str = "auto", inputs: Mapping[str, Any] | None = None, **workload: Any) -> None:  # fmt: skip
        self._request = _request(quality, objective, calls, fix, host_memory)
        self._source, self._memory, self._calibrate, self._workload = resolve(model), memory, calibrate, workload
        self._inputs = inputs
        self._traces: dict[int, tuple[Traces, Known]] = {}
        self.model = self._source.name

    def on(self, gpu: str | None) -> Glance:
        """The plan on one device."""
        target = self._target(gpu)
        asked = self._workload.get("batch_size") or 1
        if self._request.objective != "throughput":
            return self._at(target, asked)
        return grow(lambda batch: self._at(target, batch), asked)[1]

    def fits(self, gpu: str | None, batch: int) -> bool:
        """Whether some plan of that batch fits the device."""
        try:
            return self._at(self._target(gpu), batch).predicted.fits
        except NoFeasiblePlan:
            return False

    def _target(self, gpu: str | None) -> Device:
        return target_for(gpu, self._memory, self._request.host_budget_bytes)

    def _at(self, target: Device, batch: int) -> Glance:
        if batch not in self._traces:
            workload = _workload(**{**self._workload, "batch_size": batch})
            self._traces[batch] = Traces.of(self._source, workload, self._inputs), Known()
        traces, known = self._traces[batch]
        model = _cost_model(traces, target, self._calibrate, known)
        return Glance(target, traces.workload.batch_size, *glance(traces, model, self._request))


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
    glances = Glances(model, fix=dict(options.pop("fix", None) or {}) | {"batch_split": 1}, **options)

    low, high = 0, 1
    while high <= limit and glances.fits(gpu, high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if glances.fits(gpu, middle) else (low, middle)
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
    return _cost_model(traces, target, calibrate), traces


def _cost_model(traces: Traces, target: Device, calibrate: str, known: Known | None = None) -> CostModel:
    calibration = calibration_for(target, mode="never" if _mode(calibrate) == "never" else "auto")
    return CostModel(traces, target, calibration.coefficients, traces.workload.batch_size, known=known or Known())


def _best_batch(source: ModelSource, target: Device, request: Request, calibration: Calibration, inputs: Mapping[str, Any] | None,
           batch_size: int) -> int:  # fmt: skip
    """The batch that makes most samples a second, from ``batch_size`` on."""

    def seen(batch: int) -> Glance:
        traces = Traces.of(source, _workload(batch_size=batch), inputs)
        model = CostModel(traces, target, calibration.coefficients, traces.workload.batch_size)
        return Glance(target, batch, *glance(traces, model, request))

    return grow(seen, batch_size)[0]


def _probe(traces: Traces, model: CostModel, calibration: Calibration, calibrate: str, quality: Quality, say: Progress) -> Prober | None:
    """Time the operations that this pipeline would run as it is, where the device is here to be probed."""
    if calibrate == "never" or model.device.kind not in ("cpu", "cuda"):
        return None
    prober = Prober(model, calibration, PROBE_SECONDS[calibrate], quality, say)
    prober.baseline(traces)
    return prober


__all__ = ["Request", "autoplan", "estimate", "explain", "max_batch_size"]
