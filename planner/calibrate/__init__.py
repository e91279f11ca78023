"""Measuring this machine and remembering it: from probe runs and observed plans to coefficients. Importing it needs no torch.

Sources of numbers, best first: probes of the very operations (``probe_missing``), coefficients fitted on this device's own
probe runs (``calibrate``), and the shipped defaults of its architecture.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from planner.calibrate.identity import DeviceKey, device_key, thread_count
from planner.calibrate.samples import Run, Sample
from planner.calibrate.signature import Variant, variant_signature
from planner.calibrate.store import Contents, SampleKey, Store
from planner.cost.coefficients import Coefficients, default_coefficients
from planner.dryrun.trace import CallTrace
from planner.errors import CalibrationError
from planner.progress import Progress, silent
from planner.types import Basis, Device, Measurement

if TYPE_CHECKING:
    from planner.plan import Plan

logger = logging.getLogger(__name__)
Mode = Literal["auto", "never", "full"]
Calls = Iterable[CallTrace | tuple[CallTrace, int]]

_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("fp16", "bf16", "fp32")}
SPOT_CHECKS, SPOT_SECONDS, DRIFT = 3, 2.0, 1.5
"""Stored operations that are timed again before they are relied on, the time for that, and by how much they may have changed.

The factor is assumed: twice the scatter that makes a measurement unstable, so that a quiet machine stays within it.
"""
_MEMORY_SHARE = 0.25
"""Share of the free memory that probes may use."""
_LEAST_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is known of one device. ``samples`` are timed operations by (signature, threads); ``rates`` seconds per unit."""

    coefficients: Coefficients
    samples: Mapping[SampleKey, Sample]
    basis: Basis
    notes: tuple[str, ...] = ()
    key: DeviceKey | None = None
    store: Store | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    _applied: dict[str, tuple[float, float]] = field(default_factory=dict)
    _timed_now: dict[SampleKey, Sample] = field(default_factory=dict)
    """What this process timed: nothing stored is truer."""

    def sample(self, key: SampleKey) -> Sample | None:
        """The timing of an operation, if there is one."""
        return self._timed_now.get(key) or self.samples.get(key)

    def keep(self, samples: Mapping[str, Sample]) -> None:
        """Remember what was timed just now, here and in the store."""
        self._timed_now.update({(sample.signature, sample.threads): sample for sample in samples.values()})
        if self.store is not None and self.key is not None:
            self.store.add_samples(self.key, samples.values())

    def corrections(self, pipeline_digest: str) -> tuple[float, float]:
        """(memory_scale, time_scale) learned from earlier runs of that pipeline here; (1, 1) when there were none."""
        if self.store is None or self.key is None:
            return 1.0, 1.0
        found = self.store.corrections(self.key, pipeline_digest)
        self._applied[pipeline_digest] = found
        return found

    def observe(self, pipeline_digest: str, plan: Plan, measured: Measurement, applied: tuple[float, float] | None = None) -> None:
        """Remember what a checked run of ``plan`` showed. ``applied``: corrections in its prediction, else those last asked for."""
        if self.store is None or self.key is None:
            return
        scales = applied or self._applied.get(pipeline_digest, (1.0, 1.0))
        self.store.record_observation(self.key, _plain(pipeline_digest), settings_digest(plan.settings), plan.predicted, measured, scales)


