"""From a plan to a plan that holds: apply, check, and where reality disagrees correct the model and take the next best."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from planner.cost.model import CostModel
from planner.decide import decide, settings_estimate
from planner.errors import NoFeasiblePlan, PlannerError, UnsupportedPipeline, UsageError, VerificationError
from planner.force import Evidence, evidence_after, in_force, is_out_of_memory, peak_of, put_in_force, release, take_back
from planner.knobs.compile import COMPILES
from planner.progress import Progress, silent
from planner.reference import Reference, kind, reference
from planner.types import KnobValue, Measurement
from planner.units import format_seconds
from planner.verify import NUMERIC_KNOBS, OVERFLOWING, Check, check, check_seconds, compiles

if TYPE_CHECKING:
    from planner.autoplan import Request
    from planner.calibrate import Calibration
    from planner.dryrun.provider import Traces
    from planner.models import ModelSource
    from planner.plan import Plan

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 4
"""Plans that are tried on the live pipeline before giving up, the first one included."""
SUSPECTS = ("compile", "quantization", "cache", "attention", "dtype")
"""Knobs whose settings make a pipeline raise most easily, in the order in which they are given up."""
Tried = Check | Evidence | PlannerError | None
"""How an attempt ended: checked, out of memory, raised, or not asked to be checked."""

NOTE_LENGTH = 4000
"""Characters of a failed call's traceback that its error carries as a note; the frames themselves would hold on to tensors."""


