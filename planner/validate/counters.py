"""Which estimate answers which metric, and in what unit the source counted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planner.types import Device, Estimate
from planner.units import GIB
from planner.validate.case import Case, Counter, Prediction, Quantity

UNCLEAR_GB = 0.07
"""GiB over GB is 1.074: the doubt where a source says GB and may mean either."""

METRICS: dict[str, tuple[Counter, Quantity]] = {
    "peak_allocated_gb": ("peak_allocated_bytes", "bytes"),
    "peak_reserved_gb": ("peak_reserved_bytes", "bytes"),
    "nvidia_smi_gb": ("device_used_bytes", "bytes"),
    # Where a source names no counter, the figures that can be checked against another source are allocated ones
    # (SD3 medium: 18.765 in both sd3.md and onediff, whose script prints max_memory_allocated).
    "peak_unknown_gb": ("peak_allocated_bytes", "bytes"),
    "peak_pct_gpu": ("reserved_share", "percent"),
    "latency_s": ("latency_seconds", "seconds"),
    "it_per_s": ("steps_per_second", "per_second"),
    "oom": ("fits", "flag"),
}
# Scripts of these series divide by 1024**3, or their figures agree with ones that do (README, calibration/published).
_BINARY = re.compile(r"^(tao|onediff|dquant|ort|pr9177|pr10503|sd3blog|pr11682|smopt|doclowmem)")
# The benchmark of that post prints torch.cuda.memory_allocated() after the call: batch 1 and 4 differ by 1 MB.
_RESTING = re.compile(r"optimum-quanto")
RESTING_TERM = "allocated between calls"
RESTING_ERROR = 0.05
"""Half width of its interval: which layers a library leaves unquantized is not always told."""
# Before torch 2.0 cuDNN's search emptied the cache while it still held the workspace of all it had tried (aten
# cudnn/Conv_v7.cpp, findAlgorithms), so up to the whole card stayed in the cache: 8 to 10 GiB at every batch size.
_SEARCH_STAYS = re.compile(r"1\.")
_BINARY_NOTE = re.compile(r"GiB|1024\s*\*\*\s*3|MiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """How one row's number is to be read."""

    counter: Counter
    quantity: Quantity
    si: float
    tolerance: float | None
    note: str | None


def _counter(metric: str, notes: str) -> tuple[Counter, Quantity] | None:
    found = METRICS.get(metric)
    if metric == "peak_unknown_gb" and _RESTING.search(notes):
        return "resting_allocated_bytes", "bytes"
    if metric == "latency_s" and re.search(r"per denoising step", notes):
        return "step_seconds", "seconds"
    if metric == "it_per_s" and re.search(r"steps\s*/\s*(e2e|whole|end)", notes):
        return "call_steps_per_second", "per_second"
    return found


def _doubt(row_id: str, value: float, quantity: Quantity, notes: str) -> tuple[float | None, str | None]:
    stated = re.search(r"\+-\s*(\d+(?:\.\d+)?)\s*(%|GB)", notes) if quantity == "bytes" else None
    if stated and value > 0:
        share = float(stated.group(1)) / (100 if stated.group(2) == "%" else value)
        return share, f"the notes allow {stated.group(0)}"
    if quantity == "bytes" and not (_BINARY.match(row_id) or _BINARY_NOTE.search(notes)):
        return UNCLEAR_GB, "GB may mean 10^9 bytes or GiB; read as GiB"
    return None, None


def read_counter(metric: str, value: float, row_id: str, notes: str) -> Counted | None:
    """How to read ``value``; None for a metric without a counterpart in an estimate."""
    found = _counter(metric, notes)
    if found is None:
        return None
    counter, quantity = found
    tolerance, note = _doubt(row_id, value, quantity, notes)
    si = value * GIB if quantity == "bytes" else value
    return Counted(counter=counter, quantity=quantity, si=si, tolerance=tolerance, note=note)


def _triple(estimate: Estimate, name: str) -> tuple[float, float, float] | None:
    values = tuple(getattr(estimate, name + end) for end in ("", "_low", "_high"))
    return None if None in values else (float(values[0]), float(values[1]), float(values[2]))


def _scaled(values: tuple[float, float, float], factor: float) -> Prediction:
    return Prediction(value=values[0] * factor, low=values[1] * factor, high=values[2] * factor)


def _rate(values: tuple[float, float, float], count: float) -> Prediction:
    """Counts per second; the longest time is the lowest rate."""
    value, low, high = values
    if min(value, low, high) <= 0:
        return Prediction(reason="the estimated time is not above zero, so there is no rate")
    return Prediction(value=count / value, low=count / high, high=count / low)


def _steps_rate(case: Case, estimate: Estimate) -> Prediction:
    whole = case.counter == "call_steps_per_second"
    steps = case.workload.num_inference_steps
    if whole and steps is None:
        return Prediction(reason="steps over the whole call, and the number of steps is not stated")
    times = _triple(estimate, "latency_seconds" if whole else "step_seconds")
    if times is None:
        return Prediction(reason="the estimate has no time per denoising step")
    return _rate(times, float(steps) if whole and steps is not None else 1.0)


def _share(estimate: Estimate, device: Device) -> Prediction:
    values = _triple(estimate, "peak_reserved_bytes")
    assert values is not None
    return _scaled(values, 100 / device.total_bytes)


def _resting(estimate: Estimate) -> tuple[float, float, float] | None:
    found = next((term.bytes for term in estimate.terms if term.name == RESTING_TERM), None)
    return None if found is None else (float(found), found * (1 - RESTING_ERROR), found * (1 + RESTING_ERROR))


def _bytes(case: Case, estimate: Estimate, device: Device) -> tuple[float, float, float] | None:
    """A byte counter with its interval, which reaches further where the source or its release leaves more open."""
    if case.counter == "resting_allocated_bytes":
        return _resting(estimate)
    values = _triple(estimate, case.counter)
    if values is None:
        return None
    value, low, high = values
    if case.metric == "peak_unknown_gb":  # any of the counters may be meant, and the device's is the largest of them
        high = max(high, estimate.device_used_bytes_high or 0)
    if case.counter == "device_used_bytes" and case.settings.get("cudnn_benchmark") and _SEARCH_STAYS.match(case.torch_version or ""):
        high = max(high, float(device.total_bytes))
    return value, low, high


def _answer(case: Case, estimate: Estimate, device: Device) -> Prediction:
    if case.counter == "fits":
        out = 0.0 if estimate.fits else 1.0
        return Prediction(value=out, low=out, high=out)
    if case.counter in ("steps_per_second", "call_steps_per_second"):
        return _steps_rate(case, estimate)
    if case.counter == "reserved_share":
        return _share(estimate, device)
    values = _bytes(case, estimate, device)
    if values is None:
        return Prediction(reason=f"the estimate has no {case.counter}")
    return _scaled(values, 1 / GIB if case.quantity == "bytes" else 1.0)


def value_from_estimate(case: Case, estimate: Estimate, device: Device) -> Prediction:
    """What ``estimate`` says of the row's number, in the row's own unit.

    ``low`` and ``high`` bound the estimate's 90 % interval. ``fits`` is copied, so that fits and OOMs can be compared.
    An estimate for a part (``case.subject``) must be of that part.
    """
    return _answer(case, estimate, device).model_copy(update={"fits": estimate.fits})