def _plain(digest: str) -> str:
    """A digest as the store takes it: at most 128 letters, digits and ``_ . : -``."""
    import hashlib
    import re

    return digest if re.fullmatch(r"[0-9a-zA-Z_.:-]{1,128}", digest) else hashlib.sha256(digest.encode()).hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A short name of one combination of knobs."""
    import hashlib
    import json

    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode()).hexdigest()[:16]


def calibration_for(device: Device, *, mode: Mode = "auto", store: Store | None = None, progress: Progress = silent) -> Calibration:
    """What is known of ``device``: fitted from its stored probe runs, else the defaults of its architecture.

    ``never`` reads nothing that was measured here; ``full`` probes the device first. Only ``full`` imports torch.
    """
    default = default_coefficients(device)
    if mode == "never" or device.kind == "sim":
        return Calibration(default, {}, default.basis, ("no measurement of this device was asked for",))
    if mode == "full":
        return calibrate(device, False, progress, store=store)
    store = store or Store()
    key = device_key(device)
    return _from_contents(store.load(key), device, key, store)


def _from_contents(contents: Contents, device: Device, key: DeviceKey, store: Store) -> Calibration:
    from planner.calibrate.fit import fit_coefficients, rates_of

    default, threads = default_coefficients(device), thread_count()
    runs = [run for run in contents.runs if run.threads == threads or device.kind == "cuda"]
    rates = rates_of(run for run in runs if run.quiet)
    samples = contents.by_key()
    notes = tuple(f"run {run.id} was unstable: {', '.join(run.unstable())[:200]}" for run in runs if run.unstable())
    try:
        fit = fit_coefficients(runs, device, default) if runs else None
    except CalibrationError as error:
        fit, notes = None, (*notes, str(error))
    if fit is None:
        return Calibration(default, samples, default.basis, notes or (_uncalibrated(contents, threads),), key, store, rates)
    return Calibration(fit.coefficients, samples, fit.coefficients.basis, notes, key, store, rates)


def _uncalibrated(contents: Contents, threads: int) -> str:
    if contents.runs:
        return f"this device was calibrated with other than {threads} threads; planner calibrate measures it with these"
    return "this device is not calibrated; planner calibrate measures it"


def calibrate(device: Device, quick: bool, progress: Progress = silent, *, store: Store | None = None) -> Calibration:
    """Probe the device that is here (quick: at most 10 s, else 60 s), keep the run and fit coefficients.

    Raises:
        HardwareError: the device is not one that this process can run on.
    """
    from planner.calibrate.probe import probe_device

    store = store or Store()
    key = device_key(device)
    here, limit = _torch_device(device), _memory_limit(device)
    run = probe_device(here, quick=quick, memory_limit_bytes=limit, dtypes=_dtypes(device), progress=progress)
    contents = store.add_run(key, run)
    for name in run.unstable():
        progress(f"unstable measurement (spread above 25 %): {name}")
    return _from_contents(contents, device, key, store)


def _dtypes(device: Device) -> tuple[str, ...]:
    return tuple(name for name in _DTYPES[device.kind] if name in device.flops_per_second) or ("fp32",)


def _torch_device(device: Device) -> str:
    import torch

    from planner.errors import HardwareError

    if device.kind == "cuda" and not torch.cuda.is_available():
        raise HardwareError(f'{device.name} cannot be measured: this process has no CUDA device; plan for it with calibrate="never".')
    if device.kind == "sim":
        raise HardwareError("a simulated device has no speed to measure.")
    return device.kind


def _memory_limit(device: Device) -> int:
    """Bytes a probe may take: a quarter of what is free, and no more than the budget."""
    free = device.free_bytes if device.free_bytes is not None else device.total_bytes // 2
    allowed = int(free * _MEMORY_SHARE)
    return max(min(allowed, device.budget_bytes or allowed), _LEAST_MEMORY_BYTES)


def probe_missing(traces_calls: Calls, device: Device, calibration: Calibration, budget_seconds: float, progress: Progress = silent,
                  variants: Sequence[Variant] = ("",)) -> Mapping[str, float]:  # fmt: skip
    """Signature to seconds for the distinct operations of these calls; what was never timed here is timed now, and kept.

    ``traces_calls``: calls, or (call, how often it is made). ``variants`` adds the same operations in other layouts or
    attention kernels, under :func:`~planner.calibrate.signature.variant_signature` keys. On a CPU each value contains the
    host's share per operation and fresh memory, so that the sum over a call is the call's time.
    """
    counted = [item if isinstance(item, tuple) else (item, 1) for item in traces_calls]
    threads = thread_count()
    counts = _occurrences(counted, variants)
    known = {text: sample for text in counts if (sample := calibration.sample((text, threads))) is not None}
    if budget_seconds > 0:
        trusted = calibration.sample if _still_true(known, counts, device, calibration, progress) else calibration._timed_now.get
        known = {text: sample for text in known if (sample := trusted((text, threads))) is not None}
    missing = {text: count for text, count in counts.items() if text not in known}
    if missing and budget_seconds > 0:
        from planner.calibrate.probe import probe_operations

        new = probe_operations(missing, _torch_device(device), budget_seconds, _memory_limit(device), progress)
        known |= new
        calibration.keep(new)
    seconds = {text: sample.seconds for text, sample in known.items() if sample.seconds is not None}
    if device.kind != "cpu" or not seconds:
        return seconds
    rates = _host_rates(calibration, progress) if budget_seconds > 0 else calibration.rates
    return with_host_share(seconds, [call for call, _ in counted], rates, variants)


def _still_true(known: Mapping[str, Sample], counts: Mapping[str, int], device: Device, calibration: Calibration,
                progress: Progress) -> bool:  # fmt: skip
    """Whether stored timings hold now: those that weigh most are taken again. A machine that was busy then, or is now, differs."""
    stored = {text: sample.seconds * counts[text] for text, sample in known.items()
              if sample.seconds is not None and (text, sample.threads) not in calibration._timed_now}  # fmt: skip
    heaviest = sorted(stored, key=lambda text: (-stored[text], text))[:SPOT_CHECKS]
    if not heaviest:
        return True
    from planner.calibrate.probe import probe_operations

    wanted = {text: counts[text] for text in heaviest}
    again = probe_operations(wanted, _torch_device(device), SPOT_SECONDS, _memory_limit(device), progress)
    both = [(again[text].seconds, known[text].seconds) for text in heaviest if text in again]
    ratios = [now / then for now, then in both if now is not None and then is not None]
    calibration.keep(again)
    holds = not ratios or 1 / DRIFT < statistics.median(ratios) < DRIFT
    if not holds:
        progress(f"stored timings are off by {statistics.median(ratios):.2f} times: timing this pipeline's operations again")
    return holds


def _host_rates(calibration: Calibration, progress: Progress) -> Mapping[str, float]:
    """What this CPU adds to each operation: as calibrated by a quiet run, else measured now (about two seconds) and kept."""
    if "python" in calibration.rates:
        return calibration.rates
    from planner.calibrate.fit import rates_of
    from planner.calibrate.probe import probe_host

    run = probe_host("cpu", progress)
    if calibration.store is not None and calibration.key is not None:
        calibration.store.add_run(calibration.key, run)
    return {**calibration.rates, **rates_of([run])}


def in_variant(probes: Mapping[str, float], call: CallTrace, variant: Variant) -> dict[str, float]:
    """Probes of a call's operations as they run in ``variant``, under the plain signatures that the cost model looks up."""
    keys = {text: variant_signature(text, variant) for text in call.shapes}
    return {text: probes[key if key in probes else text] for text, key in keys.items() if key in probes or text in probes}


