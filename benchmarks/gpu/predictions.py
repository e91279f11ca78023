"""Predictions for stored records by the cost model as it is now: uncalibrated, and calibrated with the run's own probes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.gpu.cells import Planner, small_card
from benchmarks.gpu.records import Machine, Record
from benchmarks.gpu.subjects import find_subject
from planner.calibrate.fit import Fit, fit_coefficients
from planner.cost.coefficients import Coefficients, default_coefficients
from planner.errors import CalibrationError, PlannerError
from planner.targets import with_budget
from planner.types import Device, Estimate

logger = logging.getLogger(__name__)


def machine_of(records: Iterable[Record]) -> Machine | None:
    """The machine of these records: that of the first which names one."""
    return next((record.machine for record in records if record.machine is not None), None)


def by_machine(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Device name to its records, in order; what names no machine (a crash) goes with the one before."""
    found: dict[str, list[Record]] = {}
    last = None
    for record in records:
        last = record.machine.device.name if record.machine is not None else last
        if last is not None:
            found.setdefault(last, []).append(record)
    return found


def fitted(records: Iterable[Record], device: Device) -> Fit | None:
    """Coefficients fitted on the device probes of these records; None without a usable one."""
    runs = [record.probes for record in records if record.probes is not None and record.cell.subject == "device"]
    try:
        return fit_coefficients(runs, device, default_coefficients(device)) if runs else None
    except CalibrationError as error:
        logger.warning("%s", error)
        return None


def operation_seconds(records: Iterable[Record]) -> dict[str, float]:
    """Signature to seconds of every operation that was probed."""
    samples = [sample for record in records if record.probes is not None for sample in record.probes.samples]
    return {sample.signature: sample.seconds for sample in samples if sample.seconds is not None}


@dataclass(slots=True)
class Predictor:
    """Predicts records of one machine; dry runs are shared. Callable as :data:`benchmarks.gpu.evaluate.Predict`."""

    machine: Machine
    coefficients: Coefficients | None = None
    probes: Mapping[str, float] | None = None
    _planners: dict[str, Planner | None] = field(default_factory=dict)

    def __call__(self, record: Record) -> Estimate | None:
        planner = self._planner(record.cell.subject)
        if planner is None:
            return None
        card = small_card(planner.device, record.cell.cap_bytes) if record.cell.cap_bytes is not None else None
        try:
            return planner.estimate(record.cell.workload, record.cell.settings, card)
        except PlannerError as error:
            logger.warning("%s cannot be predicted: %s", record.key, error)
            return None

    def _planner(self, name: str) -> Planner | None:
        if name not in self._planners:
            try:
                device = with_budget(self.machine.device, None)
                self._planners[name] = Planner(find_subject(name), device, self.coefficients, self.probes)
            except PlannerError as error:
                logger.warning("%s is left out: %s", name, error)
                self._planners[name] = None
        return self._planners[name]


__all__ = ["Predictor", "by_machine", "fitted", "machine_of", "operation_seconds"]