@dataclass(slots=True)
class Session:
    """What it takes to plan again for one pipeline and workload. The cost model in it learns as plans fail."""

    source: ModelSource
    traces: Traces
    model: CostModel
    request: Request
    calibration: Calibration
    inputs: dict[str, Any]
    refine: Callable[[Callable[[], Plan]], Plan] = lambda decided: decided()
    """Measures what the chosen plan rests on, and decides again; see :mod:`planner.probing`."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Device and budgets as the user gave them, to plan again with."""
    refused: dict[str, set[KnobValue]] = field(default_factory=dict)

    @classmethod
    def for_plan(cls, plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Session:
        """A session for a plan that came from a file: what it says of workload, device and wishes, on this pipeline untouched.

        Fixed knobs are not in plan files and are free here.
        """
        from planner.autoplan import Request
        from planner.calibrate import calibration_for
        from planner.dryrun.provider import Traces
        from planner.models import resolve

        source = resolve(pipe)
        traces = Traces.of(source, plan.workload, inputs)
        calibration = calibration_for(plan.device)
        model = CostModel(traces, plan.device, calibration.coefficients, traces.workload.batch_size)
        model.memory_scale, model.time_scale = calibration.corrections(source.digest)
        request = Request(quality=plan.quality, objective=plan.objective, calls=plan.calls)
        return cls(source, traces, model, request, calibration, dict(inputs))

    def decide(self) -> Plan:
        """The best plan by the model as it is now. Raises NoFeasiblePlan, UsageError."""
        barred = {name: frozenset(values) for name, values in self.refused.items()}
        try:
            return self.refine(lambda: decide(self.source, self.traces, self.model, self.request, excluded=barred))
        except RuntimeError as error:  # torch's own: the dry run copies what is not weights
            if is_out_of_memory(error):
                raise NoFeasiblePlan("out of memory while planning; the pipeline was not touched. Free memory and plan again.") from error
            raise UnsupportedPipeline(f"the dry run failed ({type(error).__name__}: {str(error)[:200]}); nothing was touched.") from error

    # -- applying and checking --------------------------------------------------------------------------------------

    def settle(self, plan: Plan, pipe: Any, say: Progress = silent, verify: bool = True) -> Plan:
        """Put the plan, or what must replace it, in force, and check it with real calls. Any failure: the pipeline is as it was.

        Raises:
            NoFeasiblePlan: what was tried did not hold, and nothing else fits.
            ApplyError, VerificationError: a plan did not take, or none held.
        """
        try:
            return self._settle(plan, pipe, say, verify)
        except BaseException as error:
            if in_force(pipe) is not None:
                release(error)
                take_back(pipe)
            raise

    def _settle(self, plan: Plan, pipe: Any, say: Progress, verify: bool) -> Plan:
        warnings: list[str] = []
        known: dict[tuple[bool, ...], Reference | None] = {}
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if verify and kind(plan) not in known:
                known[kind(plan)] = self._reference(plan, pipe, say)
            tried = self._try(plan, pipe, known.get(kind(plan)), say, verify)
            if isinstance(tried, Evidence):
                failures: tuple[str, ...] = (f"out of memory ({tried.text(plan)})",)
            elif isinstance(tried, PlannerError):
                failures = (str(tried),)
            elif tried is None or not tried.failures or (tried.slower and self._all_fixed(plan)):
                return _finished(plan, pipe, self, tried.measurement if tried else None, warnings)
            else:
                take_back(pipe)
                failures = tried.failures
            warnings.append(f"attempt {attempt} was taken back: {'; '.join(failures)}")
            logger.warning("%s", warnings[-1])
            plan = self._next(plan, tried, warnings)
        raise VerificationError(f"{MAX_ATTEMPTS} plans were tried and none held; the pipeline is as it was. {'; '.join(warnings)}")

    def _reference(self, plan: Plan, pipe: Any, say: Progress) -> Reference | None:
        """The untouched pipeline's run; None where there is none."""
        if not plan.changes:
            return None
        before = plan.baseline_predicted
        about = f" (a call takes about {format_seconds(before.latency_seconds)})" if before else ""
        say("running the pipeline as it is, for comparison, or a smaller call where that does not fit" + about)
        try:
            found = reference(plan, pipe, self.inputs)
        except Exception as error:
            raise _failed("the pipeline as it is", error) from error
        # What the user fixed cannot be rolled back, so its time is nobody's business here.
        return found if found is None or self._may_be_untouched(plan) else replace(found, seconds=None)

    def _try(self, plan: Plan, pipe: Any, compared: Reference | None, say: Progress, verify: bool) -> Tried:
        """One attempt: the plan is in force and this is its check (None: not asked for), or it did not get through and is not."""
        changes = ", ".join(f"{name}={value}" for name, value in plan.changes.items()) or "nothing: the pipeline stays as it is"
        first = "before it compiles, some seconds" if compiles(plan) else f"about {format_seconds(plan.predicted.setup_seconds)}"
        say(f"applying {changes} ({first})")
        try:
            put_in_force(plan, pipe, session=self)
            if not verify:
                return None
            what = "compiling, then checking with real calls" if compiles(plan) else "checking with real calls"
            say(f"{what} and what it takes to measure it (about {format_seconds(check_seconds(plan, pipe, self.inputs))})")
            seen = check(plan, pipe, self.inputs, compared)
        except Exception as error:
            if not is_out_of_memory(error):
                return self._raised(plan, pipe, error)
            release(error)
        else:
            self.observe(plan, seen.measurement)
            return seen
        peak = peak_of(plan)
        if in_force(pipe) is not None:
            take_back(pipe)
        return evidence_after(pipe, plan, peak)

    def _raised(self, plan: Plan, pipe: Any, error: Exception) -> PlannerError:
        """What the plan made the pipeline raise, the plan taken back; raised where the user's own choices leave no other plan."""
        failed = _failed("the plan", error)
        failed.add_note("".join(traceback.format_exception(error))[-NOTE_LENGTH:])
        release(error)
        if in_force(pipe) is not None:
            take_back(pipe)
        if self._all_fixed(plan):
            raise failed from error
        return failed

    def _all_fixed(self, plan: Plan) -> bool:
        """Everything that the plan changes is the user's own decision."""
        return set(plan.changes) <= set(self.request.fix or {})

    def observe(self, plan: Plan, measured: Measurement) -> None:
        """Teach the store; the corrections that the prediction contains are taken out of what it learns."""
        self.calibration.observe(self.source.digest, plan, measured, applied=(self.model.memory_scale, self.model.time_scale))

    # -- planning again ---------------------------------------------------------------------------------------------

    def _next(self, plan: Plan, tried: Tried, warnings: list[str]) -> Plan:
        if isinstance(tried, Evidence):
            return self.after_out_of_memory(plan, tried)
        if isinstance(tried, PlannerError):
            self._give_up(plan, last=len(warnings) >= MAX_ATTEMPTS - 1)
            return self._again("; ".join(warnings))
        assert tried is not None
        if tried.slower:
            return self._untouched(plan)
        peak, budget = tried.measurement.peak_allocated_bytes, self.model.device.budget_bytes
        if budget is not None and peak is not None and peak > budget:
            self._raise_memory(plan, peak)
            return self._smaller(plan, budget, "; ".join(warnings))
        self._refuse(plan, tried)
        return self._again("; ".join(warnings))

    def after_out_of_memory(self, plan: Plan, evidence: Evidence) -> Plan:
        """The next best plan. What was allocated beyond the prediction corrects the model; memory that is gone lowers the budget.

        Raises:
            NoFeasiblePlan: nothing that needs less than the failed plan is left.
        """
        if evidence.peak_bytes is not None and evidence.peak_bytes > plan.predicted.peak_allocated_bytes:
            # The run ended early: this is the least it needs, and all that is known for certain.
            self.observe(plan, Measurement(latency_seconds=math.nan, peak_allocated_bytes=evidence.peak_bytes))
            self._raise_memory(plan, evidence.peak_bytes)
        budget = self.model.device.budget_bytes
        limits = [limit for limit in (budget, evidence.available_bytes) if limit is not None]
        return self._smaller(plan, min(limits) if limits else plan.predicted.peak_allocated_bytes, f"out of memory ({evidence.text(plan)})")

    def _raise_memory(self, plan: Plan, peak_bytes: int) -> None:
        """Scale activations and workspace so that the plan is predicted to need what it was seen to need."""
        phase = max(plan.predicted.phases, key=lambda one: one.peak_allocated_bytes, default=None)
        weights = phase.weights_bytes if phase is not None else 0
        moving = max(plan.predicted.peak_allocated_bytes - weights, 1)
        self.model.memory_scale *= min(max((peak_bytes - weights) / moving, 1.0), 4.0)
        self.model.forget()

    def _smaller(self, plan: Plan, budget_bytes: int, reason: str) -> Plan:
        """The best plan within the budget that is predicted to need less than this one does: each attempt needs less."""
        needs = settings_estimate(self.traces, self.model, plan.settings).peak_allocated_bytes
        device = self.model.device
        self.model.device = device.model_copy(update={"budget_bytes": max(min(budget_bytes, needs - 1), 1)})
        try:
            found = self._again(reason)
        finally:
            self.model.device = device.model_copy(update={"budget_bytes": max(budget_bytes, 1)})
        return found.model_copy(update={"device": self.model.device})

    def _again(self, reason: str) -> Plan:
        try:
            return self.decide()
        except NoFeasiblePlan as error:
            message = f"{reason}. The pipeline is as it was: after that, {error}"
            raise NoFeasiblePlan(message, leanest=error.leanest, shortfall_bytes=error.shortfall_bytes) from error
        except UsageError as error:
            raise VerificationError(f"{reason}, and no other plan is allowed ({error}); the pipeline is as it was.") from error

    def _may_be_untouched(self, plan: Plan) -> bool:
        return all(plan.baseline.get(name) == value for name, value in (self.request.fix or {}).items())

    def _untouched(self, plan: Plan) -> Plan:
        """The pipeline as it is but for what the user fixed, on the plan's device: it was measured to be faster."""
        self.request = replace(self.request, fix={**plan.baseline, **(self.request.fix or {})})
        return self._again("slower than the untouched pipeline")

    def _give_up(self, plan: Plan, last: bool) -> None:
        """Rule out what made the pipeline raise: the first suspect in the plan; all its changes when there is no second guess."""
        free = [name for name in plan.changes if name not in (self.request.fix or {})]
        suspects = [name for name in SUSPECTS if name in free]
        for name in free if last or not suspects else suspects[:1]:
            self.refused.setdefault(name, set()).update(COMPILES if name == "compile" else {plan.changes[name]})

    def _refuse(self, plan: Plan, tried: Check) -> None:
        """Rule out what may have spoiled the output: what narrows numbers when it is black, else all that changes them.

        Raises:
            VerificationError: all of it was fixed by the user, or nothing that changes numbers is in the plan.
        """
        fixed = self.request.fix or {}
        changed = {name: value for name, value in plan.changes.items() if name in NUMERIC_KNOBS and name not in fixed}
        narrow = {name: value for name, value in changed.items() if name in OVERFLOWING}
        blamed = narrow if tried.unsound and narrow else changed
        if not blamed:
            held = ", ".join(f"{name}={value}" for name, value in plan.changes.items() if name in fixed)
            raise VerificationError(f"{'; '.join(tried.failures)}; " + (f"{held} is fixed: leave it free. " if held else "")
                                    + "The pipeline is as it was.")  # fmt: skip
        for name, value in blamed.items():
            self.refused.setdefault(name, set()).add(value)


def _failed(what: str, error: Exception) -> PlannerError:
    """An error of the pipeline's own code as one of ours; ours stay what they are."""
    if isinstance(error, PlannerError):
        return error
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    return VerificationError(f"{what} does not run ({text}); the pipeline is as it was. Check your inputs, or plan with verify=False.")


def _finished(plan: Plan, pipe: Any, session: Session, measured: Measurement | None, warnings: list[str]) -> Plan:
    """The plan as the user gets it, and as what is in force on the pipeline remembers it."""
    done = plan.model_copy(update={"measured": measured, "warnings": (*plan.warnings, *warnings)})
    done._remember(pipe)
    current = in_force(pipe)
    assert current is not None
    current.asked = current.plan = done
    return done