def _occurrences(counted: Sequence[tuple[CallTrace, int]], variants: Sequence[Variant]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for call, times in counted:
        for text, each in zip(call.shapes, _each(call), strict=True):
            for variant in variants:
                counts[variant_signature(text, variant)] += each * times
    return counts


def _each(call: CallTrace) -> list[int]:
    """How often each distinct operation runs in one call; folded repetitions count."""
    number = np.bincount(call.shape, weights=call.columns.get("times"), minlength=len(call.shapes))
    return [int(value) for value in number]


_VANILLA_OPERATIONS = 8
"""diffusers' ``AttnProcessor`` without SDPA: three splits into heads, empty, baddbmm, softmax, bmm, and the heads joined."""


def with_host_share(seconds: Mapping[str, float], calls: Sequence[CallTrace], rates: Mapping[str, float],
                    variants: Sequence[Variant] = ("",)) -> dict[str, float]:  # fmt: skip
    """CPU seconds of operations within a model: alone, plus Python and modules, plus memory taken anew from the kernel."""
    from planner.calibrate.heap import fresh_bytes, trim_bytes, uses_glibc

    python, fresh_rate = rates.get("python", 0.0), rates.get("fresh_memory", 0.0) if uses_glibc() else 0.0
    kept = trim_bytes(calls)
    fresh, occurrences = Counter[str](), Counter[str]()
    for call in calls:
        each = np.bincount(call.shape, weights=fresh_bytes(call, kept), minlength=len(call.shapes))
        for text, size, count in zip(call.shapes, each.tolist(), _each(call), strict=True):
            for key in {variant_signature(text, variant) for variant in variants}:
                fresh[key] += size
                occurrences[key] += count
    operations = {text: _VANILLA_OPERATIONS if text.endswith("@vanilla") else 1 for text in seconds}
    return {
        text: value + python * operations[text] + fresh_rate * fresh[text] / max(occurrences[text], 1) for text, value in seconds.items()
    }


def cpu_device_measured(device: Device | None = None, *, store: Store | None = None) -> Device:
    """The CPU with measured peaks per dtype and bandwidth; the first time on a machine a probe of about a second.

    Falls back to ``device`` as it is (default: assumed peaks) where nothing could be measured, with a word in its note.
    """
    from planner.hardware.host import cpu_device

    found = device or cpu_device()
    store = store or Store()
    key, threads = device_key(found), thread_count()
    contents = store.load(key)
    samples = [sample for run in contents.runs for sample in run.samples] + list(contents.samples)
    peaks = cpu_peaks([sample for sample in samples if sample.threads == threads])
    if peaks is None:
        peaks = cpu_peaks(_probe_cpu(store, key))
    if peaks is None:
        return found.model_copy(update={"note": "; ".join(filter(None, (found.note, "its speed could not be measured")))})
    flops, bandwidth = peaks
    note = "; ".join(part for part in (found.note or "").split("; ") if part and not part.startswith("peaks assumed")) or None
    changes = {"flops_per_second": flops, "bandwidth_bytes_per_second": bandwidth, "basis": "measured", "note": note}
    return found.model_copy(update=changes)


CPU_PROBE_SECONDS = 1.2


def _probe_cpu(store: Store, key: DeviceKey) -> list[Sample]:
    from planner.calibrate.grid import cpu_peak_signatures
    from planner.calibrate.probe import probe_operations

    samples = list(probe_operations(cpu_peak_signatures(), "cpu", CPU_PROBE_SECONDS, 1 << 30).values())
    store.add_samples(key, samples)
    return samples


def cpu_peaks(samples: Iterable[Sample]) -> tuple[dict[str, float], float] | None:
    """(FLOPs per second by dtype, bytes per second) that the best product and the best copy of each reached; None without both.

    fp16 without a probe of its own takes fp32's rate: CPUs without fp16 units convert.
    """
    from planner.calibrate.grid import cpu_peak_signatures
    from planner.calibrate.signature import flops_of, parse_signature

    wanted, flops, bandwidth = set(cpu_peak_signatures()), dict[str, float](), 0.0
    for sample in samples:
        if sample.signature not in wanted or sample.seconds is None:
            continue
        operation = parse_signature(sample.signature)
        work = flops_of(operation)
        if work:
            flops[operation.dtype] = max(flops.get(operation.dtype, 0.0), work / sample.seconds)
        else:
            moved = sum(spec.storage_bytes for spec in operation.tensors())
            bandwidth = max(bandwidth, moved / sample.seconds)
    if not bandwidth or "fp32" not in flops:
        return None
    return {"fp32": flops["fp32"], "bf16": flops.get("bf16", flops["fp32"]), "fp16": flops.get("fp16", flops["fp32"])}, bandwidth


__all__ = ["Calibration", "DeviceKey", "Run", "Store", "calibrate", "calibration_for", "cpu_device_measured", "cpu_peaks", "device_key",
           "in_variant", "probe_missing", "settings_digest", "with_host_share"]  # fmt: skip
