"""Measuring what a decision rests on: the chosen plan's own operations are timed, then it is decided again.

Coefficients and probes disagree, so a candidate that was never probed can look fast for no other reason. Whatever wins is
probed, until what wins has been.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planner.calibrate import Calibration, probe_missing
from planner.calibrate.signature import Variant, variant_signature
from planner.cost.model import CostModel
from planner.decide import context_for
from planner.dryrun.trace import CallTrace
from planner.progress import Progress
from planner.space import recipe_of
from planner.types import Quality

if TYPE_CHECKING:
    from planner.dryrun.provider import Traces
    from planner.plan import Plan

ROUNDS = 5
"""Assumed: decisions that are revised so often have candidates too near to each other to matter."""
MEASURED_ERROR = 0.15
"""Half width of the interval of times that rest on probes; see :mod:`planner.cost.estimate`."""
_Counted = tuple[CallTrace, int]


@dataclass(slots=True)
class Prober:
    """Times the operations of plans on the device that is here, within ``seconds`` altogether."""

    model: CostModel
    calibration: Calibration
    seconds: float
    quality: Quality
    say: Progress
    _tried: set[str] = field(default_factory=set)

    def baseline(self, traces: Traces) -> None:
        """Time the operations of the pipeline as it is."""
        trace = traces.trace(None, None)
        self._probe([(call, trace.count(index)) for index, call in enumerate(trace.calls)], "")
        if self.model.probes:
            error = min(self.model.coefficients.latency_error, MEASURED_ERROR)
            self.model.coefficients = self.model.coefficients.model_copy(update={"latency_error": error})

    def refine(self, traces: Traces, decided: Callable[[], Plan]) -> Plan:
        """Decide, time what the plan runs and was never timed, and decide again, until nothing is new."""
        plan = decided()
        for _ in range(ROUNDS):
            if not self.measure(traces, plan):
                break
            plan = decided()
        return plan

    def measure(self, traces: Traces, plan: Plan) -> bool:
        """Time the plan's operations; whether any was new. Compiled components have no operations of their own."""
        recipe = recipe_of(plan.settings, context_for(traces, self.model.device, self.quality))
        trace = self.model.trace_for(recipe)
        groups: dict[Variant, list[_Counted]] = {}
        for index in range(len(trace.calls)):
            counted = (self.model.variant(trace, index, recipe), trace.count(index))
            for variant in self.model.variants_of(trace, index, recipe):
                groups.setdefault(variant, []).append(counted)
        news = [self._probe(calls, variant) for variant, calls in groups.items()]
        return any(news)

    def _probe(self, calls: list[_Counted], variant: Variant) -> bool:
        wanted = {variant_signature(text, variant) for call, _ in calls for text in call.shapes}
        if self.seconds <= 0 or wanted <= self._tried:
            return False
        self._tried |= wanted
        self.say(f"probing operations of this pipeline (at most {self.seconds:.0f} s)")
        started = time.perf_counter()
        found = probe_missing(calls, self.model.device, self.calibration, self.seconds, self.say, variants=(variant,))
        self.seconds -= time.perf_counter() - started
        known = self.model.probes or {}
        self.model.probes = {**found, **known}
        self.model.forget()
        return bool(found.keys() - known.keys())
